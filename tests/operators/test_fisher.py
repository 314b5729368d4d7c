"""Fisher matrices against dense ones of gradients that are enumerated or written out, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax.operators as ops
from helpers.quick import quick

N, IN, HIDDEN, OUT = 5, 3, 4, 3


def _params(key, dtype=jnp.float64):
    first, second, third = jax.random.split(key, 3)
    return {
        "b": jax.random.normal(first, (HIDDEN,), dtype),
        "step": 3,
        "w1": jax.random.normal(second, (HIDDEN, IN), dtype),
        "w2": jax.random.normal(third, (OUT, HIDDEN), dtype),
    }


def mlp(params, x):
    return params["w2"] @ jnp.tanh(params["w1"] @ x + params["b"])


def _inputs(key, dtype=jnp.float64):
    return jax.random.normal(jax.random.fold_in(key, 9), (N, IN), dtype)


LABELS = jnp.arange(N) % OUT
TARGETS = {
    ops.SquaredError(): jnp.linspace(-1.0, 1.0, N * OUT).reshape(N, OUT),
    ops.SoftmaxCrossEntropy(): LABELS,
    ops.BinaryCrossEntropy(): jnp.arange(N * OUT).reshape(N, OUT) % 2,
    ops.PoissonLoss(): jnp.arange(N * OUT).reshape(N, OUT) % 4,
}


def _gradients(loss, params, inputs, targets):
    """The gradient of each example, (N, n)."""
    arrays = {k: v for k, v in params.items() if k != "step"}
    one = lambda x, y: ravel_pytree(jax.grad(lambda p: loss(mlp(p, x), y))(arrays))[0]
    return np.asarray(quick(jax.vmap(one))(inputs, targets))


@pytest.mark.parametrize("loss", TARGETS, ids=lambda loss: type(loss).__name__)
def test_of_a_generalised_linear_model_all_are_the_hessian(loss, key):
    """Exact Fisher, Gauss–Newton and Hessian are one for a canonical link."""
    x, w = _inputs(key), 0.3 * jax.random.normal(key, (OUT, IN))
    model_fn = lambda w, x: w @ x
    mean = lambda w: jnp.mean(jax.vmap(lambda x, y: loss(w @ x, y))(x, TARGETS[loss]))

    @quick
    def matrices(w):
        arguments = (model_fn, loss, w, x, TARGETS[loss])
        hessian = jax.hessian(mean)(w).reshape(w.size, w.size)
        return ops.fisher(*arguments).as_matrix(), ops.gauss_newton(*arguments).as_matrix(), hessian

    fisher, gauss_newton, hessian = matrices(w)
    np.testing.assert_allclose(fisher, hessian, atol=1e-13)
    np.testing.assert_allclose(gauss_newton, hessian, atol=1e-13)


def test_softmax_is_enumerated(key):
    """E over labels of g gᵀ, label by label, for a model that is not linear; and E g = 0 (Bartlett)."""
    loss, params, x = ops.SoftmaxCrossEntropy(), _params(key), _inputs(key)
    p = np.asarray(jax.vmap(lambda x: jax.nn.softmax(mlp(params, x)))(x))
    truth, mean = 0.0, 0.0
    for label in range(OUT):
        g = _gradients(loss, params, x, jnp.full(N, label))
        truth = truth + np.einsum("n,ni,nj->ij", p[:, label], g, g) / N
        mean = mean + p[:, label, None] * g
    np.testing.assert_allclose(mean, 0, atol=1e-14)
    fisher = quick(lambda x: ops.fisher(mlp, loss, params, x, LABELS).as_matrix())(x)
    np.testing.assert_allclose(fisher, truth, atol=1e-13)


def test_blocks_of_softmax_regression(key):
    """(1/N) Σ (diag(p) − p pᵀ) ⊗ x xᵀ: outputs of one example are coupled."""
    x, w = _inputs(key), jax.random.normal(key, (OUT, IN))
    p = np.asarray(jax.nn.softmax(x @ w.T))
    truth = (
        sum(
            np.kron(np.diag(q) - np.outer(q, q), np.outer(v, v))
            for q, v in zip(p, np.asarray(x), strict=True)
        )
        / N
    )
    fisher = ops.fisher(lambda w, x: w @ x, ops.SoftmaxCrossEntropy(), w, x, LABELS)
    np.testing.assert_allclose(fisher.as_matrix(), truth, atol=1e-14)


@pytest.mark.parametrize("kind", ["empirical", "centred"])
@pytest.mark.parametrize(
    "loss", [ops.SoftmaxCrossEntropy(), lambda z, y: jnp.sum(jnp.abs(z) ** 3) * (1.0 + y.astype(z.dtype))]
)
def test_of_the_data(kind, loss, key):
    params, x = _params(key), _inputs(key)
    g = _gradients(loss, params, x, LABELS)
    g = g - g.mean(0) if kind == "centred" else g
    fisher = ops.fisher(mlp, loss, params, x, LABELS, kind=kind)
    truth = g.T @ g / N
    matrix = quick(lambda x: ops.fisher(mlp, loss, params, x, LABELS, kind=kind).as_matrix())(x)
    np.testing.assert_allclose(matrix, truth, rtol=0, atol=1e-12 * np.abs(truth).max())
    assert lx.is_positive_semidefinite(fisher) and lx.is_symmetric(fisher)


def test_sampled_has_the_exact_one_as_mean(key):
    """Within five standard errors, from 400 independent matrices."""
    loss, params, x = ops.SoftmaxCrossEntropy(), _params(key), _inputs(key)
    exact = ops.fisher(mlp, loss, params, x, LABELS).as_matrix()

    @jax.jit
    @jax.vmap
    def sampled(key):
        return ops.fisher(
            mlp, loss, params, x, LABELS, kind="monte_carlo", num_samples=2, key=key
        ).as_matrix()

    draws = np.asarray(sampled(jax.random.split(key, 400)))
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - exact) <= 5 * error + 1e-12)
    assert np.linalg.matrix_rank(draws[0]) <= 2 * N


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_products_linearised_compiled_and_mapped(dtype, key):
    params, x = _params(key, dtype), _inputs(key, dtype)
    fisher = ops.fisher(mlp, ops.SquaredError(), params, x, jnp.zeros((N, OUT), dtype), kind="centred")
    v = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), fisher.in_structure())
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)

    @eqx.filter_jit
    def products(fisher, v, twice):
        both = jax.vmap(fisher.mv)(twice)
        return [ravel_pytree(tree)[0] for tree in (fisher.mv(v), lx.linearise(fisher).mv(v), both)]

    product, linearised, both = products(fisher, v, twice)
    assert product.dtype == linearised.dtype == dtype
    np.testing.assert_allclose(linearised, product, rtol=1e-4 if dtype == jnp.float32 else 1e-11)
    np.testing.assert_allclose(both.sum(), 3 * product.sum(), rtol=1e-3)
    mean = jax.tree.leaves(fisher.mean)
    assert len(mean) == 3 and all(leaf.dtype == dtype for leaf in mean)


BAD = {
    "kind": (dict(kind="sampled"), "must be one of"),
    "no key": (dict(kind="monte_carlo"), "needs a `key`"),
    "a key for nothing": (dict(key=jax.random.key(0)), "leave it out"),
    "samples for nothing": (dict(num_samples=2), "num_samples"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, key):
    options, message = BAD[name]
    for maker in (ops.fisher, ops.kfac, ops.ekfac):
        if maker is not ops.fisher and "num_samples" in options:
            continue
        with pytest.raises(ValueError, match=message):
            maker(mlp, ops.SoftmaxCrossEntropy(), _params(key), _inputs(key), LABELS, **options)


def test_likelihoods_are_asked_for(key):
    plain = lambda z, y: jnp.sum(z**2)
    for kind, options in (("exact", {}), ("monte_carlo", {"key": key})):
        with pytest.raises(ValueError, match="likelihood"):
            ops.fisher(mlp, plain, _params(key), _inputs(key), LABELS, kind=kind, **options)
    with pytest.raises(ValueError, match="leading axis"):
        ops.fisher(mlp, plain, _params(key), _inputs(key), LABELS[:2], kind="empirical")
    with pytest.raises(ValueError, match="floating-point"):
        ops.fisher(mlp, plain, {"w": jnp.arange(3)}, _inputs(key), LABELS, kind="empirical")
