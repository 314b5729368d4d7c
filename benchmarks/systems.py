"""Linear systems for the benchmarks: products in JAX, the same matrix for SciPy, and the exact solution."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import problems
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import sklearn.datasets

import curvax as cx


class System(NamedTuple):
    """A x = b. `matvec` is what every library in JAX is given, `matrix` (sparse or dense) what SciPy is given.

    Of a curvature there are products alone: SciPy is then given those of `matvec`, compiled (`for_scipy`).
    """

    name: str
    matvec: Callable[[jax.Array], jax.Array]
    matrix: scipy.sparse.csr_array | np.ndarray
    rhs: jax.Array
    exact: np.ndarray
    symmetric: bool
    definite: bool
    products: bool = False

    def for_scipy(self):
        """What SciPy's solvers are given."""
        if not self.products:
            return self.matrix
        product = jax.jit(self.matvec)
        shape = (len(self.exact), len(self.exact))
        return scipy.sparse.linalg.LinearOperator(
            shape, matvec=lambda v: np.asarray(product(v)), dtype=np.float64
        )


def _system(name, matvec, matrix, rhs, *, symmetric=True, definite=True, products=False) -> System:
    return System(name, matvec, matrix, jnp.asarray(rhs), _exact(matrix, rhs), symmetric, definite, products)


def _exact(matrix, rhs: np.ndarray) -> np.ndarray:
    """A direct solve, refined with residuals in long double: right to the last digit while eps · condition < 1."""
    if scipy.sparse.issparse(matrix):
        solve = scipy.sparse.linalg.splu(matrix.tocsc()).solve
    else:
        factors = scipy.linalg.lu_factor(matrix)
        solve = lambda b: scipy.linalg.lu_solve(factors, b)
    wide, x = matrix.astype(np.longdouble), solve(rhs).astype(np.longdouble)
    for _ in range(4):
        x = x + solve((rhs - wide @ x).astype(np.float64))
    return x.astype(np.float64)


def _laplacian(side: int) -> scipy.sparse.csr_array:
    line = scipy.sparse.diags_array(
        [-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], offsets=[-1, 0, 1]
    )
    eye = scipy.sparse.eye_array(side)
    return scipy.sparse.csr_array(scipy.sparse.kron(line, eye) + scipy.sparse.kron(eye, line))


def _shifted(grid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    padded = jnp.pad(grid, 1)
    return padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]


def poisson(side: int) -> System:
    """The five-point Laplacian on a square, products as a stencil."""

    def matvec(v):
        grid = v.reshape(side, side)
        return (4 * grid - sum(_shifted(grid))).ravel()

    rhs = np.random.default_rng(0).standard_normal(side * side)
    return _system(f"Poisson, n = {side * side}", matvec, _laplacian(side), rhs)


def convection_diffusion(side: int, wind: float = 0.4) -> System:
    """The same with a first derivative by central differences: not symmetric."""

    def matvec(v):
        grid = v.reshape(side, side)
        up, down, left, right = _shifted(grid)
        return (4 * grid - (1 + wind) * (up + left) - (1 - wind) * (down + right)).ravel()

    skew = scipy.sparse.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[-1, 1])
    eye = scipy.sparse.eye_array(side)
    first = scipy.sparse.kron(skew, eye) + scipy.sparse.kron(eye, skew)
    matrix = scipy.sparse.csr_array(_laplacian(side) + wind * first)
    rhs = np.random.default_rng(0).standard_normal(side * side)
    return _system(
        f"convection and diffusion, n = {side * side}", matvec, matrix, rhs, symmetric=False, definite=False
    )


def _dense(name, matrix, rhs, **kinds) -> System:
    array = jnp.asarray(matrix)
    return _system(name, lambda v: array @ v, matrix, rhs, **kinds)


def spectrum(condition: float, n: int = 500) -> System:
    """A dense matrix with eigenvalues between 1/condition and 1, evenly spread in the logarithm."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    matrix = basis * np.geomspace(1 / condition, 1, n) @ basis.T
    return _dense(
        f"spectrum, condition {condition:.0e}, n = {n}", 0.5 * (matrix + matrix.T), rng.standard_normal(n)
    )


def hilbert(n: int = 8) -> System:
    """1 / (i + j + 1)."""
    return _dense(f"Hilbert, n = {n}", scipy.linalg.hilbert(n), np.ones(n))


def kkt(n: int = 400, constraints: int = 100) -> System:
    """[[H, Cᵀ], [C, 0]]: symmetric and indefinite."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    c = rng.standard_normal((constraints, n)) / np.sqrt(n)
    curvature = basis * np.geomspace(1e-2, 1, n) @ basis.T
    matrix = np.block([[curvature, c.T], [c, np.zeros((constraints, constraints))]])
    matrix = 0.5 * (matrix + matrix.T)
    return _dense(f"KKT, n = {n + constraints}", matrix, rng.standard_normal(n + constraints), definite=False)


