"""Each operator against dense matrices made by other means: NumPy formulas and finite differences."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from curvax.operators._dense import MAX_DENSE_ELEMENTS


def _softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _logistic_hessian(weights, x):
    """Mean over examples of x xᵀ ⊗ (diag p − ppᵀ), for row-major weights (features, classes)."""
    p = _softmax(x @ weights)
    curved = np.einsum("ni,ij->nij", p, np.eye(p.shape[1])) - np.einsum("ni,nj->nij", p, p)
    size = weights.size
    return np.einsum("na,nb,nij->aibj", x, x, curved).reshape(size, size) / len(x)


def _cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hessian_and_gauss_newton_of_softmax_regression(dtype, rng):
    x = rng.standard_normal((9, 3))
    weights = rng.standard_normal((3, 4))
    labels = rng.integers(0, 4, 9)
    truth = _logistic_hessian(weights, x)
    xs, ws, ys = jnp.asarray(x, dtype), jnp.asarray(weights, dtype), jnp.asarray(labels)

    def loss(w):
        return jnp.mean(jax.vmap(_cross_entropy)(xs @ w, ys))

    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    hessian = ops.hessian(loss, ws)
    gauss_newton = ops.gauss_newton(lambda w, x: x @ w, _cross_entropy, ws, xs, ys)
    for operator in (hessian, gauss_newton, lx.linearise(hessian), lx.linearise(gauss_newton)):
        matrix = operator.as_matrix()
        assert matrix.dtype == dtype
        np.testing.assert_allclose(matrix, truth, atol=tolerance)
    assert lx.is_positive_semidefinite(gauss_newton) and not lx.is_positive_semidefinite(hessian)


def test_gauss_newton_leaves_the_models_curvature_out(rng):
    x, y = rng.standard_normal(6), rng.standard_normal(6)
    a, b = 0.7, -0.4
    # z = a tanh(b x), loss ½(z − y)²: J = [tanh(bx), a x sech²(bx)], H = 1.
    jacobian = np.stack([np.tanh(b * x), a * x / np.cosh(b * x) ** 2], axis=1)
    operator = ops.gauss_newton(
        lambda p, x: p["a"] * jnp.tanh(p["b"] * x),
        lambda z, y: 0.5 * (z - y) ** 2,
        {"a": jnp.asarray(a), "b": jnp.asarray(b)},
        jnp.asarray(x),
        jnp.asarray(y),
    )
    np.testing.assert_allclose(operator.as_matrix(), jacobian.T @ jacobian / 6, atol=1e-14)


def test_gauss_newton_of_a_model_with_several_outputs_and_an_integer_one(rng):
    x = jnp.asarray(rng.standard_normal((5, 2)))
    w = jnp.asarray(rng.standard_normal(2))
    operator = ops.gauss_newton(
        lambda w, x: {"mean": x @ w, "double": 2 * (x @ w), "count": jnp.asarray(3)},
        lambda z, y: 0.5 * (z["mean"] - y) ** 2 + z["count"].astype(y.dtype) * z["double"] ** 2,
        w,
        x,
        jnp.zeros(5),
    )
    # 1 + 2·3·4 = 25 times the second moment.
    np.testing.assert_allclose(operator.as_matrix(), 25 * np.asarray(x).T @ np.asarray(x) / 5, rtol=1e-12)


def test_cross_derivative_is_theta_by_phi(rng):
    matrix = rng.standard_normal((3, 2))
    theta, phi = jnp.asarray(rng.standard_normal(3)), jnp.asarray(rng.standard_normal(2))

    def fn(theta, phi, scale):
        return scale * jnp.sin(theta) @ (jnp.asarray(matrix) @ phi**2)

    operator = ops.cross_derivative(fn, theta, phi, jnp.asarray(3.0))
    truth = 3.0 * np.cos(theta)[:, None] * matrix * 2 * np.asarray(phi)[None, :]
    assert (operator.out_size(), operator.in_size()) == (3, 2)  # E12: not its transpose
    np.testing.assert_allclose(operator.as_matrix(), truth, rtol=1e-12)
    np.testing.assert_allclose(operator.T.as_matrix(), truth.T, rtol=1e-12)
    np.testing.assert_allclose(lx.linearise(operator).T.as_matrix(), truth.T, rtol=1e-12)
    np.testing.assert_allclose(operator.T.T.mv(jnp.ones(2)), truth @ np.ones(2), rtol=1e-12)


def test_weight_decay_cross_derivative_is_theta():
    theta = jnp.asarray([1.0, -2.0])
    half = ops.cross_derivative(lambda t, p: 0.5 * p * jnp.sum(t**2), theta, jnp.asarray(3.0))
    whole = ops.cross_derivative(lambda t, p: p * jnp.sum(t**2), theta, jnp.asarray(3.0))
    np.testing.assert_allclose(half.mv(jnp.asarray(1.0)), theta)
    np.testing.assert_allclose(whole.mv(jnp.asarray(1.0)), 2 * theta)  # E28


def test_jacobians_of_residuals_and_fixed_points(rng):
    weights = 0.4 * rng.standard_normal((3, 3))
    theta = rng.standard_normal(3)
    inner = np.diag(1 / np.cosh(weights @ theta) ** 2) @ weights
    residual = ops.residual_jacobian(lambda t, w: jnp.tanh(w @ t), jnp.asarray(theta), jnp.asarray(weights))
    fixed_point = ops.fixed_point_jacobian(
        lambda t, w: jnp.tanh(w @ t), jnp.asarray(theta), jnp.asarray(weights)
    )
    np.testing.assert_allclose(residual.as_matrix(), inner, rtol=1e-12)
    np.testing.assert_allclose(residual.T.as_matrix(), inner.T, rtol=1e-12)
    np.testing.assert_allclose(fixed_point.as_matrix(), np.eye(3) - inner, rtol=1e-12)
    np.testing.assert_allclose(lx.linearise(fixed_point.T).as_matrix(), (np.eye(3) - inner).T, rtol=1e-12)


def test_residual_jacobian_need_not_be_square():
    operator = ops.residual_jacobian(
        lambda t: {"a": t["x"][:2] * 3, "n": jnp.asarray(1)}, {"x": jnp.ones(3), "k": jnp.arange(2)}
    )
    np.testing.assert_allclose(operator.as_matrix(), np.eye(3)[:2] * 3)
    np.testing.assert_allclose(operator.T.as_matrix(), np.eye(3)[:, :2] * 3)


def test_functions_may_close_over_traced_values(rng):
    """The operator crosses Lineax's primitive while phi, inside the closure, is being differentiated."""
    theta = jnp.asarray(rng.standard_normal(3))
    matrix = jnp.diag(jnp.asarray([1.0, 2.0, 4.0]))

    def solve(phi):
        operator = ops.hessian(lambda t: 0.5 * phi * t @ matrix @ t, theta, tags=lx.positive_semidefinite_tag)
        return jnp.sum(lx.linear_solve(operator, jnp.ones(3), lx.Cholesky()).value)

    np.testing.assert_allclose(jax.grad(solve)(2.0), -1.75 / 4, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(solve)(jnp.asarray([1.0, 2.0])), [1.75, 0.875], rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(solve, (2.0,), (1.0,))[1], -1.75 / 4, rtol=1e-12)


