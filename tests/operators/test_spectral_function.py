"""Positive parts and absolute values against dense eigendecompositions, by structure and by Lanczos."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from curvax.operators import absolute_value, positive_part

SYMMETRIC, PSD = lx.symmetric_tag, lx.positive_semidefinite_tag
MAKERS = {"positive": positive_part, "absolute": absolute_value}
FLOOR = 0.3


def _truth(matrix, which, floor=FLOOR, power=1.0):
    values, vectors = np.linalg.eigh(matrix)
    base = np.maximum(np.abs(values) if which == "absolute" else values, floor)
    return (vectors * base**power) @ vectors.T


def _symmetric(rng, n):
    root = rng.standard_normal((n, n))
    return root + root.T


def _structures(rng):
    """Operators with eigenvalues of both signs, and what each must become."""
    matrix = lambda n: lx.MatrixLinearOperator(jnp.asarray(_symmetric(rng, n)), SYMMETRIC)
    kronecker = ops.Kronecker(matrix(2), matrix(3))
    column = jnp.asarray([0.5, 1.0, -0.7, -0.7, 1.0])
    low = jnp.asarray(rng.standard_normal((6, 3))).at[:, 2].set(0)
    tree = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(-0.1)}
    blocks = {"k": kronecker, "m": matrix(3), "none": None, "d": lx.DiagonalLinearOperator(tree)}
    like = jax.ShapeDtypeStruct((2, 2), jnp.float64)
    dense = jnp.asarray(_symmetric(rng, 4))
    function = lambda v: jnp.matmul(dense, v.reshape(-1)).reshape(2, 2)
    return {
        "kronecker": (kronecker, ops.EigenKronecker),
        "damped kronecker": (ops.Damped(kronecker, 0.5), ops.EigenKronecker),
        "one term": (ops.KroneckerSum(kronecker), ops.EigenKronecker),
        "circulant": (ops.Circulant(column, SYMMETRIC), ops.Circulant),
        "low rank": (ops.LowRankPlusDiagonal(jnp.asarray(-0.8), low), ops.LowRankPlusDiagonal),
        "diagonal": (lx.DiagonalLinearOperator(tree), ops.Damped),
        "identity": (lx.IdentityLinearOperator(like), ops.Damped),
        "blocks": (ops.BlockDiagonal(blocks, SYMMETRIC), ops.BlockDiagonal),
        "function": (lx.FunctionLinearOperator(function, like, SYMMETRIC), None),
        "tagged": (lx.TaggedLinearOperator(lx.MatrixLinearOperator(dense), SYMMETRIC), None),
        "zero": (lx.MatrixLinearOperator(jnp.zeros((3, 3)), SYMMETRIC), None),
    }


@pytest.mark.parametrize("which", MAKERS)
def test_exact_by_structure(which, rng):
    cases = _structures(rng)
    kinds = {}

    @eqx.filter_jit
    def everything(operators):
        found = {}
        for name, operator in operators.items():
            part = MAKERS[which](operator, FLOOR)
            kinds[name] = type(part)
            for what in (part, part.inverse(), part.transpose(), part.damped(0.2)):
                assert lx.is_positive_semidefinite(what) and lx.is_symmetric(what), name
            found[name] = (
                ops.Damped(operator, 0.0).as_matrix(),
                part.as_matrix(),
                part.inverse().as_matrix(),
                part.damped(0.2).inverse().as_matrix(),
                (part.trace(), part.logdet(), lx.diagonal(part)),
            )
        return found

    found = everything({name: operator for name, (operator, _) in cases.items()})
    for name, (_, kind) in cases.items():
        assert kind is None or kinds[name] is kind, name
        matrix, part, inverse, damped, (trace, logdet, diagonal) = found[name]
        truth = _truth(np.asarray(matrix), which)
        check = lambda x, y, name=name: np.testing.assert_allclose(x, y, atol=1e-11, err_msg=name)
        check(part, truth)
        check(inverse, np.linalg.inv(truth))
        check(damped, np.linalg.inv(truth + 0.2 * np.eye(len(truth))))
        check(trace, np.trace(truth)), check(diagonal, np.diag(truth))
        check(logdet, np.linalg.slogdet(truth)[1])


def test_dense_powers_dampings_and_dtypes(rng):
    matrix = _symmetric(rng, 4)
    for dtype, tolerance in ((np.float32, 5e-5), (np.float64, 1e-11)):
        operator = lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), SYMMETRIC)
        part = absolute_value(operator, FLOOR)
        truth = _truth(matrix, "absolute")
        values, vectors = np.linalg.eigh(truth)
        power = lambda p, values=values, vectors=vectors: (vectors * values**p) @ vectors.T
        assert part.as_matrix().dtype == dtype and part.mv(jnp.ones(4, dtype)).dtype == dtype
        np.testing.assert_allclose(part.power(0.5).as_matrix(), power(0.5), atol=tolerance)
        np.testing.assert_allclose(part.inverse().power(-2).as_matrix(), power(2), atol=50 * tolerance)
        np.testing.assert_allclose(part.inverse().logdet(), -np.linalg.slogdet(truth)[1], atol=10 * tolerance)
        moved = part.inverse().damped(0.5)
        np.testing.assert_allclose(moved.as_matrix(), power(-1) + 0.5 * np.eye(4), atol=tolerance)
    with pytest.raises(ValueError, match=r"inverse\(\) of `Damped`"):
        moved.inverse()


def test_floor_zero_nan_and_rounding():
    """A rounding error below zero counts as zero, and what is then singular has no plausible inverse."""
    tiny = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, -1e-8, -3.0])), SYMMETRIC)
    np.testing.assert_allclose(positive_part(tiny, 0.5).inverse().as_matrix(), np.diag([1, 2, 2.0]))
    singular = positive_part(tiny)
    np.testing.assert_allclose(singular.as_matrix(), np.diag([1.0, 0, 0]), atol=1e-15)
    assert not np.isfinite(singular.inverse().mv(jnp.ones(3))).all()
    assert float(singular.logdet()) == -np.inf
    bad = lx.MatrixLinearOperator(jnp.eye(3).at[0, 0].set(jnp.nan), SYMMETRIC)
    assert np.isnan(positive_part(bad, 0.1).mv(jnp.ones(3))).all()
    value, error = positive_part(bad, 0.1, method="lanczos", num_steps=3).product(jnp.ones(3))
    assert np.isnan(value).all() and np.isnan(error)
    value, error = positive_part(tiny, 0.1, method="lanczos", num_steps=3).product(jnp.zeros(3))
    assert not np.any(value) and float(error) == 0


@pytest.mark.parametrize("which", MAKERS)
def test_derivatives_also_where_eigenvalues_are_equal(which, rng):
    """Against central differences of NumPy; eigh's own derivative is NaN at I."""
    direction = _symmetric(rng, 4)
    basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    b, w = rng.standard_normal(4), rng.standard_normal(4)

    @jax.jit
    def with_gradient(matrix, floor):
        def value(matrix, floor, power):
            part = MAKERS[which](lx.MatrixLinearOperator(matrix, SYMMETRIC), floor)
            part = part.power(power) if power != 1 else part
            return w @ part.mv(jnp.asarray(b)) + part.trace()

        return [jax.value_and_grad(value, (0, 1))(matrix, floor, p) for p in (1, -1, 0.5)]

    for values in (
        [1.0, 1.0, 1.0, 1.0],
        [2.0, 0.1, 2.0, -1.5],
        [-1.0, -1.0, 0.1, 1.0],
        [3.0, -2.0, -0.2, 0.2],
    ):
        matrix = basis * np.asarray(values) @ basis.T
        truth = lambda t, s, p, m=matrix: (
            w @ _truth(m + t * direction, which, FLOOR + s, p) @ b
            + np.trace(_truth(m + t * direction, which, FLOOR + s, p))
        )
        for p, (value, (grad, slope)) in zip(
            (1, -1, 0.5), with_gradient(jnp.asarray(matrix), FLOOR), strict=True
        ):
            np.testing.assert_allclose(value, truth(0, 0, p), rtol=1e-10)
            difference = (truth(1e-5, 0, p) - truth(-1e-5, 0, p)) / 2e-5
            np.testing.assert_allclose(np.sum(np.asarray(grad) * direction), difference, rtol=2e-6, atol=1e-7)
            difference = (truth(0, 1e-5, p) - truth(0, -1e-5, p)) / 2e-5
            np.testing.assert_allclose(slope, difference, rtol=2e-6, atol=1e-7)


