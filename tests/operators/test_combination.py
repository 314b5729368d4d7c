"""Convex combinations against dense sums, and their definiteness."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax as cx
from curvax.operators import ConvexCombination, Damped, LowRankPlusDiagonal, lowest_curvature

SYMMETRIC, PSD = lx.symmetric_tag, lx.positive_semidefinite_tag
NSD = lx.negative_semidefinite_tag
N = 5


def _tree(vector, dtype):
    flat = jnp.asarray(vector, dtype)
    return {"b": flat[0], "e": jnp.zeros((0,), dtype), "w": flat[1:].reshape(2, 2)}


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _parts(rng, dtype):
    """A function over a tree, a diagonal and a structure, with their dense matrices."""
    root, u = rng.standard_normal((N, N)), rng.standard_normal((N, 2))
    d = rng.uniform(0.5, 2, N)
    columns = {"b": u[0], "e": np.zeros((0, 2)), "w": u[1:].reshape(2, 2, 2)}
    dense = jnp.asarray(root + root.T, dtype)

    def product(v):
        return _tree(jnp.matmul(dense, jnp.concatenate([v["b"][None], v["w"].reshape(-1)])), dtype)

    like = jax.eval_shape(lambda: _tree(np.zeros(N), dtype))
    return {
        "hessian": (lx.FunctionLinearOperator(product, like, SYMMETRIC), root + root.T),
        "diagonal": (
            lx.TaggedLinearOperator(lx.DiagonalLinearOperator(_tree(d, dtype)), PSD),
            np.diag(d),
        ),
        "low rank": (
            LowRankPlusDiagonal(
                jnp.asarray(0.3, dtype), jax.tree.map(lambda x: jnp.asarray(x, dtype), columns), tags=PSD
            ),
            0.3 * np.eye(N) + u @ u.T,
        ),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_transposes_trace_and_diagonal(dtype, rng):
    tolerance = 1e-12 if dtype == np.float64 else 2e-5
    parts = _parts(rng, dtype)
    weights = [0.5, 0.2, 0.3]
    mix = ConvexCombination([part for part, _ in parts.values()], weights)
    truth = sum(w * dense for w, (_, dense) in zip(weights, parts.values(), strict=True))
    vector = rng.standard_normal(N)
    traces = []

    @eqx.filter_jit
    def everything(mix, vector):
        traces.append(None)
        out = mix.mv(vector)
        return (
            out,
            [op.as_matrix() for op in (mix, mix.T, lx.linearise(mix))],
            (mix.trace(), lx.diagonal(mix)),
        )

    for factor in (1.0, 2.0):
        out, matrices, (trace, diagonal) = everything(mix, _tree(factor * vector, dtype))
    assert len(traces) == 1
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(out))
    np.testing.assert_allclose(_flat(out), truth @ (2 * vector), atol=10 * tolerance)
    for matrix in matrices:
        np.testing.assert_allclose(matrix, truth, atol=tolerance)
    np.testing.assert_allclose(trace, np.trace(truth), atol=tolerance)
    np.testing.assert_allclose(diagonal, np.diag(truth), atol=tolerance)
    assert lx.is_symmetric(mix) and not lx.is_positive_semidefinite(mix)


def test_tags_are_those_of_all_parts(rng):
    root = rng.standard_normal((N, N))
    general = lx.MatrixLinearOperator(jnp.asarray(root))
    positive = lx.MatrixLinearOperator(jnp.asarray(root @ root.T), PSD)
    negative = lx.MatrixLinearOperator(jnp.asarray(-root @ root.T), NSD)
    diagonal = lx.DiagonalLinearOperator(jnp.ones(N))
    half = (0.5, 0.5)
    assert lx.is_positive_semidefinite(ConvexCombination((positive, positive), half))
    assert lx.is_symmetric(ConvexCombination((positive, positive), half))
    assert lx.is_negative_semidefinite(ConvexCombination((negative, negative), half))
    mixed = ConvexCombination((positive, negative), half)
    assert lx.is_symmetric(mixed) and not lx.is_positive_semidefinite(mixed)
    assert not lx.is_negative_semidefinite(mixed)
    assert not lx.is_symmetric(ConvexCombination((positive, general), half))
    assert lx.is_diagonal(ConvexCombination((diagonal, diagonal), half))
    assert lx.is_positive_semidefinite(ConvexCombination((mixed, positive), half, PSD))
    transposed = ConvexCombination((general, positive), half).T
    np.testing.assert_allclose(transposed.as_matrix(), 0.5 * (root.T + root @ root.T), atol=1e-12)


def test_inverse_only_of_a_single_part_and_solvers_know(rng):
    parts = _parts(rng, np.float64)
    single, dense = parts["low rank"]
    one = ConvexCombination((single,), (1.0,))
    np.testing.assert_allclose(one.inverse().as_matrix(), np.linalg.inv(dense), atol=1e-11)
    np.testing.assert_allclose(one.logdet(), np.linalg.slogdet(dense)[1])
    assert isinstance(one.damped(0.1), LowRankPlusDiagonal)
    both = ConvexCombination((single, parts["diagonal"][0]), (0.4, 0.6))
    truth = 0.4 * dense + 0.6 * parts["diagonal"][1]
    for method in (both.inverse, both.logdet, both.damped(0.1).inverse):
        with pytest.raises(ValueError, match=r"(inverse|logdet)\(\) of `(ConvexCombination|Damped)`"):
            method()
    b = rng.standard_normal(N)
    for operator, matrix in ((both, truth), (Damped(both, 0.5), truth + 0.5 * np.eye(N))):
        found = lx.linear_solve(operator, _tree(b, np.float64), cx.linear.Auto(rtol=1e-12)).value
        np.testing.assert_allclose(_flat(found), np.linalg.solve(matrix, b), rtol=1e-8)


def test_weights_may_be_traced_and_differentiated(rng):
    a, b = (rng.standard_normal((N, N)) for _ in range(2))
    v = rng.standard_normal(N)
    parts = (lx.MatrixLinearOperator(jnp.asarray(a)), lx.MatrixLinearOperator(jnp.asarray(b)))

    def value(alpha):
        mix = ConvexCombination(parts, [alpha, 1 - alpha])
        return jnp.sum(mix.mv(jnp.asarray(v)) ** 2) + mix.trace()

    @jax.jit
    @jax.vmap
    def everything(alpha):
        return value(alpha), jax.grad(value)(alpha), jax.grad(jax.grad(value))(alpha)

    alphas = np.array([0.2, 0.7])
    found = everything(jnp.asarray(alphas))
    difference = (a - b) @ v
    mixed = np.stack([alpha * a + (1 - alpha) * b for alpha in alphas])
    np.testing.assert_allclose(found[0], [np.sum((m @ v) ** 2) + np.trace(m) for m in mixed])
    np.testing.assert_allclose(found[1], [2 * difference @ m @ v + np.trace(a - b) for m in mixed])
    np.testing.assert_allclose(found[2], 2 * difference @ difference)


def test_the_weight_of_a_single_part_is_one():
    """Also where it is traced and cannot be refused: product and inverse belong together."""
    part, v = lx.MatrixLinearOperator(jnp.diag(jnp.arange(1.0, 4.0))), jnp.ones(3)

    @jax.jit
    def there_and_back(weight):
        mix = ConvexCombination([part], [weight])
        return mix.inverse().mv(mix.mv(v)), mix.logdet()

    found, logdet = there_and_back(2.0)
    np.testing.assert_allclose(found, v)
    np.testing.assert_allclose(logdet, np.log(6.0))


def test_definiteness_of_a_mix_is_found_with_proof(rng):
    """H = diag(1, −1) has condition number 1 and gᵀHg > 0 for g = e₁; the mix with a Fisher turns definite at ½."""
    hessian = lx.DiagonalLinearOperator(jnp.r_[jnp.linspace(0.5, 1, 30), -1.0])
    hessian = lx.TaggedLinearOperator(hessian, SYMMETRIC)
    fisher = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(jnp.ones(31)), PSD)

    @eqx.filter_jit
    def find(alpha, key):
        return lowest_curvature(ConvexCombination((hessian, fisher), [alpha, 1 - alpha]), key=key)

    for alpha, definite in ((0.4, True), (0.5, None), (0.6, False)):
        found = find(jnp.asarray(alpha), jax.random.key(1))
        np.testing.assert_allclose(found.value, 1 - 2 * alpha, atol=1e-12)
        assert bool(found.is_definite) == (definite is True)
        assert bool(found.is_indefinite) == (definite is False)
        np.testing.assert_allclose(np.abs(found.direction)[-1], 1, atol=1e-6)
        assert found.residual < 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_of_the_lowest_eigenvalue_hold_in_distribution(dtype, key):
    """On spectra of every kind: from above always, from below as often as said; NaN stays NaN."""
    eps = np.finfo(dtype).eps
    spectra = {
        "flat bottom": np.r_[np.zeros(100), np.ones(100)],
        "isolated": np.r_[-1.0, np.linspace(0, 1, 199)],
        "dense": np.linspace(-1, 1, 200) ** 3,
        "scales": np.logspace(-8, 0, 200),
    }

    @jax.jit
    def find(values, keys):
        operator = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(values), SYMMETRIC)
        one = lambda k: lowest_curvature(operator, key=k, num_steps=20, confidence=0.9)
        return jax.vmap(one)(keys)

    keys = jax.random.split(key, 50)
    for name, values in spectra.items():
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), find(jnp.asarray(values, dtype), keys))
        assert (found.value >= values.min() - 50 * eps).all(), name
        assert (found.largest <= values.max() + 50 * eps).all(), name
        # Conservative by far: that it fails in more than a tenth of 50 would be chance of 1e-3 even if it were sharp.
        assert np.mean(found.lower > values.min() + 50 * eps) <= 0.25, name
        assert np.isfinite(found.lower).all() and (found.lower <= found.value).all()
        rows = found.direction
        np.testing.assert_allclose(np.sum(rows**2 * values, axis=1), found.value, atol=100 * eps)
        assert not np.any(found.is_definite) or values.min() > 0
    assert np.isnan(find(jnp.full(200, jnp.nan, dtype), keys[:1]).value).all()
    few = lowest_curvature(lx.DiagonalLinearOperator(jnp.arange(1.0, 201.0)), key=key, num_steps=3)
    assert float(few.lower) == -np.inf and not few.is_definite and not few.is_indefinite


_EYE = ((2.0, 1.0), (1.0, 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, k: ConvexCombination((), ()), "`operators` of `ConvexCombination` holds none"),
        (lambda a, k: ConvexCombination((a, jnp.eye(2)), (0.5, 0.5)), r"`operators\[1\]`.*must be a Lineax operator"),
        (lambda a, k: ConvexCombination((a, a), (0.5,)), "must be 2 numbers, one for each operator"),
        (lambda a, k: ConvexCombination((a, a), (1.5, -0.5)), r"at least 0 and add up to 1, found \[1.5, -0.5\]"),
        (lambda a, k: ConvexCombination((a, a), jnp.ones(2)), "with the sum 2.0"),
        (lambda a, k: jax.jit(lambda: ConvexCombination((a, a), (0.5, 0.6)).trace())(), "with the sum 1.1"),
        (lambda a, k: jax.jit(lambda: ConvexCombination((a, a), np.ones(2)).trace())(), "with the sum 2.0"),
        (lambda a, k: ConvexCombination((a,), (jnp.ones(1),)), "must be 1 numbers"),
        (lambda a, k: ConvexCombination((a, a), (float("nan"), 1.0)), "at least 0"),
        (
            lambda a, k: ConvexCombination((a, lx.DiagonalLinearOperator(jnp.ones(3))), (0.5, 0.5)),
            r"`operators\[1\]` of `ConvexCombination` must take vectors",
        ),
        (
            lambda a, k: ConvexCombination((a, lx.DiagonalLinearOperator(jnp.ones(2, jnp.float32))), (0.5, 0.5)),
            r"`operators\[1\]` of `ConvexCombination` must take vectors",
        ),
        (lambda a, k: lowest_curvature(lx.MatrixLinearOperator(jnp.eye(2)), key=k), "tagged `lx.symmetric_tag`"),
        (lambda a, k: lowest_curvature(a, key=k, num_steps=0), "`num_steps`.*found 0"),
        (lambda a, k: lowest_curvature(a, key=k, confidence=1.0), "`confidence`.*found 1.0"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(lx.MatrixLinearOperator(jnp.asarray(_EYE), PSD), key)
