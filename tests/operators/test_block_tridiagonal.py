"""`BlockTridiagonal` against dense matrices of NumPy and sparse ones of SciPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse

from curvax.operators._block_tridiagonal import BlockTridiagonal
from helpers.sweep import sweep

# (tags, whether the blocks above are given): block LU, block LU of a symmetric matrix, block Cholesky.
KINDS = {
    "general": ((), True),
    "symmetric": ((), False),
    "definite": (lx.positive_semidefinite_tag, False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _blocks(kind, k, n, rng):
    """Blocks and their dense matrix; the symmetric one is indefinite."""
    _, with_upper = KINDS[kind]
    diagonal = rng.standard_normal((k, n, n)) + 7 * np.eye(n)
    if kind != "definite":
        diagonal[::2] -= 14 * np.eye(n)
    lower = rng.standard_normal((k - 1, n, n))
    upper = rng.standard_normal((k - 1, n, n)) if with_upper else None
    return diagonal, lower, upper


def _dense(diagonal, lower, upper, xp=np):
    """The matrix written out, in NumPy or JAX; without `upper` the symmetric one."""
    k, n = diagonal.shape[:2]
    if upper is None:
        diagonal, upper = 0.5 * (diagonal + xp.swapaxes(diagonal, 1, 2)), xp.swapaxes(lower, 1, 2)
    zero = xp.zeros((n, n), diagonal.dtype)
    cell = lambda i, j: (
        diagonal[i] if i == j else lower[j] if i == j + 1 else upper[i] if j == i + 1 else zero
    )
    return xp.block([[cell(i, j) for j in range(k)] for i in range(k)])


def _make(kind, blocks, dtype=np.float64):
    cast = [None if b is None else jnp.asarray(b, dtype) for b in blocks]
    return BlockTridiagonal(*cast, tags=KINDS[kind][0])


@pytest.mark.parametrize(
    ("k", "dtype", "kind"),
    sweep(
        [
            (k, dtype, kind)
            for kind in KINDS
            for k, dtype in ((1, np.float64), (4, np.float32), (4, np.float64))
        ],
        always=[*((k, np.float64, kind) for kind in KINDS for k in (1, 4)), (4, np.float32, "general")],
    ),
)
def test_products_inverse_and_numbers(kind, k, dtype, rng):
    blocks = _blocks(kind, k, 3, rng)
    truth, v = _dense(*blocks), rng.standard_normal((k, 3))
    tolerance = 1e-11 if dtype == np.float64 else 3e-4

    @eqx.filter_jit
    def all_of_it(operator, v):
        inverse = operator.inverse()
        products = [op.mv(v) for op in (operator, operator.T, inverse, inverse.T, inverse.inverse())]
        numbers = operator.trace(), operator.logdet(), inverse.logdet()
        return products, numbers, operator.diagonal(), operator.as_matrix(), operator.damped(0.5).as_matrix()

    products, numbers, diagonal, matrix, damped = all_of_it(_make(kind, blocks, dtype), jnp.asarray(v, dtype))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((products, numbers, diagonal, matrix)))
    np.testing.assert_allclose(matrix, truth, atol=tolerance)
    np.testing.assert_allclose(damped, truth + 0.5 * np.eye(3 * k), atol=tolerance)
    inverse = np.linalg.inv(truth)
    for product, dense in zip(products, (truth, truth.T, inverse, inverse.T, truth), strict=True):
        np.testing.assert_allclose(product, (dense @ v.ravel()).reshape(k, 3), atol=tolerance)
    logdet = np.linalg.slogdet(truth)[1]
    np.testing.assert_allclose(numbers, (np.trace(truth), logdet, -logdet), atol=10 * tolerance)
    np.testing.assert_allclose(diagonal, np.diag(truth), atol=tolerance)


@every_kind
def test_tags_tell_the_truth(kind, rng):
    operator = _make(kind, _blocks(kind, 4, 2, rng))

    @eqx.filter_jit
    def written(op):
        others = (
            () if not isinstance(op, BlockTridiagonal) else (lx.materialise(op), lx.conj(lx.linearise(op)))
        )
        return op.as_matrix(), *(other.as_matrix() for other in others), lx.diagonal(op)

    for op in (operator.T, operator.damped(0.1), operator.inverse(), operator.inverse().T):
        matrix, *same, diagonal = map(np.asarray, written(op))
        assert lx.is_symmetric(op) == np.allclose(matrix, matrix.T, atol=1e-12) == (kind != "general")
        definite = kind != "general" and np.linalg.eigvalsh(matrix).min() > 0
        assert lx.is_positive_semidefinite(op) == definite == (kind == "definite")
        assert not lx.is_diagonal(op) and not lx.is_negative_semidefinite(op)
        np.testing.assert_allclose(diagonal, np.diag(matrix), atol=1e-12)
        for other in same:
            np.testing.assert_allclose(other, matrix, atol=1e-12)


def test_triangular_tags_turn_over_and_negative_definite_ones_do_not_survive_damping(rng):
    diagonal, lower, _ = _blocks("general", 3, 2, rng)
    triangular = BlockTridiagonal(
        np.tril(diagonal), lower, np.zeros_like(lower), tags=lx.lower_triangular_tag
    )
    assert lx.is_lower_triangular(triangular.inverse()) and lx.is_upper_triangular(triangular.inverse().T)
    assert lx.is_upper_triangular(triangular.T) and not lx.is_lower_triangular(triangular.T)
    last = triangular.inverse().mv(jnp.zeros((3, 2)).at[2, 1].set(1.0))  # the last column
    np.testing.assert_allclose(last, np.eye(6)[5].reshape(3, 2) / diagonal[2, 1, 1], atol=1e-14)
    negative = BlockTridiagonal(-np.eye(2)[None], np.zeros((0, 2, 2)), tags=lx.negative_semidefinite_tag)
    assert lx.is_negative_semidefinite(negative.inverse())
    assert not lx.is_negative_semidefinite(negative.damped(2.0))


@every_kind
def test_jit_vmap_and_one_compilation(kind, rng):
    batch = [_blocks(kind, 3, 2, rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *batch)
    v = jnp.asarray(rng.standard_normal((3, 2)))
    traces = []

    @eqx.filter_jit
    def apply(stacked, v):
        traces.append(None)
        inverses = eqx.filter_vmap(lambda b: _make(kind, b).inverse())(stacked)  # made inside, used outside
        return eqx.filter_vmap(lambda inverse: inverse.mv(v))(inverses)

    for scale in (1.0, -2.0):
        solutions = apply(stacked, scale * v)
        for blocks, solution in zip(batch, solutions, strict=True):
            truth = np.linalg.solve(_dense(*blocks), scale * np.ravel(v))
            np.testing.assert_allclose(solution.ravel(), truth, atol=1e-11)
    assert len(traces) == 1


@every_kind
def test_derivatives_in_the_blocks(kind, rng):
    """Of a solve, a transposed solve and the determinant, against a dense solve and central differences."""
    blocks = jax.tree.map(jnp.asarray, _blocks(kind, 3, 2, rng))
    direction = jax.tree.map(lambda b: jnp.asarray(rng.standard_normal(b.shape)), blocks)
    v, w = jnp.asarray(rng.standard_normal((2, 3, 2)))

    def ours(blocks):
        operator = _make(kind, blocks)
        inverse = operator.inverse()
        return (
            jnp.vdot(w, jnp.sin(inverse.mv(v)) + (jnp.cos(inverse.T.mv(v)) if kind == "general" else 0.0))
            - inverse.logdet()
        )

    def dense(blocks):
        matrix = _dense(*blocks, xp=jnp)
        solution, transposed = jnp.linalg.solve(matrix, v.ravel()), jnp.linalg.solve(matrix.T, v.ravel())
        return (
            w.ravel() @ (jnp.sin(solution) + (jnp.cos(transposed) if kind == "general" else 0.0))
            + jnp.linalg.slogdet(matrix)[1]
        )

    ours_and_gradient = jax.jit(jax.value_and_grad(ours))
    gradient, truth = ours_and_gradient(blocks)[1], jax.jit(jax.grad(dense))(blocks)
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves(truth))
    for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(g, t, atol=1e-11)
    moved = lambda step: ours_and_gradient(jax.tree.map(lambda b, d: b + step * d, blocks, direction))[0]
    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert abs(difference) > 1e-4
    _, tangent = jax.jit(lambda b, d: jax.jvp(ours, (b,), (d,)))(blocks, direction)
    np.testing.assert_allclose(tangent, difference, rtol=1e-5)


def _poisson(k, n):
    """Five-point Laplacian of a k × n grid: its blocks, SciPy's sparse matrix and its smallest eigenvalue."""
    line = lambda m: scipy.sparse.diags_array(
        [-np.ones(m - 1), 2 * np.ones(m), -np.ones(m - 1)], offsets=[-1, 0, 1]
    )
    sparse = scipy.sparse.kron(line(k), np.eye(n)) + scipy.sparse.kron(np.eye(k), line(n))
    smallest = sum(2 - 2 * np.cos(np.pi / (m + 1)) for m in (k, n))
    diagonal = np.tile(line(n).toarray() + 2 * np.eye(n), (k, 1, 1))
    return diagonal, np.tile(-np.eye(n), (k - 1, 1, 1)), sparse.tocsr(), smallest


