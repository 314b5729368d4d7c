"""The solution of least norm from the large eigenvalues or singular values alone."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from curvax._pytree import tree_dtype
from curvax.linear._jacobi import check_count, check_key
from curvax.linear._subspace import leading_triplets
from curvax.linear._system import final_result
from curvax.operators._damped import check_real
from curvax.operators._dense import ravel, unravel
from curvax.operators._structured import is_symmetric
from curvax.operators._written_out import written_out

EXACT = jax.lax.Precision.HIGHEST
_NO_DERIVATIVE = (
    "`TruncatedSpectrum` with a `cutoff` or a `rank` has no derivative in the operator: what it drops is not zero, and "
    "the derivative of what it keeps depends on that. Use `jax.lax.stop_gradient` on the operator's arrays, leave "
    "`cutoff` and `rank` out, or solve a damped system, `cx.operators.Damped`, which is smooth."
)


class _Space(eqx.Module):
    """The structure of vectors, which may hold dictionaries, as something that can be hashed."""

    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    @property
    def structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.unflatten(self.treedef, self.leaves)


class _State(eqx.Module):
    """A ≈ leftᵀ · diag(values) · right, by falling size; the weights are 1/value, 0 for what is dropped."""

    left: Float[Array, "k m"]
    right: Float[Array, "k n"]
    values: Float[Array, " k"]
    weights: Float[Array, " k"]
    false_tag: Bool[Array, ""]
    unfinished: Bool[Array, ""]
    num_steps: Int[Array, ""]
    domain: _Space
    image: _Space


class TruncatedSpectrum(lx.AbstractLinearSolver[_State]):
    """x = Σ vᵢ (uᵢᵀb) / σᵢ over the singular values that are kept: least squares for A_k x = b, of least norm.

    Kept are the σᵢ > cutoff · σ₁ and of these the first `rank`. For a symmetric A they are the |λᵢ|; for one tagged
    positive semidefinite negative λᵢ, which are rounding, count as zeros and are never inverted. With neither argument
    the cutoff is that of the numerical rank, and x = A⁺b. For ill-posed problems: what the data do not determine
    is left at zero, where damping would shrink everything a little.

    Up to `dense_size` the matrix is written out and decomposed. Above that the leading `rank` singular triplets are
    found from products, by restarted block Krylov iteration, to a residual of √eps · σᵢ each.

    Statistics: `rank` (effective: how many are kept), `discarded_norm` (‖b − U_k U_kᵀ b‖, the residual),
    `largest` (σ₁), `smallest_kept` (0 if none is), `num_steps` (cycles of the iteration, 0 for a decomposition).

    Results: `lineax.RESULTS.singular` (non-finite numbers), `breakdown` (a tag is false: an operator tagged definite
    was seen to have an eigenvalue of the other sign and more than √eps · |λ|max, or a matrix that is written out is
    tagged symmetric and is not), `max_steps_reached` (the iteration has not converged: the values after `rank` are as
    large as the last one kept).

    Derivatives: exact in the vector, x' = A_k⁺ b', forward and reverse. In the operator Lineax's rule is that
    of the pseudo-inverse at a constant rank, which takes what is dropped for zero. That is right without `cutoff` and
    `rank`. With one of them it would be a wrong number, of relative error (σ_dropped/σ_kept)² or more, and raises.

    Args:
        cutoff: Relative to the largest singular value, in [0, 1); by default eps times the larger size of A.
        rank: At most so many, at least 1; needed above `dense_size`.
        dense_size: Largest size (the larger one of rows and columns) for which the matrix is written out.
        max_steps: Cycles of the iteration, each about 6 · (rank + 8) products.
        key: For its random start; needed above `dense_size`.

    Raises:
        ValueError: An argument does not fit, or is missing for a large operator; the operator is not real; a
            derivative in it is asked for where it would be wrong.

    Cost: n products and 9n³ operations (symmetric) or about 20n³ once per operator; or as above, with
        3 · (rank + 8) vectors; a solve 4 operations for each entry of the kept vectors.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.array([4.0, 2.0, 1e-6])), lx.positive_semidefinite_tag)
        solution = lx.linear_solve(A, jnp.ones(3), cx.linear.TruncatedSpectrum(cutoff=1e-3))
        solution.value, solution.stats["rank"]  # [0.25, 0.5, 0], 2
        ```

    Source: P. C. Hansen, "The truncated SVD as a method for regularization", 1987; the iteration after C. Musco,
        C. Musco, "Randomized block Krylov methods for stronger and faster approximate singular value decomposition",
        2015 (arXiv:1504.05477), restarted and with a test of its residuals, which theirs is without.
    """

    cutoff: Array | float | None = None
    rank: int | None = None
    dense_size: int = eqx.field(default=1024, kw_only=True)
    max_steps: int = eqx.field(default=50, kw_only=True)
    key: PRNGKeyArray | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self) -> None:
        if isinstance(self.cutoff, int | float) and not 0 <= self.cutoff < 1:
            raise ValueError(f"`cutoff` of `TruncatedSpectrum` must lie in [0, 1), got {self.cutoff}.")
        if self.rank is not None:
            check_count("rank", "TruncatedSpectrum", self.rank)
        check_count("max_steps", "TruncatedSpectrum", self.max_steps)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Decompose."""
        del options
        check_real(operator, "`operator` of `TruncatedSpectrum`")
        spaces = operator.in_structure(), operator.out_structure()
        domain, image = (_Space(tuple(leaves), treedef) for leaves, treedef in map(jax.tree.flatten, spaces))
        sizes = operator.out_size(), operator.in_size()
        dtype = tree_dtype(spaces)
        if max(sizes) <= self.dense_size or 0 in sizes:
            found = _decomposed(operator, written_out(operator).astype(dtype))
        else:
            found = self._iterated(operator)
        magnitudes = jnp.abs(found.values)
        cutoff = max(*sizes, 1) * jnp.finfo(dtype).eps if self.cutoff is None else self.cutoff
        largest = jnp.max(magnitudes, initial=0)
        kept = (magnitudes > jnp.asarray(cutoff, dtype) * largest) & (magnitudes > 0)
        if self.rank is not None:
            kept &= jnp.arange(len(magnitudes)) < self.rank
        sign = int(lx.is_positive_semidefinite(operator)) - int(lx.is_negative_semidefinite(operator))
        false_tag = found.false_tag
        if sign:
            wrong = jnp.where(sign * found.values < 0, magnitudes, 0)
            false_tag |= jnp.max(wrong, initial=0) > jnp.finfo(dtype).eps ** 0.5 * largest
            kept &= sign * found.values > 0
        weights = jnp.where(kept, 1 / jnp.where(kept, found.values, 1), 0)
        # What is not finite is dropped by no comparison.
        weights = jnp.where(jnp.all(jnp.isfinite(magnitudes)), weights, jnp.nan)
        unfinished = jnp.any(kept & ~found.settled)
        state = (found.left, found.right, found.values, weights, false_tag, unfinished, found.num_steps)
        return _State(*state, domain, image)

    def _iterated(self, operator: lx.AbstractLinearOperator) -> "_Decomposition":
        if self.rank is None:
            raise ValueError(
                f"`rank` of `TruncatedSpectrum` is needed for an operator of {operator.out_size()} × "
                f"{operator.in_size()}, above `dense_size={self.dense_size}`: as many singular values are computed."
            )
        return _iterate(operator, check_key("TruncatedSpectrum", self.key), (self.rank, self.max_steps))

    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Two products with the vectors that are kept."""
        del options
        b = ravel(vector, state.values.dtype)
        kept = state.weights != 0
        inside = jnp.where(kept, jnp.matmul(state.left, b, precision=EXACT), 0)
        x = jnp.matmul(state.weights * inside, state.right, precision=EXACT)
        outside = b - jnp.matmul(inside, state.left, precision=EXACT)
        magnitudes = jnp.abs(state.values)
        largest = jnp.max(magnitudes, initial=0)
        count = jnp.sum(kept)
        stats = {
            "rank": count,
            "discarded_norm": jnp.linalg.norm(outside),
            "largest": largest,
            "smallest_kept": jnp.where(
                count > 0, jnp.min(jnp.where(kept, magnitudes, jnp.inf), initial=jnp.inf), 0
            ),
            "num_steps": state.num_steps,
        }
        finite = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(state.weights))
        failures = ((~finite, lx.RESULTS.singular), (state.false_tag, lx.RESULTS.breakdown))
        good = finite & ~state.false_tag & ~state.unfinished
        return (
            unravel(x, state.domain.structure),
            final_result(good, failures, lx.RESULTS.max_steps_reached),
            stats,
        )

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The same triplets, left for right."""
        del options
        swapped = (state.right, state.left, state.values, state.weights)
        rest = (state.false_tag, state.unfinished, state.num_steps)
        return _State(*swapped, *rest, state.image, state.domain), {}

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates; with `cutoff` or `rank` it raises.

        Lineax asks for it in one place: where it is about to take the derivative in the operator.

        Raises:
            ValueError: There is a `cutoff` or a `rank`.
        """
        if self.cutoff is not None or self.rank is not None:
            raise ValueError(_NO_DERIVATIVE)
        return state, options

    def assume_full_rank(self) -> bool:
        """Derivatives are those of the pseudo-inverse."""
        return False


class _Decomposition(NamedTuple):
    left: Float[Array, "k m"]
    right: Float[Array, "k n"]
    values: Float[Array, " k"]  # by falling size
    settled: Bool[Array, " k"]
    num_steps: Int[Array, ""]
    false_tag: Bool[Array, ""]  # tagged symmetric, and not


def _decomposed(operator: lx.AbstractLinearOperator, matrix: Float[Array, "m n"]) -> _Decomposition:
    # Decompositions may hang on a NaN, or lie.
    finite = jnp.all(jnp.isfinite(matrix))
    matrix = jnp.where(finite, matrix, 0)
    false_tag = jnp.asarray(False)
    if 0 in matrix.shape:
        left, values, right = jnp.zeros((0, matrix.shape[0])), jnp.zeros(0), jnp.zeros((0, matrix.shape[1]))
        left, values, right = (a.astype(matrix.dtype) for a in (left, values, right))
    elif is_symmetric(operator):
        most = jnp.finfo(matrix.dtype).eps ** 0.5 * jnp.max(jnp.abs(matrix))
        false_tag = jnp.max(jnp.abs(matrix - matrix.T)) > most
        values, vectors = jnp.linalg.eigh(matrix)
        order = jnp.argsort(-jnp.abs(values))
        values, left = values[order], vectors.T[order]
        right = left
    else:
        vectors, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        left = vectors.T
    values = jnp.where(finite, values, jnp.nan)
    return _Decomposition(left, right, values, jnp.ones(len(values), bool), jnp.asarray(0), false_tag)


@eqx.filter_jit
def _iterate(
    operator: lx.AbstractLinearOperator, key: PRNGKeyArray, options: tuple[int, int]
) -> _Decomposition:
    """One program, also where it is called outside of `jit`."""
    dtype = tree_dtype((operator.in_structure(), operator.out_structure()))
    applied, back = lx.linearise(operator), lx.linearise(operator.transpose())
    found = leading_triplets(
        lambda v: ravel(applied.mv(unravel(v, applied.in_structure())), dtype),
        lambda u: ravel(back.mv(unravel(u, back.in_structure())), dtype),
        (operator.out_size(), operator.in_size()),
        rank=options[0],
        max_cycles=options[1],
        key=key,
        dtype=dtype,
    )
    positive, negative = lx.is_positive_semidefinite(operator), lx.is_negative_semidefinite(operator)
    no = jnp.asarray(False)
    if not (positive or negative):
        return _Decomposition(found.left, found.right, found.values, found.settled, found.num_cycles, no)
    # u = v where λ > 0, u = −v where λ < 0, and mixtures where both have the same size.
    cosines = jnp.sum(found.left * found.right, axis=1)
    signs = jnp.where(cosines < (0.5 if positive else -0.5), -1, 1).astype(dtype)
    left = found.left * signs[:, None]
    return _Decomposition(left, found.right, found.values * signs, found.settled, found.num_cycles, no)
