"""`BlockDiagonal` against `scipy.linalg.block_diag` of dense blocks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

from curvax.operators._block_diagonal import BlockDiagonal
from curvax.operators._block_tridiagonal import BlockTridiagonal
from curvax.operators._kronecker import Kronecker

SPD = lx.positive_semidefinite_tag


def _definite(rng, n):
    root = rng.standard_normal((n, n))
    return root @ root.T / n + 0.5 * np.eye(n)


def _layers(rng, dtype):
    """A network's layers: blocks over a matrix, a dict and a vector, and their dense matrices in leaf order."""
    left, right, full, small = (
        _definite(rng, 2),
        _definite(rng, 3),
        rng.standard_normal((3, 3)),
        _definite(rng, 2),
    )
    scales = {"s": rng.uniform(1, 2, ()), "t": rng.uniform(1, 2, (2, 2))}
    chain = rng.standard_normal((2, 2, 2)) + 4 * np.eye(2), rng.standard_normal((1, 2, 2))
    cast = lambda x: jnp.asarray(x, dtype)
    blocks = {
        "chain": BlockTridiagonal(*map(cast, chain)),
        "dense": [
            Kronecker(lx.MatrixLinearOperator(cast(left), SPD), lx.MatrixLinearOperator(cast(right), SPD)),
            lx.DiagonalLinearOperator(jax.tree.map(cast, scales)),
        ],
        "full": cast(full),
        "identity": lx.IdentityLinearOperator({"u": jax.ShapeDtypeStruct((1, 2), dtype)}),
        "none": None,
        "small": lx.TaggedLinearOperator(lx.MatrixLinearOperator(cast(small)), SPD),
        "written": lx.FunctionLinearOperator(
            lambda v: jnp.matmul(cast(full), v), jax.ShapeDtypeStruct((3, 1), dtype)
        ),
    }
    between = np.block([[np.zeros((2, 2)), chain[1][0].T], [chain[1][0], np.zeros((2, 2))]])
    chained = scipy.linalg.block_diag(*(0.5 * (d + d.T) for d in chain[0])) + between
    diagonal = np.diag(np.concatenate([np.ravel(scales["s"]), np.ravel(scales["t"])]))
    dense = [chained, np.kron(left, right), diagonal, full, np.eye(2), small, full]
    return BlockDiagonal(blocks), scipy.linalg.block_diag(*dense)


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _vector(structure, rng):
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), structure)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_inverse_and_numbers(dtype, rng):
    operator, truth = _layers(rng, dtype)
    tolerance = 1e-11 if dtype == np.float64 else 2e-4
    v = _vector(operator.in_structure(), rng)
    assert v["dense"][0].shape == (2, 3) and v["dense"][1]["t"].shape == (2, 2) and v["none"] is None

    @eqx.filter_jit
    def all_of_it(operator, v):
        inverse = operator.inverse()
        forward = [op.mv(v) for op in (operator, operator.T, lx.linearise(operator))]
        backward = [op.mv(v) for op in (inverse, inverse.T)]
        return (
            forward,
            backward,
            (operator.trace(), operator.logdet()),
            operator.diagonal(),
            operator.as_matrix(),
        )

    forward, backward, numbers, diagonal, matrix = all_of_it(operator, v)
    assert all(
        leaf.dtype == dtype for leaf in jax.tree.leaves((forward, backward, numbers, diagonal, matrix))
    )
    np.testing.assert_allclose(matrix, truth, atol=tolerance)
    for product, dense in zip(forward, (truth, truth.T, truth), strict=True):
        assert jax.tree.structure(product) == jax.tree.structure(v)
        np.testing.assert_allclose(_flat(product), dense @ _flat(v), atol=tolerance)
    for solution, dense in zip(backward, (truth, truth.T), strict=True):
        assert jax.tree.structure(solution) == jax.tree.structure(v)
        np.testing.assert_allclose(dense @ _flat(solution), _flat(v), atol=tolerance)
    np.testing.assert_allclose(numbers, (np.trace(truth), np.linalg.slogdet(truth)[1]), rtol=tolerance)
    np.testing.assert_allclose(diagonal, np.diag(truth), atol=tolerance)
    damped = eqx.filter_jit(lambda op, v: op.damped(0.3).mv(v))(operator, v)
    np.testing.assert_allclose(_flat(damped), truth @ _flat(v) + 0.3 * _flat(v), atol=tolerance)


