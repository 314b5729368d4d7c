"""What is said about a model, and what statistics refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import curvax as cx
from helpers.captured import normal

KEY = jax.random.key(0)


def _model(p, x):
    hidden = jnp.tanh(p["w"] @ x + p["b"])
    return (p["v"] @ hidden) / p["temperature"]


PARAMS = {
    "w": normal(KEY, 4, 3),
    "b": normal(KEY, 4),
    "v": normal(KEY, 2, 4),
    "temperature": jnp.ones(()),
    "idle": jnp.ones(2),
    "empty": jnp.zeros((0, 3)),
    "steps": 3,
}


def test_rows():
    report = cx.capture.report(_model, PARAMS, jnp.ones(3))
    rows = {row.parameter: row for row in report.rows}
    assert list(rows) == ["['b']", "['empty']", "['idle']", "['temperature']", "['v']", "['w']"]
    assert rows["['w']"].block == (1, 4, 4) and rows["['w']"].fallback == ""
    assert rows["['w']"].uses[0].startswith("dense + bias, test_report.py:")
    assert rows["['b']"].uses == ("bias of ['w']",) and rows["['b']"].group == "['w']"
    assert rows["['empty']"].uses == ("no entries",)
    assert rows["['idle']"].fallback == "none: not used"
    assert "used in `div`" in rows["['temperature']"].fallback
    assert rows["['temperature']"].factors == ("diagonal", "dense")
    assert report.num_entries == 12 + 4 + 8 + 1 + 2 and report.num_fallback == 3 and not report.covered
    assert report.layers.fallbacks == {
        "['idle']": "none: not used",
        "['temperature']": rows["['temperature']"].fallback,
    }


def test_text(capsys):
    report = cx.capture.report(_model, PARAMS, jnp.ones(3))
    report.print()
    printed = capsys.readouterr().out
    for text in (printed, str(report), repr(report)):
        assert "not covered: 24 of 27 entries" in text and "1 × 4 × 4" in text and "used in `div`" in text
    whole = cx.capture.report(lambda p, x: p @ x, normal(KEY, 2, 3), jnp.ones(3))
    assert "covered: 6 of 6" in str(whole) and "not covered" not in str(whole) and whole.covered


def test_strict_names_what_is_uncovered():
    with pytest.raises(ValueError, match=r"(?s)strict=True.*\['temperature'\].*used in `div`"):
        cx.capture.report(_model, PARAMS, jnp.ones(3), strict=True)
    covered = {k: v for k, v in PARAMS.items() if k != "temperature"} | {"temperature": 2}
    assert cx.capture.report(_model, covered, jnp.ones(3), strict=True).num_fallback == 2


def test_shapes_and_keys_are_enough():
    like = jax.eval_shape(lambda: PARAMS["w"])
    report = cx.capture.report(lambda w, x: w @ x, like, jax.ShapeDtypeStruct((3,), jnp.float64))
    assert report.covered
    dropped = cx.capture.report(
        lambda w, x, key: w @ (x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)),
        PARAMS["w"],
        jnp.ones(3),
        key=KEY,
    )
    assert dropped.covered and dropped.layers.groups[0].block.shape == (1, 4, 3)


def test_bad_models():
    with pytest.raises(ValueError, match="nothing to find"):
        cx.capture.report(lambda p, x: x, {"n": jnp.arange(3), "none": None}, jnp.ones(3))
    with pytest.raises(ValueError, match="complex"):
        cx.capture.report(lambda p, x: p["w"] @ x, {"w": jnp.ones((2, 3), complex)}, jnp.ones(3))


BAD = {
    "parameters": (lambda a: a | {"params": jnp.ones((5, 3))}, "must have the floating-point arrays"),
    "examples": (lambda a: a | {"inputs": jnp.ones((4, 2))}, "must hold arrays of shapes"),
    "no axis": (lambda a: a | {"inputs": jnp.ones(())}, "leading axis"),
    "number of cotangents": (lambda a: a | {"cotangents": jnp.ones((3, 2))}, "shaped like the outputs"),
    "cotangents": (lambda a: a | {"cotangents": jnp.ones((4, 3))}, "shaped like the outputs"),
    "structure": (lambda a: a | {"cotangents": (jnp.ones(2),) * 2}, "structure of the outputs"),
    "no group": (lambda a: a | {"aux": {"w": jnp.ones(1)}}, "no group"),
    "aux": (lambda a: a | {"aux": {"": jnp.ones(2)}}, "with the stack"),
    "integers": (lambda a: a | {"statistic": lambda s, x, g, aux: jnp.zeros(2, int)}, "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_statistics(name):
    change, message = BAD[name]
    layers = cx.capture.find_layers(lambda w, x: w @ x, jnp.ones((2, 3)), jnp.ones(3))
    good = {
        "params": jnp.ones((2, 3)),
        "inputs": jnp.ones((4, 3)),
        "cotangents": jnp.ones((4, 2)),
        "statistic": cx.capture.SecondMoments(),
    }
    assert float(cx.capture.statistics(layers, **good)[""][0].count[0]) == 4
    with pytest.raises(ValueError, match=message):
        cx.capture.statistics(layers, **change(good))


def test_trees_of_another_structure_are_refused():
    layers = cx.capture.find_layers(lambda w, x: w @ x, jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="structure of the parameters"):
        layers.pack({"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="sharing"):
        cx.capture.SecondMoments("both")


def test_pack_and_unpack_are_transposes():
    """Of an Equinox model: every entry has one place, and comes back to it."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY, dtype=jnp.float64)
    layers = cx.capture.find_layers(lambda m, x: m(x), model, jnp.ones(3))
    back = layers.unpack(layers.pack(model))
    arrays = eqx.filter(model, eqx.is_inexact_array)
    assert jax.tree.structure(back) == jax.tree.structure(arrays)
    assert all(
        bool(jnp.all(a == b)) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(arrays), strict=True)
    )