@pytest.mark.parametrize("tags", [(), lx.positive_semidefinite_tag])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_residual_of_an_ill_conditioned_poisson_matrix(tags, dtype, rng):
    """Shifted almost to its smallest eigenvalue: condition 8e4 in float32, 8e10 in float64."""
    k, n = 24, 6
    diagonal, lower, sparse, smallest = _poisson(k, n)
    distance = 1e-4 if dtype == np.float32 else 1e-10
    shift = smallest - distance
    operator = BlockTridiagonal(
        jnp.asarray(diagonal - shift * np.eye(n), dtype), jnp.asarray(lower, dtype), tags=tags
    )
    stored = (sparse - shift * scipy.sparse.eye_array(k * n)).toarray().astype(dtype).astype(np.float64)
    b = rng.standard_normal((k, n)).astype(dtype)
    x = eqx.filter_jit(lambda op, b: op.inverse().mv(b))(operator, jnp.asarray(b))
    x = np.asarray(x, np.float64).ravel()
    residual = np.linalg.norm(stored @ x - b.ravel())
    assert residual < 10 * np.finfo(dtype).eps * (8 * np.linalg.norm(x) + np.linalg.norm(b))
    # So ill-conditioned it is: most of the solution is the smallest eigenvector.
    assert np.linalg.norm(x) > 0.01 * np.linalg.norm(b) / distance