def test_power_and_damped_inverse_of_definite_blocks(rng):
    """The tag of the whole says that the diagonal and the matrix, which have none, are definite too."""
    left, right, scales, full = (
        _definite(rng, 2),
        _definite(rng, 2),
        rng.uniform(1, 2, (2, 1)),
        _definite(rng, 2),
    )
    factors = [lx.MatrixLinearOperator(jnp.asarray(x), SPD) for x in (left, right)]
    blocks = [Kronecker(*factors), lx.DiagonalLinearOperator(jnp.asarray(scales)), jnp.asarray(full)]
    truth = scipy.linalg.block_diag(np.kron(left, right), np.diag(scales.ravel()), full)
    operator = BlockDiagonal(blocks, SPD)
    v = _vector(operator.in_structure(), rng)
    roots, solution = eqx.filter_jit(
        lambda op, v: (
            [op.power(p).mv(v) for p in (-0.5, 0.5, 2.0)],
            op.damped(0.2).inverse().mv(v),
        )
    )(operator, v)
    for root, exponent in zip(roots, (-0.5, 0.5, 2.0), strict=True):
        expected = scipy.linalg.fractional_matrix_power(truth, exponent) @ _flat(v)
        np.testing.assert_allclose(_flat(root), expected, atol=1e-11)
    np.testing.assert_allclose(
        _flat(solution), np.linalg.solve(truth + 0.2 * np.eye(8), _flat(v)), atol=1e-11
    )
    for op in (operator.power(-0.5), operator.damped(0.2), operator.damped(0.2).inverse()):
        assert lx.is_positive_semidefinite(op) and lx.is_symmetric(op)
    with pytest.raises(ValueError, match=r"power\(\) of block `blocks\[1\]`.*positive semidefinite"):
        BlockDiagonal(blocks).power(0.5)
    chain = BlockTridiagonal(jnp.eye(2)[None], jnp.zeros((0, 2, 2)), tags=SPD)
    with pytest.raises(ValueError, match=r"`blocks\['chain'\]`.*has no power"):
        BlockDiagonal({"chain": chain}).power(0.5)


def test_rectangular_blocks_have_products_alone(rng):
    wide, tall = rng.standard_normal((2, 3)), rng.standard_normal((3, 1))
    operator = BlockDiagonal({"wide": wide, "net": (tall,)})
    truth = scipy.linalg.block_diag(tall, wide)  # keys are sorted
    right, left = _vector(operator.in_structure(), rng), _vector(operator.out_structure(), rng)
    np.testing.assert_allclose(_flat(operator.mv(right)), truth @ _flat(right), atol=1e-14)
    np.testing.assert_allclose(_flat(operator.T.mv(left)), truth.T @ _flat(left), atol=1e-14)
    np.testing.assert_allclose(operator.as_matrix(), truth)
    methods = [operator.inverse, operator.trace, operator.logdet, operator.diagonal]
    for method in [*methods, lambda: operator.damped(0.1), lambda: operator.power(2.0)]:
        with pytest.raises(ValueError, match=r"square blocks; block `blocks\['net'\]\[0\]`"):
            method()


def test_blocks_of_different_dtypes(rng):
    small, large = rng.standard_normal((2, 2)), rng.standard_normal((2, 2))
    operator = BlockDiagonal([jnp.asarray(small, np.float32), jnp.asarray(large)])
    v = [jnp.ones(2, np.float32), jnp.ones(2)]
    for op, truth in ((operator, (small, large)), (operator.inverse(), map(np.linalg.inv, (small, large)))):
        for out, dense, tolerance in zip(op.mv(v), truth, (1e-4, 1e-12), strict=True):
            np.testing.assert_allclose(out, dense @ np.ones(2), rtol=tolerance, atol=tolerance)
        assert [out.dtype for out in op.mv(v)] == [np.float32, np.float64]
    determinants = np.linalg.slogdet(small)[1] + np.linalg.slogdet(large)[1]
    assert operator.logdet().dtype == operator.trace().dtype == operator.diagonal().dtype == np.float64
    np.testing.assert_allclose(operator.logdet(), determinants, rtol=1e-5)
    np.testing.assert_allclose(operator.trace(), np.trace(small) + np.trace(large), rtol=1e-5)
    assert [out.dtype for out in operator.damped(jnp.asarray(0.1)).mv(v)] == [np.float32, np.float64]


