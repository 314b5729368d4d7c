"""Algebraic multigrid as a preconditioner."""

from typing import Any

import numpy as np
from jaxtyping import PyTree

from curvax.linear._sparse import (
    SparsePreconditioner,
    check_definite,
    preconditioner,
    read_matrix,
)

_MISSING = (
    "`amg` needs pyamg, which is not installed. Install it with `pip install 'curvax[sparse]'`; "
    "`cx.linear.incomplete_cholesky` needs SciPy alone."
)
# Cycles after which negative curvature shows.
_TRIALS = 10
_METHODS = ("smoothed_aggregation", "ruge_stuben")


def amg(
    matrix: Any,
    *,
    method: str = "smoothed_aggregation",
    near_null_space: np.ndarray | None = None,
    structure: PyTree | None = None,
) -> SparsePreconditioner:
    """One V-cycle of algebraic multigrid, as a preconditioner for CG and MINRES.

    Coarser and coarser versions of A are made from its entries alone, down to a few rows; a cycle smooths the error on
    every level, by a symmetric Gauss–Seidel sweep on the way down and one on the way up, and solves on the last. It
    is symmetric and positive definite. For matrices of elliptic equations and graph Laplacians the number of CG
    steps hardly grows with n, which no factorisation with bounded fill achieves. For others it may not help at all.

    Args:
        matrix: A, symmetric positive definite: a `scipy.sparse` matrix, a `BCOO` or `BCSR` of JAX, or a Lineax
            operator of size 4096 at most, which costs n products. Known numbers, not traced.
        method: `"smoothed_aggregation"`, or `"ruge_stuben"`, the classical one, for off-diagonal entries that are not
            positive.
        near_null_space: (n, k), vectors that A almost takes to zero, for smoothed aggregation: the rigid motions of
            an elastic body; by default the constant.
        structure: What vectors look like, a pytree of arrays or of `jax.ShapeDtypeStruct`; rows of A belong
            to its raveled leaves. By default a vector of n numbers.

    Returns:
        A `SparsePreconditioner`, tagged `lx.positive_semidefinite_tag`; `fill` counts the entries of all levels for
        each one of A. The same for the same matrix: what pyamg draws at random, it draws from a fixed seed.

    Raises:
        ImportError: pyamg is missing: `pip install 'curvax[sparse]'`.
        ValueError: The matrix is not square, real, finite, symmetric, known and of a positive diagonal, or ten cycles
            show negative curvature (which they may miss where it is tiny); `method` is another word, or
            `near_null_space` has another shape.

    Cost: to make it, that of some ten products of sparse matrices, on the host; a cycle that of about ten products with
        A, and 200 µs.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, scipy.sparse as sp, curvax as cx

        A = sp.diags_array([-1.0, 2.1, -1.0], offsets=[-1, 0, 1], shape=(50, 50))
        P = cx.linear.amg(A)
        dense = lx.MatrixLinearOperator(jnp.asarray(A.toarray()), lx.positive_semidefinite_tag)
        lx.linear_solve(dense, jnp.ones(50), cx.linear.CG(rtol=1e-4), options={"preconditioner": P})
        ```

    Source: P. Vaněk, J. Mandel, M. Brezina, "Algebraic multigrid by smoothed aggregation for second and fourth order
        elliptic problems", 1996; J. W. Ruge, K. Stüben, "Algebraic multigrid", 1987; N. Bell, L. N. Olson, J. Schroder,
        B. Southworth, "PyAMG: algebraic multigrid solvers in Python", 2023.
    """
    try:
        import pyamg
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error

    name = "amg"
    if method not in _METHODS:
        raise ValueError(f"`method` of `amg` must be one of {', '.join(_METHODS)}, found {method!r}.")
    entries, shape = read_matrix(name, matrix, structure)
    check_definite(name, entries)
    options: dict[str, Any] = {}
    if near_null_space is not None:
        options["B"] = _near_null_space(near_null_space, method, entries.shape[0])
    make = pyamg.smoothed_aggregation_solver if method == _METHODS[0] else pyamg.ruge_stuben_solver
    symmetric = ("gauss_seidel", {"sweep": "symmetric"})
    # pyamg draws from NumPy's global generator.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        levels = make(_with_small_indices(entries), presmoother=symmetric, postsmoother=symmetric, **options)
    finally:
        np.random.set_state(state)
    cycle = _Cycle(levels)
    _check_curvature(entries, cycle)
    return preconditioner(cycle, shape, fill=levels.operator_complexity(), definite=True)


def _check_curvature(entries: Any, cycle: "_Cycle") -> None:
    """Raise where the matrix is seen to be indefinite: cycles take away all but what they do not converge on."""
    error = np.random.default_rng(0).standard_normal((entries.shape[0], 1))
    for _ in range(_TRIALS):
        error = error - cycle(entries @ error, False)
        size = np.linalg.norm(error)
        if not size > 0:
            return
        error /= size
    image = entries @ error
    curvature, rounding = float(np.sum(error * image)), 1e-12 * float(np.linalg.norm(image))
    if not curvature >= -rounding:
        raise ValueError(
            f"`matrix` of `amg` is not positive definite: vᵀAv = {curvature:.3g} for a unit vector v. Add damping · I, "
            "or take `cx.linear.incomplete_lu` with GMRES."
        )


class _Cycle:
    """One V-cycle from zero, symmetric because both smoothers are the same symmetric one."""

    def __init__(self, levels: Any) -> None:
        self.levels = levels

    def __call__(self, columns: np.ndarray, transposed: bool) -> np.ndarray:
        del transposed
        cycles = [self.levels.solve(np.ascontiguousarray(c), maxiter=1, tol=0.0) for c in columns.T]
        return np.stack(cycles, axis=1)


def _with_small_indices(entries: Any) -> Any:
    """pyamg's kernels are for 32-bit indices."""
    import scipy.sparse

    indices, indptr = entries.indices.astype(np.int32), entries.indptr.astype(np.int32)
    return scipy.sparse.csr_array((entries.data, indices, indptr), shape=entries.shape)


def _near_null_space(vectors: Any, method: str, size: int) -> np.ndarray:
    if method != "smoothed_aggregation":
        raise ValueError("`near_null_space` of `amg` is for `method='smoothed_aggregation'` only.")
    array = np.asarray(vectors, np.float64)
    if array.ndim != 2 or len(array) != size or array.shape[1] == 0 or not np.all(np.isfinite(array)):
        raise ValueError(
            f"`near_null_space` of `amg` must be finite, of shape ({size}, k) with k ≥ 1, found shape {array.shape}."
        )
    return array
