"""Where a finder of layers goes wrong: biases that are none, uses that are no sites, programs that must stay intact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.capture import _jaxprs
from curvax.capture._run import Taps, run
from curvax.capture._tap import tap
from helpers.captured import agree, compare, example_gradients, kinds, normal, random_like, shapes
from helpers.sweep import sweep

KEY = jax.random.key(0)
W, B = normal(KEY, 4, 6), normal(KEY, 4)
X = normal(jax.random.key(1), 3, 6)


def find(model_fn, params, x=X[0], **options):
    return cx.capture.find_layers(model_fn, params, x, **options)


# Biases.


def _used_twice(y, b):
    return jnp.tanh(y) + (y + b)


FOLDED = {
    "plain": lambda p, x: p["w"] @ x + p["b"],
    "in front": lambda p, x: p["b"] + p["w"] @ x,
    "tokens": lambda p, x: jnp.outer(x, x) @ p["w"].T + p["b"],
    "tokens, transposed": lambda p, x: p["w"] @ jnp.outer(x, x) + p["b"][:, None],
    "heads": lambda p, x: (jnp.outer(x, x) @ p["w"].T).reshape(6, 2, 2) + p["b"].reshape(2, 2),
    "in jit": lambda p, x: jax.jit(lambda w: w @ x)(p["w"]) + p["b"],
    "cast": lambda p, x: (p["w"] @ x).astype(jnp.float32) + p["b"].astype(jnp.float32),
    "both stacked": lambda p, x: jax.lax.scan(
        lambda h, layer: (jnp.tanh(layer[0] @ h + layer[1]), None),
        x[:2],
        (p["w"][:, :4].reshape(4, 2, 2), p["w"][:, 4:]),
    )[0],
}  # fmt: skip
NOT_FOLDED = {
    "second use of the output": lambda p, x: _used_twice(p["w"] @ x, p["b"]),
    "second use of the bias": lambda p, x: (p["w"] @ x + p["b"]) * p["b"],
    "a third of the output": lambda p, x: (p["w"] @ x).reshape(2, 2)[0] + p["b"][:2],
    "another for each token": lambda p, x: p["w"][:, :4] @ jnp.outer(x[:4], x[:4]) + p["b"],
    "on a sum of sites": lambda p, x: p["w"] @ x + p["w"] @ jnp.sin(x) + p["b"],
    "of all experts": lambda p, x: jnp.einsum("eij,ej->ei", p["w"].reshape(2, 4, 3), x.reshape(2, 3)) + p["b"],
    "scaled": lambda p, x: p["w"] @ x + 0.5 * p["b"],
    "subtracted": lambda p, x: p["w"] @ x - p["b"],
    "of one of two sites": lambda p, x: jnp.tanh(p["w"] @ x + p["b"]) + p["w"] @ jnp.sin(x),
    "shared by steps that have their own weights": lambda p, x: jax.lax.scan(
        lambda h, w: (jnp.tanh(w @ h + p["b"][:2]), None), x[:2], p["w"].reshape(6, 2, 2)
    )[0],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", sweep(FOLDED, always=("plain", "tokens, transposed", "heads", "cast", "both stacked"))
)
def test_biases_that_belong_to_a_site(name, key):
    layers = agree(FOLDED[name], {"w": W, "b": B}, X, key, rtol=1e-6 if name == "cast" else 1e-11)
    group = next(g for g in layers.groups if g.sites)
    assert group.block.bias and all(site.bias for site in group.sites)


@pytest.mark.parametrize(
    "name",
    sweep(
        NOT_FOLDED,
        always=(
            "second use of the output",
            "second use of the bias",
            "a third of the output",
            "on a sum of sites",
            "of all experts",
            "shared by steps that have their own weights",
        ),
    ),
)
def test_biases_that_do_not(name, key):
    layers = agree(NOT_FOLDED[name], {"w": W, "b": B}, X, key)
    assert not any(group.block.bias for group in layers.groups)
    assert len(layers.groups) == 2 and not layers.fallbacks


def test_bias_of_a_convolution_reaches_its_channels_only_in_the_right_place(key):
    """One entry a channel is a bias of the site; one an entry of the last axis of space is not."""

    def model_fn(p, x):
        y = jax.lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH")
        )
        return y[0] + p["b"]

    image = normal(KEY, 2, 3, 4)
    params = {"w": normal(KEY, 4, 3, 3), "b": normal(KEY, 4, 1)}
    assert shapes(agree(model_fn, params, image, key)) == {"['w']": (1, 4, 10)}
    params["b"] = normal(KEY, 4)
    assert shapes(agree(model_fn, params, image, key)) == {"['b']": (1, 4, 1), "['w']": (1, 4, 9)}


# Uses that are no sites: still every gradient of every example, said with a reason.


@jax.custom_vjp
def _own_rule(w, x):
    return w @ x


_own_rule.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, g: (2.0 * jnp.outer(g, r[1]), r[0].T @ g))

FALLBACKS = {
    "norm of a weight": (lambda w, x: w / jnp.linalg.norm(w, axis=1, keepdims=True) @ x, "used in `"),
    "mask": (lambda w, x: (w * jnp.tri(4, 6, dtype=jnp.float64)) @ x, "multiplied by an array"),
    "a rule of its own": (_own_rule, "used in `custom_vjp_call`"),
    "product of parameters": (lambda w, x: w @ (w.T @ w) @ x, "used in `dot_general`"),
    "carried": (
        lambda w, x: jax.lax.scan(lambda c, _: (0.5 * c, c @ x), w, None, length=2)[1],
        "carried from step to step",
    ),
    "overlapping parts": (lambda w, x: jnp.concatenate([w[:, :4] @ x[:4], w[:, 2:] @ x[2:]]), "overlap"),
    "odd reshape": (lambda w, x: w.T.reshape(8, 3) @ x[:3], "no strides"),
    "padded": (
        lambda w, x: jnp.pad(w, ((0, 0), (0, 2))) @ jnp.concatenate([x, x[:2]]),
        "put together by `pad`",
    ),
    "nonlinear": (lambda w, x: jnp.exp(w[:, 0]) * x[:4], "used in `exp`"),
    "divisor": (lambda w, x: x[:4] / w[:, 0], "used in `div`"),
}


@pytest.mark.parametrize(
    "name",
    sweep(
        FALLBACKS, always=("norm of a weight", "a rule of its own", "carried", "overlapping parts", "divisor")
    ),
)
def test_fallbacks_have_the_gradients_of_the_examples(name, key):
    model_fn, reason = FALLBACKS[name]
    layers = agree(model_fn, W, X, key)
    (group,) = layers.groups
    assert group.fallback.startswith("gradients of the examples") and reason in group.fallback
    assert [site.kind for site in group.sites] == ["other"]
    with pytest.raises(ValueError, match="strict=True"):
        find(model_fn, W, strict=True)


def test_strict_lets_known_sites_and_unused_parameters_pass():
    layers = find(lambda p, x: p["w"] @ x + p["b"], {"w": W, "b": B, "c": B}, strict=True)
    assert layers.fallbacks == {"['c']": "none: not used"}


def _looped(w, x):
    return jax.lax.while_loop(lambda h: jnp.sum(h**2) > 1.0, lambda h: 0.1 * (w[:, :4] @ h), x[:4])


NOT_MEASURED = {
    "while": (lambda p, x: p["b"] * jax.lax.stop_gradient(_looped(p["w"], x)), "`while` loop"),
    "experts looked up": (
        lambda p, x: jnp.tanh(p["w"].reshape(2, 2, 6)[(x[0] > 0).astype(int)] @ x) @ p["b"].reshape(2, 2),
        "one-hot",
    ),
    "experts of tokens": (
        lambda p, x: jnp.einsum("tij,tj->ti", p["w"].reshape(2, 2, 6)[(x[:3] > 0).astype(int)], jnp.outer(x[:3], x))
        @ p["b"].reshape(2, 2),
        "one-hot",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_MEASURED)
def test_what_cannot_be_measured_has_no_site(name, key):
    """And does not keep the others from theirs."""
    model_fn, reason = NOT_MEASURED[name]
    params = {"w": W, "b": B}
    layers = find(model_fn, params)
    assert reason in layers.fallbacks["['w']"] and layers.fallbacks["['w']"].startswith("none")
    cotangents = random_like(jax.eval_shape(jax.vmap(lambda x: model_fn(params, x)), X), key)
    found = cx.capture.statistics(layers, params, X, cotangents, cx.capture.PerExampleGradients())
    assert found["['w']"] == ()
    truth = example_gradients(lambda b, x: model_fn({"w": W, "b": b}, x), B, X, cotangents)
    block = layers.groups[0].block
    packed = jax.vmap(lambda g: block.pack({"w": W, "b": g}))(truth)
    np.testing.assert_allclose(found["['b']"][0].swapaxes(0, 1), packed, atol=1e-12)
    with pytest.raises(ValueError, match="strict=True"):
        find(model_fn, params, strict=True)


def test_rows_looked_up_and_scored_are_an_embedding(key):
    """Candidates of a sampled softmax: rows, not weights, are multiplied with the data."""
    layers = agree(lambda w, x: w[jnp.array([0, 2, 2])] @ x, W, X, key)
    assert kinds(layers) == {"": ["embedding"]} and not layers.fallbacks


def test_integers_into_a_product(key):
    """A product takes integers and floats together: the inputs of such a site are integers."""
    numbers = jax.random.randint(key, (3, 6), -4, 5)
    product = lambda w, x: jax.lax.dot_general(w, x, (((1,), (0,)), ((), ())), preferred_element_type=w.dtype)
    layers = agree(product, W, numbers, key)
    assert kinds(layers) == {"": ["dense"]} and not layers.fallbacks


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_lookups_outside_of_the_table(mode, key):
    tokens = jnp.array([[0, 9], [3, 3], [2, 1]])
    layers = agree(lambda w, x: jnp.take(w, x, axis=0, mode=mode, fill_value=0), W, tokens, key)
    assert kinds(layers) == {"": ["embedding"]}


def test_tables_of_a_stack_and_columns(key):
    """One table for each of several features, and a lookup along the last axis."""
    tables = normal(KEY, 2, 5, 3)
    tokens = jax.random.randint(key, (3, 2, 4), 0, 5)
    layers = agree(lambda w, x: jax.vmap(lambda table, ids: table[ids])(w, x), tables, tokens, key)
    assert shapes(layers) == {"": (2, 3, 5)}
    layers = agree(lambda w, x: w[:, x], W, tokens[:, 0], key)
    assert shapes(layers) == {"": (1, 4, 6)}


# The program stays what it was.


@jax.custom_jvp
def _straight_through(x):
    return jnp.sign(x)


_straight_through.defjvp(lambda primals, tangents: (jnp.sign(primals[0]), tangents[0]))


def test_rules_that_no_parameter_enters_are_kept(key):
    def model_fn(p, x):
        return p["w"] @ _straight_through(p["v"] @ x)

    layers = agree(model_fn, {"v": W, "w": normal(KEY, 2, 4)}, X, key)
    assert not layers.fallbacks


def _instrumented(layers, params, x):
    """The model with taps, as a function of the slots."""
    model = layers.model
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(x)]
    program = _jaxprs.Program(model.jaxpr, layers.constants)
    statistic = lambda site, inputs, g, aux: jnp.zeros(())
    slots = {key: jnp.zeros((*site.outer_stack, 1)) for key, (site, _) in model.plan.sites.items()}
    taps = lambda slots: Taps(slots, {}, None, jnp.zeros(()))
    return lambda slots: run(
        model.plan,
        program,
        leaves,
        taps(slots),
        lambda s: tap(statistic, s, jax.ShapeDtypeStruct((1,), jnp.float64)),
    ), slots


def test_taps_change_nothing_and_keep_checkpoints():
    """The same numbers to the last bit, and a program with the same checkpoints and policies."""

    def model_fn(p, x):
        block = lambda h, w: (jnp.tanh(w @ h), None)
        saved = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
        return jax.checkpoint(jnp.sin)(jax.lax.scan(saved, x[:2], p["w"].reshape(6, 2, 2))[0] + p["b"][:2])

    params = {"w": W, "b": B}
    layers = find(model_fn, params)
    function, slots = _instrumented(layers, params, X[0])
    np.testing.assert_array_equal(jax.jit(function)(slots)[0], jax.jit(model_fn)(params, X[0]))
    text = str(jax.make_jaxpr(function)(slots))
    assert text.count("prevent_cse") == str(jax.make_jaxpr(model_fn)(params, X[0])).count("prevent_cse") == 2
    policies = [
        _jaxprs.checkpoint(e).policy
        for program in (jax.make_jaxpr(function)(slots), jax.make_jaxpr(model_fn)(params, X[0]))
        for scan in program.jaxpr.eqns
        if _jaxprs.kind(scan) == "scan"
        for e in _jaxprs.scan(scan).body.jaxpr.eqns
        if _jaxprs.kind(e) == "checkpoint"
    ]
    assert len(policies) == 2 and type(policies[0]) is type(policies[1])


def test_branches_that_would_be_nan_are_not_counted(key):
    """Each example takes one branch; what the other does with its numbers, infinities even, does not matter."""

    def model_fn(w, x):
        root = lambda: jnp.sqrt(w @ x)
        return jax.lax.cond(jnp.all(w @ x > 0), root, lambda: w @ jnp.sin(x))

    w = jnp.abs(W)
    inputs = jnp.stack([jnp.abs(X[0]), -jnp.abs(X[1]), jnp.abs(X[2])])
    layers = find(model_fn, w)
    cotangents = normal(key, 3, 4)
    moments = cx.capture.statistics(layers, w, inputs, cotangents, cx.capture.SecondMoments())[""]
    counts = sorted(float(m.count[0]) for m in moments)
    # The predicate, which has no derivative, the root of two examples, and the other branch of one.
    assert counts == [0.0, 1.0, 2.0]
    assert all(np.all(np.isfinite(m.inputs)) and np.all(np.isfinite(m.cotangents)) for m in moments)


def test_outputs_that_share_an_example_axis_with_nothing(key):
    """An activation that is the same for all examples still has cotangents of its own for each."""
    model_fn = lambda p, x: jnp.tanh(p["v"] @ jnp.ones(6)) * (p["w"] @ x)
    params = {"v": W, "w": normal(key, 4, 6)}
    agree(model_fn, params, X, key)
    moments = cx.capture.statistics(model_fn, params, X, normal(key, 3, 4), cx.capture.SecondMoments())
    assert float(moments["['v']"][0].count[0]) == 3


def test_comparison_of_these_tests_can_fail(key):
    truth = example_gradients(lambda w, x: w @ x, W, X, normal(key, 3, 4))
    compare(truth, truth, 0.0)
    with pytest.raises(AssertionError):
        compare(1.001 * truth, truth, 1e-5)