_TAGS = {
    lx.is_symmetric: lambda m: np.allclose(m, m.T),
    lx.is_positive_semidefinite: lambda m: np.allclose(m, m.T) and np.linalg.eigvalsh(m).min() >= 0,
    lx.is_negative_semidefinite: lambda m: np.allclose(m, m.T) and np.linalg.eigvalsh(m).max() <= 0,
    lx.is_diagonal: lambda m: np.allclose(m, np.diag(np.diag(m))),
    lx.is_lower_triangular: lambda m: np.allclose(m, np.tril(m)),
    lx.is_upper_triangular: lambda m: np.allclose(m, np.triu(m)),
}


def test_tags_tell_the_truth(rng):
    positive, lower = _definite(rng, 2), np.tril(rng.standard_normal((2, 2)))
    matrix = lambda m, *tags: lx.MatrixLinearOperator(jnp.asarray(m), frozenset(tags))
    psd, nsd = matrix(positive, SPD), matrix(-positive, lx.negative_semidefinite_tag)
    diagonal = lx.DiagonalLinearOperator(jnp.asarray([1.0, -2.0]))
    low, up = matrix(lower, lx.lower_triangular_tag), matrix(lower.T, lx.upper_triangular_tag)
    symmetric = lx.is_symmetric
    expected = [
        ([psd, psd], {symmetric, lx.is_positive_semidefinite}),
        ([nsd, nsd], {symmetric, lx.is_negative_semidefinite}),
        ([psd, nsd], {symmetric}),
        ([psd, diagonal], {symmetric}),
        ([diagonal, diagonal], {symmetric, lx.is_diagonal, lx.is_lower_triangular, lx.is_upper_triangular}),
        ([low, diagonal], {lx.is_lower_triangular}),
        ([up, up], {lx.is_upper_triangular}),
        ([low, up], set()),
        ([psd, low], set()),
    ]
    for blocks, known in expected:
        operator = BlockDiagonal(blocks)
        assert {check for check in _TAGS if check(operator)} == known
        for op in (operator, operator.T, operator.inverse(), operator.damped(0.1)):
            dense = scipy.linalg.block_diag(*(b.as_matrix() for b in op.blocks))
            for check, holds in _TAGS.items():
                assert holds(dense) or not check(op)
    # Lower triangular blocks that are not square do not make a lower triangular matrix.
    wide = matrix([[1.0, 0.0, 0.0]], lx.lower_triangular_tag)
    tall = matrix([[1.0], [2.0], [3.0]], lx.lower_triangular_tag)
    assert not lx.is_lower_triangular(BlockDiagonal([tall, wide]))
    assert not lx.is_lower_triangular(BlockDiagonal([wide, tall]))


def test_jit_vmap_and_one_compilation(rng):
    full = jnp.asarray(rng.standard_normal((3, 2, 2)))
    scales = jnp.asarray(rng.uniform(1, 2, (3, 4)))
    v = {"a": jnp.asarray(rng.standard_normal(2)), "b": jnp.asarray(rng.standard_normal(4))}
    traces = []

    @eqx.filter_jit
    def apply(full, v):
        traces.append(None)
        make = lambda m, s: BlockDiagonal({"a": m, "b": lx.DiagonalLinearOperator(s)})
        batch = eqx.filter_vmap(make)(full, scales)  # made inside of vmap, used outside
        return eqx.filter_vmap(lambda op: op.inverse().mv(v))(batch)

    for factor in (1.0, -2.0):
        solutions = apply(factor * full, v)
        for i in range(3):
            np.testing.assert_allclose(
                solutions["a"][i], np.linalg.solve(factor * full[i], v["a"]), rtol=1e-10
            )
        np.testing.assert_allclose(solutions["b"], v["b"] / scales, rtol=1e-14)
    assert len(traces) == 1


