"""An incomplete LU factorisation as a preconditioner."""

from typing import Any

import numpy as np
from jaxtyping import PyTree

from curvax.linear._sparse import SparsePreconditioner, check_number, preconditioner, read_matrix


def incomplete_lu(
    matrix: Any,
    *,
    drop_tolerance: float = 1e-4,
    fill_factor: float = 10.0,
    structure: PyTree | None = None,
) -> SparsePreconditioner:
    """(L U)⁻¹ for sparse triangles with L U ≈ A, as a preconditioner for GMRES, FGMRES and BiCGSTAB.

    By threshold, with pivoting and a fill-reducing order of the columns (SuperLU). The result is not symmetric, not
    even for a symmetric A, and not tagged so: `cx.linear.CG` and `MINRES` refuse it. Use
    `cx.linear.incomplete_cholesky` for them.

    Args:
        matrix: A: a `scipy.sparse` matrix, a `BCOO` or `BCSR` of JAX, or a Lineax operator of size 4096 at most, which
            costs n products. Known numbers, not traced.
        drop_tolerance: Entries below this fraction of the largest in their column are dropped; within [0, 1].
        fill_factor: Entries of the factors for each one of A, at most; at least 1.
        structure: What vectors look like, a pytree of arrays or of `jax.ShapeDtypeStruct`; rows of A belong
            to its raveled leaves. By default a vector of n numbers.

    Returns:
        A `SparsePreconditioner` without tags; its transpose serves the transposed system, as derivatives need it.

    Raises:
        ValueError: The matrix is not square, real, finite and known; it, or its incomplete factorisation, is singular
            to working precision; an argument is out of range.

    Cost: to make it, that of a sparse factorisation with so many entries; to apply it, 2 operations for each of them
        and 50 µs for the call to the host.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, scipy.sparse as sp, curvax as cx

        A = sp.diags_array([-1.5, 2.0, -0.5], offsets=[-1, 0, 1], shape=(50, 50))
        P = cx.linear.incomplete_lu(A)
        dense = lx.MatrixLinearOperator(jnp.asarray(A.toarray()))
        lx.linear_solve(dense, jnp.ones(50), cx.linear.FGMRES(rtol=1e-4), options={"preconditioner": P})
        ```

    Source: X. S. Li, M. Shao, "A supernodal approach to incomplete LU factorization with partial pivoting", 2011; for
        the test of stability E. Chow, Y. Saad, "Experimental study of ILU preconditioners for indefinite matrices",
        1997.
    """
    import scipy.sparse.linalg

    name = "incomplete_lu"
    drop = check_number(name, "drop_tolerance", drop_tolerance, 0)
    if drop > 1:
        raise ValueError(
            f"`drop_tolerance` of `incomplete_lu` must be at most 1, found {drop}: it is a fraction."
        )
    fill = check_number(name, "fill_factor", fill_factor, 1)
    entries, shape = read_matrix(name, matrix, structure)
    try:
        factors = scipy.sparse.linalg.spilu(entries.tocsc(), drop_tol=drop, fill_factor=fill)
        # ‖(LU)⁻¹ 1‖ is what an unstable factorisation blows up.
        size = np.abs(factors.solve(np.ones(entries.shape[0]))).max() * abs(entries).sum(axis=1).max()
    except RuntimeError:  # "Factor is exactly singular"
        size = np.inf
    if not size < 1 / np.finfo(np.float64).eps:
        raise ValueError(
            "`matrix` of `incomplete_lu`, or its incomplete factorisation, is singular to working precision: the "
            f"condition number is about {size:.1e} at least. Lower `drop_tolerance`, raise `fill_factor`, or add a "
            "multiple of the identity."
        )
    ratio = factors.nnz / max(entries.nnz, 1)
    return preconditioner(_Factors(factors), shape, fill=ratio, definite=False)


class _Factors:
    """(LU)⁻¹ and its transpose."""

    def __init__(self, factors: Any) -> None:
        self.factors = factors

    def __call__(self, columns: np.ndarray, transposed: bool) -> np.ndarray:
        return self.factors.solve(columns, "T" if transposed else "N")