def test_second_derivative_and_one_compilation(rng):
    matrix, direction = _symmetric(rng, 4), _symmetric(rng, 4)
    traces = []

    @jax.jit
    @jax.vmap
    def second(t):
        traces.append(None)
        operator = lambda t: lx.MatrixLinearOperator(jnp.asarray(matrix) + t * direction, SYMMETRIC)
        return jax.grad(jax.grad(lambda t: absolute_value(operator(t), FLOOR).as_matrix()[0, 1]))(t)

    truth = lambda t: _truth(matrix + t * direction, "absolute")[0, 1]
    for ts in (np.array([0.0, 0.01]), np.array([0.1, 0.02])):
        difference = [(truth(t + 1e-4) - 2 * truth(t) + truth(t - 1e-4)) / 1e-8 for t in ts]
        np.testing.assert_allclose(second(jnp.asarray(ts)), difference, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


SPECTRA = {
    "dense": np.linspace(-1, 1, 300),
    "gap": np.r_[np.linspace(-1, -0.3, 50), np.linspace(0.3, 1, 250)],
    "many scales": np.r_[-np.logspace(-6, -1, 80), np.logspace(-6, 0, 220)],
    "few negative": np.r_[-0.1 * np.ones(3), np.logspace(-4, 0, 297)],
    "clusters": np.repeat([-1.0, -0.1, 0.01, 1.0], 75),
}


@pytest.mark.parametrize("which", MAKERS)
def test_lanczos_error_estimate(which, rng):
    """Never below the error, seldom far above where that falls slowly; exact once the Krylov space is exhausted."""

    @eqx.filter_jit
    def products(values, vectors, steps, inverted):
        operator = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(values), SYMMETRIC)
        function = MAKERS[which](operator, 0.01, method="lanczos", num_steps=steps)
        assert lx.is_positive_semidefinite(function) and lx.is_symmetric(function)
        return jax.vmap((function.inverse() if inverted else function).product)(vectors)

    for steps, inverted in ((12, False), (12, True), (40, False)):
        for name, values in SPECTRA.items():
            vectors = rng.standard_normal((10, 300))
            found, error = products(jnp.asarray(values), jnp.asarray(vectors), steps, inverted)
            base = np.maximum(np.abs(values) if which == "absolute" else values, 0.01)
            truth = np.linalg.norm(vectors * (1 / base if inverted else base) - found, axis=1)
            ratio = np.asarray(error) / truth
            assert ratio.min() >= 0.9, (name, steps, inverted, ratio)
            if name == "clusters":
                assert np.max(error / np.linalg.norm(found, axis=1)) < 1e-12
            elif name != "gap":
                assert np.median(ratio) < 15, (name, steps, inverted, ratio)
            if name == "gap" and steps == 40:
                assert np.max(truth) < 1e-6, "exponential where there is a gap"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lanczos_on_trees_is_the_exact_one_at_full_steps(dtype, rng):
    matrix = _symmetric(rng, 6)
    like = {"a": jax.ShapeDtypeStruct((2, 2), dtype), "b": jax.ShapeDtypeStruct((2,), dtype)}
    m = jnp.asarray(matrix, dtype)

    def product(v):
        out = jnp.matmul(m, jnp.concatenate([v["a"].reshape(-1), v["b"]]), precision="highest")
        return {"a": out[:4].reshape(2, 2), "b": out[4:]}

    operator = lx.FunctionLinearOperator(product, like, SYMMETRIC)
    part = positive_part(operator, FLOOR, method="lanczos", num_steps=100)
    vector = {"a": jnp.ones((2, 2), dtype), "b": jnp.ones(2, dtype)}

    @jax.jit
    def everything(vector):
        return part.product(vector), lx.diagonal(part), part.inverse().as_matrix()

    (out, error), diagonal, inverse = everything(vector)
    eps, truth = np.finfo(dtype).eps, _truth(matrix, "positive")
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(out) == shapes(like) and float(error) < 1000 * eps
    np.testing.assert_allclose(np.r_[out["a"].ravel(), out["b"]], truth @ np.ones(6), atol=100 * eps)
    np.testing.assert_allclose(diagonal, np.diag(truth), atol=100 * eps)
    np.testing.assert_allclose(inverse, np.linalg.inv(truth), atol=400 * eps)


