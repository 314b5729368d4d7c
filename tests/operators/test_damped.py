"""`Damped` around operators of every kind, against dense matrices of NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax as cx
from curvax.operators._block_tridiagonal import BlockTridiagonal
from curvax.operators._damped import Damped
from curvax.operators._kronecker import Kronecker
from helpers.sweep import sweep

SPD = lx.positive_semidefinite_tag
_SPACE = {"a": (2,), "b": (2, 1)}


def _definite(rng, n, dtype=np.float64):
    root = rng.standard_normal((n, n))
    return jnp.asarray(root @ root.T / n, dtype)


def _function(rng, dtype, tags):
    """An operator known through its products, over a dict of an array and a matrix."""
    matrix = _definite(rng, 4, dtype)

    def product(tree):
        out = jnp.matmul(matrix, jnp.concatenate([tree["a"], tree["b"].ravel()]))
        return {"a": out[:2], "b": out[2:, None]}

    structure = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in _SPACE.items()}
    return lx.FunctionLinearOperator(product, structure, tags)


# Each of four rows; those with an inverse have entries or a structure.
INVERTIBLE = {
    "matrix": lambda rng, dtype: lx.MatrixLinearOperator(jnp.asarray(rng.standard_normal((4, 4)), dtype)),
    "definite": lambda rng, dtype: lx.MatrixLinearOperator(_definite(rng, 4, dtype), SPD),
    "tagged": lambda rng, dtype: lx.TaggedLinearOperator(
        lx.MatrixLinearOperator(_definite(rng, 4, dtype)), SPD
    ),
    "diagonal": lambda rng, dtype: lx.DiagonalLinearOperator(
        {name: jnp.asarray(rng.uniform(0, 1, shape), dtype) for name, shape in _SPACE.items()}
    ),
    "identity": lambda rng, dtype: lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2, 2), dtype)),
    "tridiagonal": lambda rng, dtype: lx.TridiagonalLinearOperator(
        *(jnp.asarray(rng.uniform(0, 1, n), dtype) for n in (4, 3, 3))
    ),
    "structured": lambda rng, dtype: lx.TaggedLinearOperator(
        Kronecker(*(lx.MatrixLinearOperator(_definite(rng, 2, dtype), SPD) for _ in range(2))), SPD
    ),
}
PRODUCTS_ONLY = {
    "function": lambda rng, dtype: _function(rng, dtype, ()),
    "definite function": lambda rng, dtype: _function(rng, dtype, SPD),
    "sum": lambda rng, dtype: (
        INVERTIBLE["matrix"](rng, dtype) + lx.DiagonalLinearOperator(jnp.ones(4, dtype))
    ),
}
KINDS = INVERTIBLE | PRODUCTS_ONLY


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _vector(operator, rng):
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), operator.in_structure())


def _matrix(operator):
    """Columns by products of the operator itself: it shares nothing with the damping."""
    leaves, treedef = jax.tree.flatten(operator.in_structure())
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def column(e):
        parts = [p.reshape(s.shape) for p, s in zip(jnp.split(e, ends), leaves, strict=True)]
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(operator.mv(treedef.unflatten(parts)))])

    return np.asarray(jax.jit(jax.vmap(column, 0, 1))(jnp.eye(4, dtype=leaves[0].dtype)))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    sweep(
        [(dtype, kind) for kind in KINDS for dtype in (np.float32, np.float64)],
        always=[
            *((np.float64, kind) for kind in KINDS),
            *((np.float32, kind) for kind in ("definite", "diagonal", "function")),
        ],
    ),
)
def test_products_inverse_numbers_and_tags(kind, dtype, rng):
    operator = KINDS[kind](rng, dtype)
    truth = _matrix(operator) + 0.7 * np.eye(4, dtype=dtype)
    tolerance = 1e-11 if dtype == np.float64 else 1e-4
    v = _vector(operator, rng)

    @eqx.filter_jit
    def all_of_it(operator, v, damping):
        damped = Damped(operator, damping)
        forward = [op.mv(v) for op in (damped, damped.T, lx.linearise(damped), Damped(damped, 0).damped(1))]
        numbers, backward = [damped.trace()], []
        if kind in INVERTIBLE:
            backward = [op.mv(v) for op in (damped.inverse(), damped.inverse().T)]
            numbers.append(damped.logdet())
        return forward, backward, numbers, damped.diagonal(), lx.diagonal(damped)

    forward, backward, numbers, diagonal, same = all_of_it(operator, v, 0.7)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((forward, backward, numbers, diagonal)))
    more = truth + np.eye(4)
    for product, dense in zip(forward, (truth, truth.T, truth, more), strict=True):
        assert jax.tree.structure(product) == jax.tree.structure(v)
        np.testing.assert_allclose(_flat(product), dense @ _flat(v), atol=tolerance)
    for solution, dense in zip(backward, (truth, truth.T), strict=False):
        assert jax.tree.structure(solution) == jax.tree.structure(v)
        np.testing.assert_allclose(dense @ _flat(solution), _flat(v), atol=tolerance)
    np.testing.assert_allclose(numbers[0], np.trace(truth), rtol=tolerance)
    if kind in INVERTIBLE:
        np.testing.assert_allclose(numbers[1], np.linalg.slogdet(truth)[1], atol=tolerance)
    np.testing.assert_allclose(diagonal, np.diag(truth), atol=tolerance)
    np.testing.assert_allclose(same, np.diag(truth), atol=tolerance)

    damped = Damped(operator, 0.7)
    variants = [damped, damped.T] + ([damped.inverse()] if kind in INVERTIBLE else [])
    for op in variants:
        assert not lx.is_symmetric(op) or np.allclose(truth, truth.T, atol=1e-6)
        known = kind in ("definite", "tagged", "identity", "structured", "definite function")
        assert lx.is_positive_semidefinite(op) == known
        assert lx.is_symmetric(op) == (known or kind == "diagonal")
        assert lx.is_diagonal(op) == (kind in ("diagonal", "identity"))
        assert not lx.is_negative_semidefinite(op) and not lx.has_unit_diagonal(op)


def test_tags_that_damping_breaks_are_dropped():
    minus = lx.MatrixLinearOperator(-jnp.eye(2), frozenset([lx.negative_semidefinite_tag]))
    unit = lx.MatrixLinearOperator(
        jnp.tril(jnp.ones((2, 2))), (lx.unit_diagonal_tag, lx.lower_triangular_tag)
    )
    assert lx.is_symmetric(Damped(minus, 2.0)) and not lx.is_negative_semidefinite(Damped(minus, 2.0))
    assert not lx.has_unit_diagonal(Damped(unit, 2.0)) and not lx.has_unit_diagonal(
        Damped(unit, 2.0).inverse()
    )
    assert lx.is_lower_triangular(Damped(unit, 2.0)) and lx.is_upper_triangular(Damped(unit, 2.0).T)


def test_jit_vmap_and_one_compilation(rng):
    matrices, v = jnp.stack([_definite(rng, 3) for _ in range(3)]), jnp.asarray(rng.standard_normal(3))
    dampings, traces = jnp.asarray([0.1, 1.0, 10.0]), []

    @eqx.filter_jit
    def apply(matrices, dampings):
        traces.append(None)
        make = lambda m, d: Damped(lx.MatrixLinearOperator(m, SPD), d)
        batch = eqx.filter_vmap(make)(matrices, dampings)  # made inside of vmap, used outside
        return eqx.filter_vmap(lambda op: op.inverse().mv(v))(batch)

    for scale in (1.0, 3.0):
        solutions = apply(matrices, scale * dampings)
        truth = [
            np.linalg.solve(m + scale * d * np.eye(3), v) for m, d in zip(matrices, dampings, strict=True)
        ]
        np.testing.assert_allclose(solutions, truth, rtol=1e-10)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", ["matrix", "definite", "kronecker"])
def test_derivatives_in_the_entries_and_the_damping(kind, rng):
    matrix, v = _definite(rng, 4), jnp.asarray(rng.standard_normal(4))
    right = lx.MatrixLinearOperator(_definite(rng, 2), SPD)

    def symmetric(matrix):
        return 0.5 * (matrix + matrix.T) if kind != "matrix" else matrix

    def ours(arguments):
        matrix, damping = arguments
        if kind == "kronecker":
            inner = Kronecker(lx.MatrixLinearOperator(symmetric(matrix[:2, :2]), SPD), right)
            return jnp.sum(jnp.sin(Damped(inner, damping).inverse().mv(v.reshape(2, 2))))
        inner = lx.MatrixLinearOperator(symmetric(matrix), SPD if kind == "definite" else ())
        return jnp.sum(jnp.sin(Damped(inner, damping).inverse().mv(v)))

    def dense(arguments):
        matrix, damping = arguments
        full = jnp.kron(symmetric(matrix[:2, :2]), right.matrix) if kind == "kronecker" else symmetric(matrix)
        return jnp.sum(jnp.sin(jnp.linalg.solve(full + damping * jnp.eye(4), v)))

    point = matrix, jnp.asarray(0.3)
    direction = jnp.asarray(rng.standard_normal((4, 4))), jnp.asarray(0.5)
    gradient, truth = jax.jit(jax.grad(ours))(point), jax.jit(jax.grad(dense))(point)
    for g, t in zip(gradient, truth, strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-8, atol=1e-10)
    compiled = jax.jit(ours)
    moved = lambda step: compiled(jax.tree.map(lambda x, d: x + step * d, point, direction))
    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert abs(difference) > 1e-4
    tangent = jax.jit(lambda x, d: jax.jvp(ours, (x,), (d,))[1])(point, direction)
    np.testing.assert_allclose(tangent, difference, rtol=1e-5)


def test_products_alone_are_solved_in_products_and_refuse_an_inverse(rng):
    operator = Damped(_function(rng, np.float64, SPD), 0.5)
    v = _vector(operator, rng)
    for solver in (cx.linear.CG(rtol=1e-12), lx.CG(rtol=1e-12, atol=1e-12)):
        solution = lx.linear_solve(operator, v, solver).value
        np.testing.assert_allclose(_flat(operator.mv(solution)), _flat(v), atol=1e-10)
    for method in (operator.inverse, operator.logdet):
        with pytest.raises(ValueError, match="`cx.linear.CG`"):
            method()
    chain = BlockTridiagonal(jnp.ones((1, 2, 2)) + jnp.eye(2), jnp.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match="`cx.linear.CG`"):  # a structure that damping does not keep
        Damped(chain.inverse(), 0.5).inverse()


def test_a_singular_matrix_gives_no_number_until_it_is_damped():
    singular = lx.MatrixLinearOperator(jnp.asarray([[1.0, 2.0], [2.0, 4.0]]), lx.symmetric_tag)
    assert not np.isfinite(Damped(singular, 0.0).inverse().mv(jnp.ones(2))).any()
    assert Damped(singular, 0.0).logdet() == -np.inf
    np.testing.assert_allclose(Damped(singular, 1.0).inverse().mv(jnp.ones(2)), [0.5, 0.0], atol=1e-15)


@pytest.mark.parametrize("damping", [-1e-3, np.float32(-1), jnp.asarray(-2.0), np.nan])
def test_a_negative_damping_is_refused(damping):
    inner = lx.MatrixLinearOperator(jnp.eye(2))
    with pytest.raises(ValueError, match="`damping` must not be negative"):
        Damped(inner, damping)
    with pytest.raises(ValueError, match="`damping` must not be negative"):
        Damped(inner, 1.0).damped(damping)
    assert Damped(inner, 0.0).damping == 0  # the control


def test_operators_that_cannot_be_damped_are_refused():
    with pytest.raises(ValueError, match="must be square"):
        Damped(lx.MatrixLinearOperator(jnp.ones((2, 3))), 1.0)
    reshaped = lx.IdentityLinearOperator(
        jax.ShapeDtypeStruct((4,), np.float64), jax.ShapeDtypeStruct((2, 2), np.float64)
    )
    with pytest.raises(ValueError, match="must be square"):
        Damped(reshaped, 1.0)
    with pytest.raises(ValueError, match="must be a scalar"):
        Damped(lx.MatrixLinearOperator(jnp.eye(2)), jnp.ones(2))
    with pytest.raises(ValueError, match="real floating-point"):
        Damped(lx.MatrixLinearOperator(jnp.eye(2, dtype=np.complex128)), 1.0)
