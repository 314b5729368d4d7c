"""Optimisers on the models that people have: Equinox, Flax, scans, remat, tied weights; and what is no layer."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import curvax as cx
from curvax.optim import Factors
from helpers.quick import quick
from helpers.training import EMPIRICAL, FIXED, SOFTMAX, SQUARED, normal, objective, stepper


def equinox_model(key):
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(1, 3, 3, key=key),
            eqx.nn.LayerNorm((3, 4)),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(12, 2, key=key),
        ]
    )
    return lambda model, x: model(x), model, (1, 6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.LayerNorm()(nn.tanh(nn.Dense(4)(x))))


def linen_model(key):
    module = Linen()
    params = module.init(key, jnp.ones(6, jnp.float32))["params"]
    return lambda params, x: module.apply({"params": params}, x.astype(jnp.float32)), params, (6,)


def nnx_model(key):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 4, rngs=rngs, param_dtype=jnp.float64)
            self.out = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    structure, state = nnx.split(Network(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(structure, state)(x), state, (6,)


def scanned_model(key):
    """A stack of layers under remat, and a table that is used as it is and transposed."""
    table, layers, biases = normal(key, (2, 6), (3, 6, 6), (3, 6))
    params = {"table": 0.4 * table, "layers": 0.5 * layers, "biases": 0.1 * biases}

    def block(x, layer):
        w, b = layer
        return x + jnp.tanh(w @ x + b), None

    def model_fn(params, x):
        x = params["table"].T @ (params["table"] @ x)
        x, _ = jax.lax.scan(jax.checkpoint(block), x, (params["layers"], params["biases"]))
        return params["table"] @ x

    return model_fn, params, (6,)


def embedding_model(key):
    table, w = normal(key, (5, 4), (2, 4))

    def model_fn(params, x):
        return params["w"] @ jnp.tanh(jnp.mean(params["table"][x], axis=0))

    return model_fn, {"table": table, "w": w}, None


MODELS = {
    "equinox": equinox_model,
    "linen": linen_model,
    "nnx": nnx_model,
    "scanned": scanned_model,
    "embedding": embedding_model,
}


# A network of flax.nnx is on the page about optimisers, which runs.
EVERY_DAY = [pytest.param(name, marks=pytest.mark.thorough if name == "nnx" else ()) for name in MODELS]


@pytest.mark.parametrize("name", EVERY_DAY)
def test_trains(name, key):
    """Every adaptive feature on; a few steps on one batch bring the objective down, and nothing goes wrong."""
    model_fn, params, shape = MODELS[name](key)
    x = normal(key, (16, *shape))[0] if shape else jax.random.randint(key, (16, 3), 0, 5)
    y = jnp.arange(16) % 2
    optimiser = (cx.optim.ekfac if name == "linen" else cx.optim.kfac)(model_fn, SOFTMAX, example=x[0])
    step, state = stepper(optimiser, model_fn, SOFTMAX), optimiser.init(params)
    before = float(objective(model_fn, SOFTMAX, params, x, y))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    for number in range(8):
        params, state, _, _ = step(params, state, x, y, jax.random.fold_in(key, number))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) == shapes
    after = float(objective(model_fn, SOFTMAX, params, x, y))
    assert after < 0.8 * before
    report = cx.optim.report(state)
    assert report.healthy, report
    if name == "scanned":
        assert state.curvature.factors["['layers']"][0].shape == (3, 6, 6)
        assert state.curvature.factors["['layers']"][1].shape == (3, 7, 7)
    if name == "equinox":  # a norm layer has diagonals
        kinds = {row.block: row.factors for row in report.rows}
        assert [kind for block, kind in kinds.items() if "[1]" in block] == ["diagonal", "diagonal"]


def test_a_scan_is_its_layers(key):
    """The same network with a scan and written out: the same steps."""
    w, b, x, y = normal(key, (2, 3, 3), (2, 3), (8, 3), (8, 3))

    def scanned(params, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(layer[0] @ x + layer[1]), None), x, params)[0]

    def unrolled(params, x):
        for w, b in zip(*params, strict=True):
            x = jnp.tanh(w @ x + b)
        return x

    found = []
    for model_fn, params in ((scanned, (w, b)), (unrolled, (list(w), list(b)))):
        optimiser = cx.optim.kfac(model_fn, SQUARED, example=x[0], factors=EMPIRICAL)
        step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(params)
        for _ in range(2):
            params, state, _, _ = step(params, state, x, y)
        found.append(np.asarray(jnp.stack(list(params[0]))))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)


def test_what_is_no_layer_is_diagonal_or_first_order(key):
    """A temperature has a diagonal; weights that the data look up have steps of first order, and the report says so."""
    w, experts, x, y = normal(key, (3, 4), (5, 2, 3), (8, 4), (8, 2))

    def model_fn(params, x):
        hidden = jnp.tanh(params["w"] @ x) / params["temperature"]
        return params["experts"][jnp.argmax(x[:4])] @ hidden

    params = {"w": w, "experts": experts, "temperature": jnp.array(2.0)}
    optimiser = cx.optim.kfac(model_fn, SQUARED, 1.0, example=x[0], damping=FIXED, factors=EMPIRICAL)
    step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(params)
    _, state, updates, grads = step(params, state, x, y)
    kinds = {row.block: row.factors for row in cx.optim.report(state).rows}
    assert kinds["['temperature']"] == "diagonal" and kinds["['experts']"] == "first order"
    assert not cx.optim.report(state).healthy and "first order" in str(cx.optim.report(state))
    of_one = jax.grad(lambda t, x, y: SQUARED(model_fn(params | {"temperature": t}, x), y))
    squares = jnp.mean(quick(jax.vmap(of_one, (None, 0, 0)))(params["temperature"], x, y) ** 2)
    np.testing.assert_allclose(updates["temperature"], -grads["temperature"] / (squares + 0.05), rtol=1e-9)
    ratio = updates["experts"] / jnp.where(grads["experts"] == 0, jnp.nan, grads["experts"])
    scale = float(jnp.nanmean(ratio))
    np.testing.assert_allclose(updates["experts"], scale * grads["experts"], rtol=1e-9)
    assert -1 / 0.05 < scale < 0


def test_masked_positions_do_not_count(key):
    """Padding, whatever it holds, changes neither the factors nor the step."""
    w, v, x = normal(key, (4, 3), (2, 4), (6, 5, 3))
    labels = jnp.where(jnp.arange(5) < 3, jnp.arange(30).reshape(6, 5) % 2, -1)
    model_fn = lambda params, x: jnp.tanh(x @ params["w"].T) @ params["v"].T
    optimiser = cx.optim.kfac(model_fn, SOFTMAX, example=x[0], factors=EMPIRICAL)
    params = {"w": w, "v": v}
    step, state = stepper(optimiser, model_fn, SOFTMAX), optimiser.init(params)
    once = step(params, state, x, labels)[2]
    other = step(params, state, jnp.where(labels[..., None] < 0, 7.0, x), labels)[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), once, other)


def test_a_fraction_of_the_batch_in_turns(key):
    """Each step measures another part of the batch; the plain mean of all parts is that of the batch."""
    w, x, y = normal(key, (2, 3), (8, 3), (8, 2))
    model_fn = lambda w, x: w @ x
    factors = Factors("empirical", fraction=0.25, decay=0.99)
    optimiser = cx.optim.kfac(model_fn, SQUARED, 1.0, example=x[0], factors=factors)
    step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(w)
    for _ in range(4):
        _, state, _, _ = step(w, state, x, y)
    residual = x @ w.T - y
    rows, columns = next(iter(state.curvature.factors.values()))
    np.testing.assert_allclose(columns[0], x.T @ x / 8, rtol=1e-10)
    np.testing.assert_allclose(rows[0], residual.T @ residual / 8, rtol=1e-10)