def test_lanczos_is_linear_to_jax_and_refuses_derivatives_in_the_operator(rng):
    n = 30
    matrix = jnp.asarray(np.diag(np.linspace(-1, 1, n)))
    b, w = jnp.asarray(rng.standard_normal(n)), jnp.asarray(rng.standard_normal(n))

    def value(matrix, floor, v):
        operator = lx.MatrixLinearOperator(matrix, SYMMETRIC)
        return w @ absolute_value(operator, floor, method="lanczos", num_steps=n).mv(v)

    truth = _truth(np.asarray(matrix), "absolute") @ w
    np.testing.assert_allclose(jax.jit(jax.grad(lambda v: value(matrix, FLOOR, v)))(b), truth, atol=1e-10)
    with pytest.raises(ValueError, match="differentiable in the vector only"):
        jax.grad(lambda t: value(t * matrix, FLOOR, b))(1.0)
    with pytest.raises(ValueError, match="differentiable in the vector only"):
        jax.grad(lambda f: value(matrix, f, b))(FLOOR)

    def hidden(t):
        like = jax.ShapeDtypeStruct((n,), jnp.float64)
        operator = lx.FunctionLinearOperator(lambda v: t * jnp.matmul(matrix, v), like, SYMMETRIC)
        return w @ positive_part(operator, FLOOR, method="lanczos", num_steps=4).mv(b)

    with pytest.raises(ValueError, match="differentiable in the vector only"):
        jax.grad(hidden)(1.0)