def softmax_hessian() -> System:
    """The Hessian of softmax regression on digits at its minimum, linearised, with its adjoint's right-hand side."""
    training, validation = problems.digits()
    penalties, _ = problems.start()
    exact = problems.exact(penalties, training, validation)
    weights = jnp.asarray(exact.weights)
    operator = cx.operators.hessian(problems.inner, weights, penalties, training)
    product = operator.linearised().mv
    rhs = jax.grad(problems.outer)(weights, penalties, validation)
    return _system(
        "softmax Hessian on digits, n = 640",
        lambda v: product(v.reshape(weights.shape)).ravel(),
        exact.curvature,
        np.asarray(rhs).ravel(),
        products=True,
    )


def gauss_newton(damping: float = 1e-4, width: int = 10) -> System:
    """JᵀJ/n + λI of a network on digits, products by JAX."""
    training, _ = problems.digits()
    rng = np.random.default_rng(0)
    sizes = [(64, width), (width, 10)]
    weights = [jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0])) for s in sizes]
    flat, unravel = jax.flatten_util.ravel_pytree(weights)

    def model(v):
        first, second = unravel(v)
        return jnp.tanh(training.images @ first) @ second

    _, push = jax.linearize(model, flat)
    pull = jax.linear_transpose(push, flat)
    count = len(training.labels)
    matvec = lambda v: pull(push(v))[0] / count + damping * v
    jacobian = np.asarray(jax.jacobian(model)(flat)).reshape(-1, flat.size)
    matrix = jacobian.T @ jacobian / count + damping * np.eye(flat.size)
    return _system(
        f"Gauss–Newton of a network, n = {flat.size}",
        matvec,
        matrix,
        rng.standard_normal(flat.size),
        products=True,
    )


def diagonal(condition: float, n: int = 500) -> System:
    """The eigenvalues of `spectrum` on the diagonal, which the products do not show."""
    values = np.geomspace(1 / condition, 1, n)
    entries = jnp.asarray(values)
    rhs = np.random.default_rng(0).standard_normal(n)
    name = f"diagonal, condition {condition:.0e}, n = {n}"
    return _system(name, lambda v: entries * v, scipy.sparse.diags_array(values).tocsr(), rhs)


def graded(n: int = 1000, scales: float = 1e4) -> System:
    """S K S with a well-conditioned K and a diagonal S that spans `scales`: variables in different units."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((n, 2 * n)) / np.sqrt(2 * n)
    scale = rng.permutation(np.geomspace(1 / scales, 1, n))
    matrix = scale[:, None] * (root @ root.T + np.eye(n)) * scale
    return _dense(f"graded, n = {n}", 0.5 * (matrix + matrix.T), scale * rng.standard_normal(n))


def sparse_kkt(side: int = 30, constraints: int = 100) -> System:
    """[[−Δ + 1, Cᵀ], [C, 0]] with C the values at some points of a grid: products as a stencil and a gather."""
    n = side * side
    chosen = np.sort(np.random.default_rng(0).choice(n, constraints, replace=False))
    points = jnp.asarray(chosen)

    def matvec(v):
        state, multipliers = v[:n], v[n:]
        grid = state.reshape(side, side)
        rows = (5 * grid - sum(_shifted(grid))).ravel().at[points].add(multipliers)
        return jnp.concatenate([rows, state[points]])

    values = scipy.sparse.csr_array(
        (np.ones(constraints), (np.arange(constraints), chosen)), (constraints, n)
    )
    matrix = scipy.sparse.csr_array(
        scipy.sparse.block_array([[_laplacian(side) + scipy.sparse.eye_array(n), values.T], [values, None]])
    )
    rhs = np.random.default_rng(1).standard_normal(n + constraints)
    return _system(f"KKT on a grid, n = {n + constraints}", matvec, matrix, rhs, definite=False)


def _glm(name: str, features: np.ndarray, penalty: float) -> System:
    """Xᵀ D X / m + penalty · I, D the curvatures of a logistic or Poisson loss at some weights."""
    rng = np.random.default_rng(0)
    scores = features @ rng.standard_normal(features.shape[1]) / np.sqrt(features.shape[1])
    curvatures = 1 / (2 + 2 * np.cosh(scores)) / len(features)
    x, d = jnp.asarray(features), jnp.asarray(curvatures)
    matrix = features.T @ (curvatures[:, None] * features) + penalty * np.eye(features.shape[1])
    rhs = features.T @ (curvatures * rng.standard_normal(len(features)))
    return _system(name, lambda v: x.T @ (d * (x @ v)) + penalty * v, 0.5 * (matrix + matrix.T), rhs)


def logistic_hessian(penalty: float = 1e-4, pairs: bool = False) -> System:
    """Of logistic regression on the breast cancer data, standardised; with the products of `pairs` of features too."""
    features = sklearn.datasets.load_breast_cancer(return_X_y=True)[0]
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    if pairs:
        left, right = np.triu_indices(features.shape[1])
        features = np.concatenate([features, features[:, left] * features[:, right]], axis=1)
        features = features / features.std(axis=0)
    name = f"logistic Hessian on breast cancer, n = {features.shape[1]}, penalty {penalty:.0e}"
    return _glm(name, features, penalty)
