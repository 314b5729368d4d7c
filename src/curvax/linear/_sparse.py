"""Preconditioners that a library on the host applies: how a matrix gets there, and the operator that comes back."""

import math
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_dtype
from curvax.operators._base import structure as structure_of
from curvax.operators._damped import is_square
from curvax.operators._dense import dense_matrix, ravel, unravel
from curvax.operators._dispatch import register

# An operator of which products are known is written out for its entries up to this size, n products.
MAX_WRITTEN_OUT = 4096


class HostSolve(Protocol):
    """P⁻¹ applied to the columns of a float64 matrix, by NumPy alone."""

    def __call__(self, columns: np.ndarray, transposed: bool) -> np.ndarray: ...


class SparsePreconditioner(lx.AbstractLinearOperator):
    """P⁻¹ for a sparse P; made by `incomplete_cholesky`, `incomplete_lu` and `amg`.

    Applied in float64 on the host, whatever the vectors are and wherever they live. Works under `jit`, `vmap` (one
    call for the whole batch) and, being linear, under every derivative in the vector. The factors are part of the
    program and not of its data: a function compiled for one preconditioner is compiled again for another.

    Attributes:
        fill: Entries of the factors (of all levels, for `amg`) for each entry of the matrix.
        shift: Fraction of the diagonal that was added before `incomplete_cholesky` went through; 0 for the others.
        tags: `lx.positive_semidefinite_tag`, or none for `incomplete_lu`.
    """

    solve: HostSolve = eqx.field(static=True)
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)
    fill: float = eqx.field(static=True)
    shift: float = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """P⁻¹ v, in one call to the host."""
        structure = self.in_structure()
        product = self._product(self.transposed)
        # A linear map with a transpose of its own: `matvec` is never called.
        flat = jax.lax.custom_linear_solve(
            lambda v: v,
            ravel(vector, tree_dtype(structure)),
            solve=lambda _, v: product(v),
            transpose_solve=lambda _, v: self._product(not self.transposed)(v),
        )
        return unravel(flat, structure)

    def _product(self, transposed: bool) -> Any:
        def on_host(vectors: Array) -> np.ndarray:
            rows = np.asarray(vectors)
            columns = rows.reshape(-1, rows.shape[-1]).astype(np.float64).T
            solved = self.solve(columns, transposed)
            return np.ascontiguousarray(solved.T).reshape(rows.shape).astype(rows.dtype)

        def product(vector: Float[Array, " n"]) -> Float[Array, " n"]:
            like = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
            return jax.pure_callback(on_host, like, vector, vmap_method="expand_dims")

        return product

    def as_matrix(self) -> Float[Array, "n n"]:
        """P⁻¹ over raveled leaves. Raises `ValueError` above a size limit."""
        return dense_matrix(self)

    def transpose(self) -> "SparsePreconditioner":
        """P⁻ᵀ, from the same factors."""
        if self.tags:
            return self
        return SparsePreconditioner(
            self.solve, self.leaves, self.treedef, self.fill, self.shift, not self.transposed, self.tags
        )

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return jax.tree.unflatten(self.treedef, self.leaves)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.in_structure()


register(SparsePreconditioner)


def preconditioner(
    solve: HostSolve,
    structure: PyTree[jax.ShapeDtypeStruct],
    *,
    fill: float,
    shift: float = 0.0,
    definite: bool,
) -> SparsePreconditioner:
    """The operator, over vectors of this structure."""
    leaves, treedef = jax.tree.flatten(structure)
    tags = frozenset({lx.positive_semidefinite_tag}) if definite else frozenset()
    return SparsePreconditioner(solve, tuple(leaves), treedef, float(fill), float(shift), False, tags)


def read_matrix(name: str, matrix: Any, structure: PyTree | None) -> tuple[Any, PyTree]:
    """The entries as a `scipy.sparse.csr_array` of float64 without zeros, and the structure of the vectors."""
    import scipy.sparse  # slow to import

    if isinstance(matrix, lx.AbstractLinearOperator):
        if structure is not None:
            raise ValueError(
                f"`structure` of `{name}` is for matrices; the operator has one of its own. Leave it out."
            )
        entries, structure, dtype = _of_operator(name, matrix), matrix.in_structure(), None
    else:
        entries = _of_matrix(name, matrix)
        dtype = entries.dtype
    if np.iscomplexobj(entries):
        raise ValueError(f"`matrix` of `{name}` must be real, found {entries.dtype}.")
    entries = scipy.sparse.csr_array(entries, dtype=np.float64)
    entries.sum_duplicates()
    entries.eliminate_zeros()
    rows, columns = entries.shape
    if rows != columns or rows == 0:
        raise ValueError(
            f"`matrix` of `{name}` must be square and not empty, found {rows} × {columns}. For least squares pass "
            "JᵀJ + damping · I."
        )
    if not np.all(np.isfinite(entries.data)):
        raise ValueError(f"`matrix` of `{name}` holds a NaN or an infinity.")
    if structure is None:
        floating = dtype if dtype is not None and np.issubdtype(dtype, np.floating) else np.float64
        structure = jax.ShapeDtypeStruct((rows,), jax.dtypes.canonicalize_dtype(floating))
    return entries, _checked_structure(name, structure, rows)


