"""The positive part H⁺ and the absolute value |H| of a curvature, with a floor under its eigenvalues."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Scalar

from curvax._pytree import tree_dtype
from curvax.operators._block_diagonal import BlockDiagonal
from curvax.operators._circulant import AbstractCirculant, Circulant
from curvax.operators._damped import Damped, check_real, damped_part, is_square, tagged
from curvax.operators._dense import MAX_DENSE_ELEMENTS
from curvax.operators._kronecker import EigenKronecker, Kronecker
from curvax.operators._kronecker_sum import KroneckerSum
from curvax.operators._lanczos_function import LanczosFunction
from curvax.operators._low_rank import LowRankPlusDiagonal
from curvax.operators._matrix_function import TAGS, Floored, MatrixFunction, eigen, matrix_function
from curvax.operators._parts import EXACT, untagged
from curvax.operators._sketches import check_count
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric
from curvax.operators._written_out import written_out

_PSD = lx.positive_semidefinite_tag


def positive_part(
    operator: lx.AbstractLinearOperator,
    floor: Scalar | float = 0.0,
    *,
    method: Literal["exact", "lanczos"] = "exact",
    num_steps: int | None = None,
) -> AbstractStructuredOperator | LanczosFunction:
    """H⁺: the eigenvectors of H with max(λ, floor) for its eigenvalues λ.

    The positive semidefinite matrix nearest to H (in the Frobenius norm, for floor 0). Where H curves down, a step with
    its inverse is −g/floor: the smaller the floor, the longer. `absolute_value` uses |λ| there instead.

    Args:
        operator: H, real, tagged symmetric or definite, over vectors of any structure.
        floor: A scalar ≥ 0 in the units of the eigenvalues. With 0 the result may be singular; above, it is positive
            definite and `inverse()` has the eigenvalues 1/max(λ, floor).
        method: "exact" takes the eigendecomposition that the structure of H has: `Kronecker` and `EigenKronecker`,
            `Circulant`, `LowRankPlusDiagonal` with a scalar diagonal and no `right`, `BlockDiagonal` block by block,
            diagonal ones, and any of them damped; anything else is written out, below a size limit. "lanczos"
            takes `num_steps` products with H for each product, and forms nothing.
        num_steps: For "lanczos", at least 2.

    Returns:
        Tagged symmetric and positive semidefinite. "exact": a structured operator with `inverse`, `damped`, trace
        and determinant, and `power` where the structure of H has it; differentiable in H where no eigenvalue is at
        the floor: once also at equal eigenvalues if H was written out, else (twice, or at equal eigenvalues of a
        factor, a block or a low-rank part) the derivative is NaN there. "lanczos": an operator with `inverse()`, and
        `product(v)` that gives an estimate of the error as well; differentiable in the vector only, and it raises
        otherwise. NaN where H has one.

    Raises:
        ValueError: H is not square, real and tagged symmetric; a known floor is negative or NaN; `num_steps` is
            missing, superfluous or below 2; "exact" without a known structure above the size limit.

    Cost: "exact" one eigendecomposition (of each factor or block, or of the whole: n products and about 9n³
        operations) and another one for `inverse`. "lanczos" m products with H and 8nm² operations a product, memory mn.
        The error falls exponentially where no eigenvalue is near the floor, and only like 1/m in a spectrum that is
        dense around it.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        H = lx.MatrixLinearOperator(jnp.array([[1.0, 2.0], [2.0, 1.0]]), lx.symmetric_tag)  # 3 and -1
        cx.operators.positive_part(H, 0.1).as_matrix()  # 3 and 0.1
        value, error = cx.operators.positive_part(H, 0.1, method="lanczos", num_steps=2).product(jnp.ones(2))
        ```

    Source: N. Higham, "Computing a nearest symmetric positive semidefinite matrix", 1988; "Functions of matrices",
        2008, chapter 13, for Lanczos. (Cutting off 1/λ at a largest value instead would send a rounding error of
        −1e−8 to −1e8.)
    """
    return _spectral("positive_part", operator, floor, method, num_steps)


def absolute_value(
    operator: lx.AbstractLinearOperator,
    floor: Scalar | float = 0.0,
    *,
    method: Literal["exact", "lanczos"] = "exact",
    num_steps: int | None = None,
) -> AbstractStructuredOperator | LanczosFunction:
    """|H| = (H²)^½: the eigenvectors of H with max(|λ|, floor) for its eigenvalues λ.

    A step −|H|⁻¹g leaves a saddle along the directions of negative curvature, where Newton's step goes to it.

    Args:
        operator: H, real, tagged symmetric or definite, over vectors of any structure.
        floor: A scalar ≥ 0 in the units of the eigenvalues; above 0 the result is positive definite.
        method: "exact" or "lanczos", as for `positive_part`.
        num_steps: For "lanczos", at least 2.

    Returns:
        As `positive_part`.

    Raises:
        ValueError: As `positive_part`.

    Cost: that of `positive_part`.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        H = lx.MatrixLinearOperator(jnp.diag(jnp.array([2.0, -4.0])), lx.symmetric_tag)
        cx.operators.absolute_value(H, 1e-3).inverse().mv(jnp.ones(2))  # 1/2 and 1/4
        ```

    Source: Y. Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex
        optimization", 2014 (arXiv:1406.2572).
    """
    return _spectral("absolute_value", operator, floor, method, num_steps)


def _spectral(
    name: str, operator: lx.AbstractLinearOperator, floor: Any, method: str, num_steps: Any
) -> AbstractStructuredOperator | LanczosFunction:
    check_real(operator, f"`operator` of `{name}`")
    if not is_square(operator) or not is_symmetric(operator):
        raise ValueError(
            f"`operator` of `{name}` must be square and tagged `lx.symmetric_tag` (or definite). If it is symmetric, "
            "wrap it: `lx.TaggedLinearOperator(operator, lx.symmetric_tag)`."
        )
    if jnp.shape(floor) != () or not (isinstance(floor, jax.core.Tracer) or float(floor) >= 0):
        raise ValueError(f"`floor` of `{name}` must be a scalar of at least 0, found {floor}.")
    dtype = tree_dtype(operator.in_structure())
    fn = Floored(jnp.asarray(floor, dtype), jnp.zeros((), dtype), 1.0, name == "absolute_value")
    if method == "lanczos":
        if num_steps is None:
            raise ValueError(
                f'`{name}(method="lanczos")` needs `num_steps`: how many products with the operator each product may '
                "take, such as 50. `product(v)` says how large the error is."
            )
        steps = check_count("num_steps", name, num_steps)
        if steps < 2:
            raise ValueError(f"`num_steps` of `{name}` must be at least 2, found {steps}.")
        return LanczosFunction(operator, fn, steps)
    if method != "exact":
        raise ValueError(f'`method` of `{name}` must be "exact" or "lanczos", found {method!r}.')
    if num_steps is not None:
        raise ValueError(f'`num_steps` of `{name}` belongs to `method="lanczos"`, found it with "exact".')
    return _exact(name, operator, fn)


def _exact(name: str, operator: lx.AbstractLinearOperator, fn: Floored) -> AbstractStructuredOperator:
    """By the structure, or written out."""
    part = untagged(operator)
    if isinstance(part, Damped):
        part = untagged(damped_part(part.operator, part.damping))
    if isinstance(part, KroneckerSum) and len(part.terms) == 1:
        part = part.terms[0]
    if isinstance(part, Kronecker) and is_symmetric(part.left) and is_symmetric(part.right):
        part = part.eigen()
    if isinstance(part, EigenKronecker):
        return EigenKronecker(part.left, part.right, fn(part.values), _PSD)
    if isinstance(part, AbstractCirculant) and is_symmetric(part):
        spectrum = fn(part.eigenvalues())
        return Circulant(jnp.fft.ifftn(spectrum).real.astype(part.column.dtype), TAGS)
    if isinstance(part, LowRankPlusDiagonal) and part.right is None and jnp.ndim(part.diagonal_part) == 0:
        return _low_rank(part, fn)
    if isinstance(part, BlockDiagonal):
        return _block_by_block(name, part, fn)
    if isinstance(part, lx.IdentityLinearOperator):
        part = lx.DiagonalLinearOperator(
            jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), part.in_structure())
        )
    if isinstance(part, lx.DiagonalLinearOperator):
        diagonal = lx.DiagonalLinearOperator(jax.tree.map(fn, part.diagonal))
        return Damped(lx.TaggedLinearOperator(diagonal, _PSD), 0.0)
    return _written_out(name, part, fn)


def _low_rank(part: LowRankPlusDiagonal, fn: Floored) -> LowRankPlusDiagonal:
    """d · I + U Uᵀ has the eigenvalues d + s on the range of U, s those of UᵀU, and d elsewhere.

    The directions of small s are not accurate, but then f(d + s) − f(d), which is no larger than s, is small as well.
    """
    flat = [leaf.reshape(math.prod(leaf.shape[:-1]), part.rank) for leaf in jax.tree.leaves(part.left)]
    dtype = tree_dtype(part.in_structure())
    grams = [jnp.matmul(u.T, u, precision=EXACT).astype(dtype) for u in flat]
    values, vectors = eigen(sum(grams[1:], start=grams[0]))
    columns = jax.tree.map(lambda u: jnp.matmul(u, vectors.astype(u.dtype), precision=EXACT), part.left)
    outside = part.diagonal_part.astype(values.dtype)
    tiny = values <= 0
    gain = jnp.where(tiny, 0, (fn(outside + values) - fn(outside)) / jnp.where(tiny, 1, values))
    left = jax.tree.map(lambda u: u * gain.astype(u.dtype), columns)
    return LowRankPlusDiagonal(fn(part.diagonal_part), left, columns, TAGS)


def _block_by_block(name: str, part: BlockDiagonal, fn: Floored) -> BlockDiagonal:
    symmetric = frozenset([lx.symmetric_tag])
    blocks = [_exact(name, tagged(block, symmetric), fn) for block in part.parts]
    is_block = lambda x: isinstance(x, lx.AbstractLinearOperator)
    treedef = jax.tree.structure(part.blocks, is_leaf=is_block)
    return BlockDiagonal(jax.tree.unflatten(treedef, blocks), TAGS)


def _written_out(name: str, operator: lx.AbstractLinearOperator, fn: Floored) -> MatrixFunction:
    size = operator.in_size()
    if size**2 > MAX_DENSE_ELEMENTS and not isinstance(operator, lx.MatrixLinearOperator):
        raise ValueError(
            f'`{name}(method="exact")` would write out a {type(operator).__name__} of {size} rows, over the limit of '
            f"{math.isqrt(MAX_DENSE_ELEMENTS)}: nothing densifies silently here. Take products with it: "
            '`method="lanczos", num_steps=50`.'
        )
    matrix = written_out(operator)
    matrix = 0.5 * (matrix + matrix.T)
    leaves, treedef = jax.tree.flatten(operator.in_structure())
    return MatrixFunction(matrix, matrix_function(fn, matrix), fn, (tuple(leaves), treedef))