def test_size_limit_is_said_out_loud():
    like = jax.ShapeDtypeStruct((5000,), jnp.float32)
    large = lx.FunctionLinearOperator(lambda v: 2 * v, like, SYMMETRIC)
    with pytest.raises(ValueError, match=r"5000 rows, over the limit of 4096.*method=\"lanczos\""):
        positive_part(large, 0.1)
    value, _ = positive_part(large, 0.1, method="lanczos", num_steps=2).product(jnp.ones(5000, jnp.float32))
    np.testing.assert_allclose(value, 2, rtol=1e-5)
    # A structure needs no limit.
    circulant = ops.Circulant(jnp.zeros(5000).at[0].set(-2.0), SYMMETRIC)
    np.testing.assert_allclose(absolute_value(circulant).mv(jnp.ones(5000)), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: positive_part(lx.MatrixLinearOperator(a.matrix)), "must be square and tagged"),
        (lambda a: positive_part(a, -0.1), "`floor` of `positive_part`.*found -0.1"),
        (lambda a: positive_part(a, float("nan")), "`floor`.*nan"),
        (lambda a: absolute_value(a, jnp.ones(2)), "`floor` of `absolute_value` must be a scalar"),
        (lambda a: positive_part(a, method="lanczos"), "needs `num_steps`"),
        (lambda a: positive_part(a, method="lanczos", num_steps=1), "`num_steps`.*at least 2, found 1"),
        (lambda a: positive_part(a, num_steps=4), "belongs to `method=\"lanczos\"`"),
        (lambda a: positive_part(a, method="dense"), "`method`.*found 'dense'"),
        (lambda a: positive_part(a, method="lanczos", num_steps=4).inverse(), "needs a `floor` above 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(lx.MatrixLinearOperator(jnp.eye(4), SYMMETRIC))