@every_kind
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_singular_block_gives_nan_and_never_a_number(kind, where, rng):
    diagonal, lower, upper = _blocks(kind, 3, 2, rng)
    lower, upper = 0 * lower, None if upper is None else 0 * upper
    for factor in (1.0, 0.0):  # the control, and the singular one
        blocks = diagonal.copy()
        blocks[where, 0], blocks[where, :, 0] = factor * blocks[where, 0], factor * blocks[where, :, 0]
        operator = _make(kind, (blocks, lower, upper))
        solution = operator.inverse().mv(jnp.ones((3, 2)))
        transposed = operator.inverse().T.mv(jnp.ones((3, 2)))
        if factor:
            assert np.isfinite(operator.logdet())
            np.testing.assert_allclose(
                solution.ravel(), np.linalg.solve(_dense(blocks, lower, upper), np.ones(6)), rtol=1e-12
            )
        else:
            assert not np.isfinite(solution).any() and not np.isfinite(transposed).any()
            known = where == 2 or kind == "definite"
            np.testing.assert_equal(float(operator.logdet()), -np.inf if known else np.nan)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    sweep(
        [(dtype, kind) for kind in KINDS for dtype in (np.float32, np.float64)],
        always=[*((np.float64, kind) for kind in KINDS), (np.float32, "definite")],
    ),
)
def test_singular_up_to_rounding_is_singular(kind, dtype):
    """Laplacian of a path with couplings that do not round well: the last pivot is rounding alone."""
    rng = np.random.default_rng(5)
    for _ in range(5):
        weights = rng.uniform(0.1, 3.0, 5).astype(dtype)
        degree = (np.append(weights, 0) + np.append(0, weights)).astype(dtype)
        singular, lower = degree[:, None, None], -weights[:, None, None]
        upper = lower if KINDS[kind][1] else None
        solve = lambda d, lower=lower, upper=upper: (
            _make(kind, (d, lower, upper), dtype).inverse().mv(jnp.ones((6, 1), dtype))
        )
        assert np.isnan(solve(singular)).all()
        assert np.isfinite(solve(singular + dtype(1e-3))).all()  # the control


def test_what_only_pivoting_between_blocks_would_solve_is_nan():
    swap = BlockTridiagonal(np.zeros((2, 1, 1)), np.ones((1, 1, 1)))
    assert np.isnan(swap.inverse().mv(jnp.ones((2, 1)))).all() and np.isnan(swap.logdet())
    np.testing.assert_allclose(swap.damped(2.0).inverse().mv(jnp.ones((2, 1))), 1 / 3, rtol=1e-14)


def test_a_tag_that_is_not_true_gives_nan():
    indefinite = BlockTridiagonal(-np.eye(2)[None], np.zeros((0, 2, 2)), tags=lx.positive_semidefinite_tag)
    assert np.isnan(indefinite.inverse().mv(jnp.ones((1, 2)))).all()


def test_wrong_shapes_dtypes_and_tags_are_refused():
    d, e = np.ones((3, 2, 2)), np.ones((2, 2, 2))
    assert BlockTridiagonal(d, e, e).mv(jnp.ones((3, 2))).shape == (3, 2)  # the control
    refused = [
        ("`diagonal`", (np.ones((3, 2, 4)), e)),
        ("`diagonal`", (np.ones((3, 2)), e)),
        ("`diagonal`", (np.ones((0, 2, 2)), e)),
        ("`diagonal`", (np.ones((3, 2, 2), np.int32), e)),
        ("`diagonal`", (np.ones((3, 2, 2), np.complex128), e)),
        ("`lower`", (d, d)),
        ("`lower`", (d, e.astype(np.float32))),
        ("`upper`", (d, e, d)),
        ("leave `upper` out", (d, e, e, lx.symmetric_tag)),
        ("leave `upper` out", (d, e, e, lx.positive_semidefinite_tag)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            BlockTridiagonal(*arguments)
    operator = BlockTridiagonal(d + 5 * np.eye(2), e)
    for wrong in (jnp.ones(6), jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.ones((2, 3))):
        for applied in (operator, operator.inverse()):
            with pytest.raises(ValueError, match="`vector` must have the shape"):
                applied.mv(wrong)
    with pytest.raises(ValueError, match="must not be negative"):
        operator.damped(-1.0)
    with pytest.raises(ValueError, match="needs the entries or a structure"):
        operator.inverse().damped(0.1).inverse()