def test_derivatives_in_the_blocks(rng):
    """Reverse and forward mode against a dense solve and central differences."""
    point = [jnp.asarray(x) for x in (_definite(rng, 2), _definite(rng, 2), rng.standard_normal((3, 3)))]
    point.append(jnp.asarray(rng.uniform(1, 2, 2)))
    direction = [jnp.asarray(rng.standard_normal(x.shape)) for x in point]
    v = jnp.asarray(rng.standard_normal(9))
    symmetric = lambda m: 0.5 * (m + m.T)

    def ours(point):
        left, right, full, scales = point
        factors = [lx.MatrixLinearOperator(symmetric(m), SPD) for m in (left, right)]
        operator = BlockDiagonal([Kronecker(*factors), full, lx.DiagonalLinearOperator(scales)])
        out = operator.inverse().mv([v[:4].reshape(2, 2), v[4:7], v[7:]])
        return jnp.sum(jnp.sin(jnp.concatenate([x.ravel() for x in out]))) + operator.logdet()

    def dense(point):
        left, right, full, scales = point
        kron = jnp.kron(symmetric(left), symmetric(right))
        matrix = jax.scipy.linalg.block_diag(kron, full, jnp.diag(scales))
        return jnp.sum(jnp.sin(jnp.linalg.solve(matrix, v))) + jnp.linalg.slogdet(matrix)[1]

    gradient, truth = jax.jit(jax.grad(ours))(point), jax.jit(jax.grad(dense))(point)
    for g, t in zip(gradient, truth, strict=True):
        assert float(jnp.abs(t).max()) > 1e-3
        np.testing.assert_allclose(g, t, rtol=1e-8, atol=1e-9)
    compiled = jax.jit(ours)
    moved = lambda step: compiled(jax.tree.map(lambda x, d: x + step * d, point, direction))
    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    tangent = jax.jit(lambda x, d: jax.jvp(ours, (x,), (d,))[1])(point, direction)
    np.testing.assert_allclose(tangent, difference, rtol=1e-5)


def test_a_singular_block_gives_no_number_in_its_part():
    blocks = {
        "general": jnp.asarray([[1.0, 2.0], [2.0, 4.0]]),
        "diagonal": lx.DiagonalLinearOperator(jnp.asarray([0.0, 2.0])),
        "regular": 2 * jnp.eye(2),
    }
    operator = BlockDiagonal(blocks)
    solution = operator.inverse().mv({name: jnp.ones(2) for name in blocks})
    assert not np.isfinite(solution["general"]).any() and not np.isfinite(solution["diagonal"][0])
    np.testing.assert_allclose(solution["regular"], 0.5)
    assert operator.logdet() == -np.inf
    damped = operator.damped(1.0).inverse().mv({name: jnp.ones(2) for name in blocks})
    np.testing.assert_allclose(damped["general"], [0.5, 0.0], atol=1e-15)  # the control


def test_a_linear_solve_with_it(rng):
    """Lineax's own solvers take it, in products and by its tags."""
    matrices = {"a": _definite(rng, 2), "b": _definite(rng, 3)}
    operator = BlockDiagonal({k: lx.MatrixLinearOperator(jnp.asarray(m), SPD) for k, m in matrices.items()})
    v = _vector(operator.in_structure(), rng)
    for solver in (lx.CG(rtol=1e-12, atol=1e-12), lx.AutoLinearSolver(well_posed=True)):
        solution = lx.linear_solve(operator, v, solver).value
        for name, matrix in matrices.items():
            np.testing.assert_allclose(matrix @ solution[name], v[name], atol=1e-10)


def test_wrong_blocks_and_vectors_are_refused():
    for nothing in ({}, [], None):
        with pytest.raises(ValueError, match="holds no block"):
            BlockDiagonal(nothing)
    with pytest.raises(ValueError, match=r"`blocks\['a'\]\[0\]` must be a real floating-point matrix"):
        BlockDiagonal({"a": [jnp.ones(3)]})
    with pytest.raises(ValueError, match=r"`blocks\[1\]` of `BlockDiagonal` must act on real"):
        BlockDiagonal([jnp.eye(2), lx.MatrixLinearOperator(jnp.eye(2, dtype=np.complex128))])
    operator = BlockDiagonal({"a": jnp.eye(2), "b": lx.DiagonalLinearOperator(jnp.ones(2))})
    assert operator.mv({"a": jnp.ones(2), "b": jnp.ones(2)})["a"].shape == (2,)  # the control
    wrong = [
        {"a": jnp.ones(2)},
        {"a": jnp.ones(2), "b": jnp.ones(())},
        {"a": jnp.ones(2), "b": jnp.ones((2, 2))},
        [jnp.ones(2)] * 2,
    ]
    for vector in wrong:
        with pytest.raises(ValueError, match="`vector` must have the structure"):
            operator.mv(vector)
    with pytest.raises(ValueError, match="must not be negative"):
        operator.damped(-0.1)