def test_eager_solves_in_a_loop_compile_once(rng):
    """Two operators of one function are the same program, also where the function is a closure."""
    shift = jnp.asarray(rng.standard_normal(3))
    traces = []

    def fn(theta):
        traces.append(None)
        return jnp.sum((theta - shift) ** 4) + jnp.sum(theta**2)

    counts = []
    for scale in (1.0, 2.0, 3.0):
        operator = ops.hessian(fn, scale * jnp.ones(3))
        before = len(traces)
        lx.linear_solve(operator, jnp.ones(3), lx.LU())
        counts.append(len(traces) - before)
    assert counts[0] > 0  # the benign control: the first solve does trace
    assert counts[1:] == [0, 0]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`fn` must return one real scalar, found float64"):
        ops.hessian(lambda t: t, jnp.ones(2))
    with pytest.raises(ValueError, match="`theta` has no floating-point array leaf.*int64 array"):
        ops.hessian(jnp.sum, jnp.arange(2))
    with pytest.raises(ValueError, match="`theta` has a complex leaf"):
        ops.hessian(lambda t: jnp.sum(jnp.abs(t)), jnp.ones(2, complex))
    with pytest.raises(ValueError, match="`phi` has no floating-point"):
        ops.cross_derivative(lambda t, p: jnp.sum(t), jnp.ones(2), 3)
    with pytest.raises(ValueError, match="must return a tree like `theta`"):
        ops.fixed_point_jacobian(jnp.sum, jnp.ones(2))
    with pytest.raises(ValueError, match="no floating-point array leaf, so it has no Jacobian"):
        ops.residual_jacobian(lambda t: jnp.arange(3), jnp.ones(2))
    model = (lambda w, x: w * x, lambda z, y: (z - y) ** 2, jnp.ones(()))
    with pytest.raises(ValueError, match="must share one leading axis"):
        ops.gauss_newton(*model, jnp.ones(4), jnp.ones(3))
    with pytest.raises(ValueError, match="of at least one example"):
        ops.gauss_newton(*model, jnp.ones(0), jnp.ones(0))
    with pytest.raises(ValueError, match="`loss_fn` must return one real scalar"):
        ops.gauss_newton(
            lambda w, x: w * x, lambda z, y: jnp.stack([z, y]), jnp.ones(()), jnp.ones(3), jnp.ones(3)
        )


def test_nothing_densifies_above_the_limit():
    size = int(MAX_DENSE_ELEMENTS**0.5) + 1
    operator = ops.hessian(lambda t: jnp.sum(t**2), jnp.ones(size))
    for densify in (operator.as_matrix, lambda: lx.materialise(operator)):
        with pytest.raises(ValueError, match="Nothing densifies silently.*curvax.linear"):
            densify()
    with pytest.raises(ValueError, match="Nothing densifies silently"):
        lx.linear_solve(operator, jnp.ones(size), lx.LU())
    np.testing.assert_array_equal(operator.mv(jnp.ones(size)), 2 * np.ones(size))
