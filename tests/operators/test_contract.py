"""One contract for every public operator that is made of derivatives, found by introspection."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from helpers.sweep import sweep


def _theta(dtype, rng):
    """Float leaves among an integer, None, an empty array and a function."""
    return {
        "w": jnp.asarray(rng.standard_normal((2, 2)), dtype),
        "b": jnp.asarray(rng.standard_normal(), dtype),
        "empty": jnp.zeros((0, 2), dtype),
        "power": jnp.asarray(3),
        "none": None,
        "activation": jnp.tanh,
    }


def _features(theta, scale):
    w, b = theta["w"], theta["b"]
    hidden = theta["activation"](scale * w @ jnp.asarray([[0.3], [-0.7]], w.dtype) + b)
    return hidden.reshape(-1) + b ** theta["power"] + jnp.sum(theta["empty"])


def _energy(theta, scale):
    return jnp.sum(_features(theta, scale) ** 2)


def _coupled(theta, phi, scale):
    return jnp.sum(_features(theta, scale) * jnp.sin(phi["s"])) * phi["t"] ** 2


def _map(theta, scale):
    f = _features(theta, scale)
    return {**theta, "w": f[0] * theta["w"] / 4, "b": f[1] / 4 + theta["w"][0, 1] / 8}


def _per_example(theta, x):
    return _features(theta, x)


def _convex(z, y):
    return jnp.sum(jnp.logaddexp(z, -z)) - y.astype(z.dtype) * z[0]


def _phi(dtype, rng):
    return {
        "s": jnp.asarray(rng.standard_normal(2), dtype),
        "t": jnp.asarray(rng.standard_normal(), dtype),
        "k": 2,
    }


def _flat(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def _direction(operator, rng):
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), operator.in_structure())


# Each makes an operator of (theta, phi, scale); its class; whether it is symmetric.
MAKERS = {
    "hessian": (lambda t, p, c: ops.hessian(_energy, t, c), ops.Hessian, True),
    "gauss_newton": (
        lambda t, p, c: ops.gauss_newton(
            _per_example, _convex, t, c * jnp.linspace(0.5, 1.5, 4, dtype=c.dtype), jnp.arange(4)
        ),
        ops.GaussNewton,
        True,
    ),
    "fisher": (
        lambda t, p, c: ops.fisher(
            _per_example,
            _convex,
            t,
            c * jnp.linspace(0.5, 1.5, 4, dtype=c.dtype),
            jnp.arange(4),
            kind="centred",
        ),
        ops.Fisher,
        True,
    ),
    "cross_derivative": (lambda t, p, c: ops.cross_derivative(_coupled, t, p, c), ops.CrossDerivative, False),
    "residual_jacobian": (lambda t, p, c: ops.residual_jacobian(_features, t, c), ops.Jacobian, False),
    "fixed_point_jacobian": (lambda t, p, c: ops.fixed_point_jacobian(_map, t, c), ops.Jacobian, False),
}
# The vector field of which each operator is the derivative, and in which argument.
FIELDS = {
    "hessian": lambda t, p, c: (lambda u: jax.grad(lambda v: _energy(eqx.combine(v, t), c))(u), t),
    "cross_derivative": lambda t, p, c: (
        lambda u: jax.grad(lambda v: _coupled(eqx.combine(v, t), eqx.combine(u, p), c))(
            eqx.filter(t, eqx.is_inexact_array)
        ),
        p,
    ),
    "residual_jacobian": lambda t, p, c: (lambda u: _features(eqx.combine(u, t), c), t),
    "fixed_point_jacobian": lambda t, p, c: (
        lambda u: jax.tree.map(jnp.subtract, u, eqx.filter(_map(eqx.combine(u, t), c), eqx.is_inexact_array)),
        t,
    ),
}
every_operator = pytest.mark.parametrize("name", MAKERS)


def _make(name, dtype, rng):
    theta, phi, scale = _theta(dtype, rng), _phi(dtype, rng), jnp.asarray(0.8, dtype)
    return MAKERS[name][0](theta, phi, scale), (theta, phi, scale)


def test_every_public_operator_and_maker_has_a_case():
    classes = {
        cls
        for _, cls in inspect.getmembers(ops, inspect.isclass)
        if issubclass(cls, ops.AbstractDerivativeOperator) and not inspect.isabstract(cls)
    }
    functions = {name for name, _ in inspect.getmembers(ops, inspect.isfunction)}
    assert classes == {case[1] for case in MAKERS.values()}
    # These make structured operators, or reports: tested in files of their own.
    others = {
        "nearest_kronecker",
        "positive_part",
        "absolute_value",
        "nystrom_approximation",
        "randomised_svd",
        "kfac",
        "ekfac",
        "eigenvalue_correction",
        "layer_blocks",
        "nearest_kronecker_layers",
        "truncated",
        "conditioned",
        "sampled_fisher",
        "sandwich",
    }
    assert functions - others - {"approximation_error", "lowest_curvature"} == set(MAKERS)
    assert all(getattr(ops, name).__doc__ for name in functions)


@pytest.mark.parametrize("name", FIELDS)
def test_matrix_is_the_finite_difference_of_its_field(name, rng):
    """Central differences of the first derivative: truth that shares no second derivative with us."""
    operator, arguments = _make(name, np.float64, rng)
    field, point = FIELDS[name](*arguments)
    point = eqx.filter(point, eqx.is_inexact_array)
    compiled, step, columns = jax.jit(lambda u: _flat(field(u))), 1e-5, []
    leaves, treedef = jax.tree.flatten(point)
    for i, leaf in enumerate(leaves):
        for j in range(leaf.size):
            moved = [
                leaves[:i] + [leaf.reshape(-1).at[j].add(h).reshape(leaf.shape)] + leaves[i + 1 :]
                for h in (step, -step)
            ]
            plus, minus = (compiled(jax.tree.unflatten(treedef, m)) for m in moved)
            columns.append((plus - minus) / (2 * step))
    np.testing.assert_allclose(operator.as_matrix(), np.stack(columns, axis=1), atol=1e-8)


@pytest.mark.parametrize(
    ("name", "dtype"),
    sweep(
        [(name, dtype) for name in MAKERS for dtype in (np.float32, np.float64)],
        always=[*((name, np.float64) for name in MAKERS), ("gauss_newton", np.float32)],
    ),
)
def test_products_transposes_and_structures(name, dtype, rng):
    operator, _ = _make(name, dtype, rng)
    tolerance = 1e-12 if dtype == np.float64 else 2e-5
    matrix = np.asarray(operator.as_matrix())
    assert matrix.dtype == dtype and matrix.shape == (operator.out_size(), operator.in_size())

    def variants(operator):
        """Operators that must act as the matrix, and those that must act as its transpose."""
        as_itself = [
            operator,
            operator.T.T,
            lx.linearise(operator),
            lx.conj(operator),
            lx.materialise(operator),
        ]
        transposed = [operator.T, lx.linearise(operator).T, lx.linearise(operator.T)]
        return (as_itself, transposed) if dtype == np.float64 else (as_itself[:1], transposed[:1])

    @eqx.filter_jit
    def products(operator, right, left):
        as_itself, transposed = variants(operator)
        return (
            [op.mv(right) for op in as_itself],
            [op.mv(left) for op in transposed],
            [op.as_matrix() for op in as_itself[1:]],
            [op.as_matrix() for op in transposed],
        )

    right, left = _direction(operator, rng), _direction(operator.T, rng)
    forward, backward, matrices, transposes = products(operator, right, left)
    for out in forward:
        assert jax.tree.structure(out) == jax.tree.structure(operator.out_structure())
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(out))
        np.testing.assert_allclose(_flat(out), matrix @ np.asarray(_flat(right)), atol=10 * tolerance)
    for out in backward:
        assert jax.tree.structure(out) == jax.tree.structure(operator.in_structure())
        np.testing.assert_allclose(_flat(out), matrix.T @ np.asarray(_flat(left)), atol=10 * tolerance)
    for dense in matrices:
        np.testing.assert_allclose(dense, matrix, atol=tolerance)
    for dense in transposes:
        np.testing.assert_allclose(dense, matrix.T, atol=tolerance)
    np.testing.assert_allclose(
        _flat((operator + operator).mv(right)), 2 * _flat(forward[0]), atol=10 * tolerance
    )


@every_operator
def test_tags_tell_the_truth(name, rng):
    operator, _ = _make(name, np.float64, rng)
    matrix = np.asarray(operator.as_matrix())
    assert isinstance(operator, MAKERS[name][1])
    assert lx.is_symmetric(operator) is MAKERS[name][2]
    if lx.is_symmetric(operator):
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
        np.testing.assert_allclose(lx.diagonal(operator), np.diag(matrix), atol=1e-12)
    if lx.is_positive_semidefinite(operator):
        assert np.linalg.eigvalsh(matrix).min() > -1e-12
    for check in (lx.is_diagonal, lx.is_tridiagonal, lx.is_lower_triangular, lx.has_unit_diagonal):
        assert check(operator) is False
    for part, offset in zip(lx.tridiagonal(operator), (0, -1, 1), strict=True):
        np.testing.assert_allclose(part, np.diagonal(matrix, offset), atol=1e-12)


@every_operator
def test_jit_vmap_and_one_compilation(name, rng):
    theta, phi, scale = _make(name, np.float64, rng)[1]
    traces = []

    @eqx.filter_jit
    def apply(theta, scales, vector):
        traces.append(None)
        return jax.vmap(lambda c: _flat(MAKERS[name][0](theta, phi, c).mv(vector)))(scales)

    scales = jnp.asarray([0.5, 0.8, 1.1])
    vector = _direction(MAKERS[name][0](theta, phi, scale), rng)
    for factor in (1.0, 2.0):
        out = apply(theta, factor * scales, vector)
        truth = MAKERS[name][0](theta, phi, factor * scales[1]).as_matrix() @ _flat(vector)
        np.testing.assert_allclose(out[1], truth, atol=1e-12)
    assert len(traces) == 1
    # A batch of operators, made inside vmap and applied outside it.
    batch = eqx.filter_vmap(lambda c: MAKERS[name][0](theta, phi, c))(2.0 * scales)
    batched = eqx.filter_vmap(lambda op: _flat(op.mv(vector)))(batch)
    np.testing.assert_allclose(batched, out, atol=1e-12)


@every_operator
def test_derivatives_of_a_product_in_the_operators_own_arguments(name, rng):
    """jvp and vjp of `mv` in theta, against central differences of the product."""
    theta, phi, scale = _make(name, np.float64, rng)[1]
    dynamic, rest = eqx.partition(theta, eqx.is_inexact_array)
    operator = MAKERS[name][0](theta, phi, scale)
    vector = _direction(operator, rng)
    weights = jnp.asarray(rng.standard_normal(operator.out_size()))
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), dynamic)

    @jax.jit
    def product(dynamic):
        return weights @ _flat(MAKERS[name][0](eqx.combine(dynamic, rest), phi, scale).mv(vector))

    def moved(step):
        return product(jax.tree.map(lambda x, d: x + step * d, dynamic, direction))

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(difference) > 1e-3
    _, tangent = jax.jvp(product, (dynamic,), (direction,))
    gradient = jax.grad(product)(dynamic)
    np.testing.assert_allclose(tangent, difference, rtol=1e-6)
    np.testing.assert_allclose(_flat(gradient) @ _flat(direction), difference, rtol=1e-6)


@pytest.mark.parametrize(
    "name", sweep(MAKERS, always=["hessian", "gauss_newton", "cross_derivative", "fixed_point_jacobian"])
)
def test_a_linear_solve_with_it_is_differentiable(name, rng):
    """Through Lineax's primitive, in the operator's own arguments: normal equations where not square."""
    theta, phi, scale = _make(name, np.float64, rng)[1]
    operator = MAKERS[name][0](theta, phi, scale)
    vector = _direction(operator, rng)

    def value(scale, solve):
        op = MAKERS[name][0](theta, phi, scale)
        identity = lx.IdentityLinearOperator(op.in_structure())
        normal = lx.TaggedLinearOperator(op.T @ op + identity, lx.positive_semidefinite_tag)
        return jnp.sum(solve(normal, vector) ** 2)

    def matrix_free(normal, vector):
        return _flat(lx.linear_solve(normal, vector, lx.CG(rtol=1e-12, atol=1e-12)).value)

    def dense(normal, vector):
        return jnp.linalg.solve(normal.as_matrix(), _flat(vector))

    ours, truth = (jax.jit(jax.grad(lambda c, s=s: value(c, s)))(scale) for s in (matrix_free, dense))
    np.testing.assert_allclose(ours, truth, rtol=1e-8)