def check_definite(name: str, matrix: Any) -> None:
    """Raise unless a sparse matrix is symmetric with a positive diagonal: what can be seen at a glance."""
    largest = abs(matrix).max()
    difference = abs(matrix - matrix.T).max()
    # Entries made in float32 are symmetric to its rounding alone.
    if difference > 1e-5 * largest:
        raise ValueError(
            f"`matrix` of `{name}` must be symmetric, found entries that differ from their mirror images by "
            f"{difference:.1e}, where the largest is {largest:.1e}. Use `cx.linear.incomplete_lu` with `lx.GMRES`, "
            "`cx.linear.FGMRES` or `lx.BiCGStab`."
        )
    diagonal = matrix.diagonal()
    if not np.all(diagonal > 0):
        row = int(np.argmin(diagonal))
        raise ValueError(
            f"`matrix` of `{name}` must be positive definite, found {diagonal[row]:.3g} on the diagonal, in row {row}. "
            "Add damping, `matrix + c * scipy.sparse.eye_array(n)`; for an indefinite matrix use "
            "`cx.linear.jacobi` with `cx.linear.MINRES`, or `cx.linear.incomplete_lu` with `lx.GMRES`."
        )


def check_number(name: str, argument: str, value: Any, least: float, *, strictly: bool = False) -> float:
    """A known finite number of at least (or above) `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"`{argument}` of `{name}` must be a Python number, found {type(value).__name__}.")
    if not (value > least if strictly else value >= least) or not math.isfinite(value):
        raise ValueError(
            f"`{argument}` of `{name}` must be {'above' if strictly else 'at least'} {least:g} and finite, found "
            f"{value}."
        )
    return float(value)


def _of_operator(name: str, operator: lx.AbstractLinearOperator) -> np.ndarray:
    if not is_square(operator):
        raise ValueError(
            f"`matrix` of `{name}` must be square, with one structure for input and output, found "
            f"{operator.out_structure()} from {operator.in_structure()}."
        )
    if operator.in_size() > MAX_WRITTEN_OUT:
        raise ValueError(
            f"`matrix` of `{name}` is an operator of size {operator.in_size()}, of which the entries would cost as "
            f"many products, over the limit of {MAX_WRITTEN_OUT}. Pass its entries as a `scipy.sparse` matrix, or use "
            "`cx.linear.nystrom` or `cx.linear.jacobi`, which need products only."
        )
    _check_known(name, operator)
    return np.asarray(eqx.filter_jit(dense_matrix)(operator))


def _of_matrix(name: str, matrix: Any) -> Any:
    import scipy.sparse
    from jax.experimental import sparse

    if isinstance(matrix, sparse.BCSR):
        matrix = matrix.to_bcoo()
    if isinstance(matrix, sparse.BCOO):
        _check_known(name, matrix)
        if matrix.n_batch or matrix.n_dense or matrix.ndim != 2:
            raise ValueError(
                f"`matrix` of `{name}` must be a plain sparse matrix, found a BCOO of shape {matrix.shape} with "
                f"{matrix.n_batch} batch and {matrix.n_dense} dense axes."
            )
        indices, data = np.asarray(matrix.indices), np.asarray(matrix.data)
        inside = np.all(indices < np.asarray(matrix.shape), axis=1)  # padding has an index outside
        return scipy.sparse.coo_array((data[inside], tuple(indices[inside].T)), shape=matrix.shape)
    if scipy.sparse.issparse(matrix):
        return matrix
    raise ValueError(
        f"`matrix` of `{name}` must be a `scipy.sparse` matrix, a `BCOO` or `BCSR` of JAX or a Lineax operator, found "
        f"{type(matrix).__name__}. Wrap a dense array: `scipy.sparse.csr_array(array)`."
    )


def _check_known(name: str, tree: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"`matrix` of `{name}` must be known numbers, found traced ones: it is factorised on the host, once. Make "
            "the preconditioner outside of `jit`, `grad` and `vmap`, and use it inside."
        )


def _checked_structure(name: str, structure: PyTree, size: int) -> PyTree[jax.ShapeDtypeStruct]:
    shapes = structure_of(eqx.filter(structure, lambda leaf: hasattr(leaf, "shape")))
    leaves = jax.tree.leaves(shapes)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise ValueError(
            f"`structure` of `{name}` must hold real floating-point arrays, found "
            f"{sorted({str(leaf.dtype) for leaf in leaves})}. Filter it: `eqx.filter(theta, eqx.is_inexact_array)`."
        )
    total = sum(leaf.size for leaf in leaves)
    if total != size:
        raise ValueError(
            f"`structure` of `{name}` has {total} elements, and `matrix` has {size} rows. They must be as many: the "
            "rows belong to the raveled leaves, in order."
        )
    return shapes
