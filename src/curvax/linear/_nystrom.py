"""A randomised low-rank approximation of a curvature, as a preconditioner and as a solver of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from curvax._pytree import stop_gradient, tree_add, tree_dtype, tree_scale, tree_sub
from curvax.linear._jacobi import check_count, check_key, check_system
from curvax.linear._slots import EXACT, along, mixed
from curvax.operators._damped import check_damping
from curvax.operators._dense import dense_matrix, ravel, unravel
from curvax.operators._dispatch import register
from curvax.operators._low_rank_approximation import NEGATIVE, nystrom_core

# Columns pushed through the operator at once: each carries its own copy of the activations.
_CHUNK = 16
# By default the rank may grow to this multiple of the first one.
_GROWTH = 8


class NystromPreconditioner(lx.AbstractLinearOperator):
    r"""U (Λ̂ + μ)⁻¹ Uᵀ + (I − U Uᵀ) / (rest + μ); made by `nystrom`.

    The projector I − U Uᵀ is applied twice, so that the operator is positive definite whatever the rounding in U.

    Attributes:
        basis: Uᵀ: orthonormal vectors, leaves of shape (slots, \*leaf.shape); zero from `rank` on.
        eigenvalues: Λ̂, of shape (slots,), falling; zero from `rank` on.
        damping: μ: what was asked for, or the rounding level of the sketch if that is larger.
        rest: What stands for the eigenvalues outside of the span of U: the last of Λ̂, or 0 (`low_rank_inverse`).
        rank: How many slots are in use.
        error: Estimate of ‖A − Â‖₂ from below, Â = U Λ̂ Uᵀ.
        num_products: Products with A that were spent.
    """

    basis: PyTree[Array]
    eigenvalues: Float[Array, " slots"]
    damping: Scalar
    rest: Scalar
    rank: Int[Array, ""]
    error: Scalar
    num_products: Int[Array, ""]
    tags: frozenset[object] = eqx.field(static=True, default=frozenset({lx.positive_semidefinite_tag}))

    @property
    def condition(self) -> Scalar:
        """(λ̂_ℓ + μ + error) / μ: an upper bound of the condition number of P⁻¹(A + μI), up to that of `error`.

        Without damping, or where A has a damping of its own, the truth may be far below.
        """
        return _condition(self.eigenvalues, self.rank, self.damping, self.error)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """The product, in four passes over the basis."""
        inside = along(self.basis, vector)
        outside = tree_sub(vector, mixed(inside, self.basis))
        level = 1 / (self.rest + self.damping)
        weights = inside / (self.eigenvalues + self.damping) - level * along(self.basis, outside)
        return tree_add(tree_scale(level, outside), mixed(weights, self.basis))

    def low_rank_inverse(self) -> "NystromPreconditioner":
        """(Â + μI)⁻¹, which solves with A + μI all by itself where the rank is large enough.

        It differs from (A + μI)⁻¹ by at most ‖A − Â‖ / (μ (‖A − Â‖ + μ)) in norm. The preconditioner has 1/(λ̂_ℓ + μ)
        where this has 1/μ, for the directions outside of the basis: as an inverse it is further off, but clusters
        the spectrum as well and does not blow up what the sketch has missed.
        """
        return eqx.tree_at(lambda p: p.rest, self, jnp.zeros_like(self.rest))

    def as_matrix(self) -> Float[Array, "n n"]:
        """The matrix over raveled leaves. Raises `ValueError` above a size limit."""
        return dense_matrix(self)

    def transpose(self) -> "NystromPreconditioner":
        """The operator itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.basis)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.in_structure()


register(NystromPreconditioner)


def nystrom(
    operator: lx.AbstractLinearOperator,
    rank: int,
    *,
    damping: Scalar | float,
    key: PRNGKeyArray | None,
    target_condition: Scalar | float | None = None,
    max_rank: int | None = None,
    power_steps: int = 5,
) -> NystromPreconditioner:
    """A randomised Nyström approximation of A, as a preconditioner for A + μI.

    Â = (AΩ)(ΩᵀAΩ)⁺(AΩ)ᵀ = U Λ̂ Uᵀ for ℓ random orthonormal columns Ω, and
    P⁻¹ = U (Λ̂ + μ)⁻¹ Uᵀ + (I − U Uᵀ) / (λ̂_ℓ + μ). The condition number of P^{-1/2}(A + μI)P^{-1/2} is at most
    (λ̂_ℓ + μ + ‖A − Â‖) / μ, and below 28 on average for ℓ = 2⌈1.5 d⌉ + 1 with the effective dimension
    d = tr A(A + μI)⁻¹. It pays where the spectrum of A falls fast or where one sketch serves many right-hand sides,
    and not where it is flat or has a few eigenvalues of high multiplicity: CG needs as few steps there without.

    The rank is `rank`, or with `target_condition` doubled from there until (λ̂_ℓ + μ + error) / μ is at most that or
    `max_rank` is reached. That runs in arrays of fixed shape, so that under `jit` one program serves every outcome.

    Args:
        operator: A *without* the damping, positive semidefinite, tagged so or symmetric; real and square, over
            vectors of any structure, float32 or float64.
        rank: ℓ, from 1 to n: of the sketch, or of the first sketch.
        damping: μ ≥ 0, in the units of A's eigenvalues. It is raised to the rounding level of the sketch, about
            ε ‖AΩ‖_F. With 0 the preconditioner is for A itself, and `condition` says nothing.
        key: A JAX random key for Ω.
        target_condition: Condition number wanted, above 1; needs a `damping` above 0.
        max_rank: Largest rank, from `rank` to n; by default 8 · `rank`, or n if that is smaller.
        power_steps: Products spent on each estimate of ‖A − Â‖, by the power method; with 0 it is taken to be λ̂_ℓ.

    Returns:
        A `NystromPreconditioner`, tagged `lx.positive_semidefinite_tag`, with the rank and the estimated condition;
        its `low_rank_inverse()` is (Â + μI)⁻¹. It is a constant: no derivative flows through it.

        All of it is NaN when A is seen to be indefinite, and when it has a NaN. It is seen by a negative eigenvalue
        of ΩᵀAΩ, or by vᵀAv < 0 in the power method, beyond rounding; what neither meets is not seen. Sketch
        a Gauss–Newton matrix then, or A + cI.

    Raises:
        ValueError: The operator is not square, real and tagged symmetric, or tagged negative; `rank` or `max_rank`
            out of range; no `key`; a known damping that is negative; a `target_condition` that is not above 1 or comes
            with a damping of 0; a `max_rank` without it.

    Cost: ℓ + power_steps products (with a target, power_steps for every doubling), 16 at a time; about 4nℓ² operations
        more, for every doubling; memory 4ℓn while it is built and ℓn after, ℓ being `max_rank` with a target. A product
        8nℓ operations.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.logspace(0, -8, 50)), lx.positive_semidefinite_tag)
        P = cx.linear.nystrom(A, 20, damping=1e-4, key=jax.random.key(0))
        system = cx.operators.Damped(A, 1e-4)
        lx.linear_solve(system, jnp.ones(50), cx.linear.CG(rtol=1e-3), options={"preconditioner": P})
        ```

    Source: Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nyström preconditioning", 2023 (arXiv:2110.02820).
        Theirs is (λ̂_ℓ + μ) times ours, so that ours approximates (A + μI)⁻¹. The shifted core is inverted by its
        eigenvalues instead of by Cholesky: there a rank-deficient or an indefinite A shows.
    """
    check_system("nystrom", operator)
    if lx.is_negative_semidefinite(operator):
        raise ValueError(
            "`operator` of `nystrom` is tagged negative semidefinite; pass `-operator` (a preconditioner of the "
            "negated system serves `CG` and `MINRES` as well)."
        )
    check_damping(damping)
    slots = _slots(operator.in_size(), rank, max_rank, target_condition, damping)
    first = check_count("rank", "nystrom", rank)
    if power_steps != 0:
        check_count("power_steps", "nystrom", power_steps)
    dtype = tree_dtype(operator.in_structure())
    mu = jnp.asarray(damping, dtype)
    target = None if target_condition is None else jnp.asarray(target_condition, dtype)
    return _build(operator, mu, check_key("nystrom", key), target, (first, slots, power_steps))


@eqx.filter_jit
def _build(
    operator: lx.AbstractLinearOperator,
    mu: Scalar,
    key: PRNGKeyArray,
    target: Scalar | None,
    options: tuple[int, int, int],
) -> NystromPreconditioner:
    """One program, also where it is called outside of `jit`."""
    first, slots, power_steps = options
    structure, size = operator.in_structure(), operator.in_size()
    dtype = tree_dtype(structure)
    operator, mu, target = stop_gradient((operator, mu, target))
    applied = lx.linearise(operator)

    def product(row: Float[Array, " n"]) -> Float[Array, " n"]:
        # A function may hide what is differentiated.
        return jax.lax.stop_gradient(ravel(applied.mv(unravel(row, structure)), dtype))

    key, start_key = jax.random.split(key)
    omega = jnp.linalg.qr(jax.random.normal(key, (size, slots), dtype))[0].T
    start = jax.random.normal(start_key, (size,), dtype)
    mu = jnp.where(mu >= 0, mu, jnp.nan)

    def grown(c: _Growth) -> _Growth:
        wanted = jnp.minimum(jnp.maximum(first, 2 * c.rank), slots)
        sketch, count, spent = _sketched(product, omega, c.sketch, c.rank, wanted, first)
        low_rank = _approximation(omega, sketch, count, mu)
        return _estimated(product, low_rank, start, power_steps, sketch, count, c.spent + spent)

    def unfinished(c: _Growth) -> Bool[Array, ""]:
        # NaN ends it.
        condition = _condition(c.low_rank.values, c.rank, c.low_rank.damping, c.error)
        return (c.rank == 0) | ((condition > target) & (c.rank < slots))

    none, zero = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
    empty = _LowRank(jnp.zeros_like(omega), jnp.zeros(slots, dtype), mu, zero)
    nothing = _Growth(jnp.zeros_like(omega), none, none, empty, zero)
    growth = grown(nothing) if target is None else jax.lax.while_loop(unfinished, grown, nothing)
    low_rank = growth.low_rank
    return NystromPreconditioner(
        basis=jax.vmap(lambda row: unravel(row, structure))(low_rank.basis),
        eigenvalues=low_rank.values,
        damping=low_rank.damping,
        rest=_last(low_rank.values, growth.rank),
        rank=growth.rank,
        error=growth.error,
        num_products=growth.spent,
    )


class _LowRank(NamedTuple):
    """U Λ̂ Uᵀ with the rows of `basis` for U; the damping that it is good for; the rounding in its eigenvalues."""

    basis: Float[Array, "slots n"]
    values: Float[Array, " slots"]
    damping: Scalar
    rounding: Scalar


class _Growth(NamedTuple):
    sketch: Float[Array, "slots n"]  # (AΩ)ᵀ, zero from `rank` on
    rank: Int[Array, ""]
    spent: Int[Array, ""]
    low_rank: _LowRank
    error: Scalar


def _sketched(
    product: Callable[[Array], Array],
    omega: Float[Array, "slots n"],
    sketch: Float[Array, "slots n"],
    count: Int[Array, ""],
    wanted: Int[Array, ""],
    first: int,
) -> tuple[Float[Array, "slots n"], Int[Array, ""], Int[Array, ""]]:
    """At least `wanted` rows of the sketch, some at a time; how many there are then, and products spent."""
    slots = omega.shape[0]
    chunk = -(-first // -(-first // _CHUNK))

    def more(c: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sketch, count, spent = c
        # The last chunk may do some rows once more.
        begin = jnp.minimum(count, slots - chunk)
        rows = jax.vmap(product)(jax.lax.dynamic_slice_in_dim(omega, begin, chunk))
        sketch = jax.lax.dynamic_update_slice_in_dim(sketch, rows, begin, 0)
        return sketch, jnp.minimum(count + chunk, slots), spent + chunk

    return jax.lax.while_loop(lambda c: c[1] < wanted, more, (sketch, count, jnp.zeros_like(count)))


def _approximation(
    omega: Float[Array, "slots n"], sketch: Float[Array, "slots n"], count: Int[Array, ""], mu: Scalar
) -> _LowRank:
    """The Nyström approximation of A from the rows that there are."""
    used = jnp.arange(omega.shape[0], dtype=count.dtype) < count
    basis, values, rounding = nystrom_core(jnp.where(used[:, None], omega, 0), sketch)
    damping = jnp.maximum(jnp.maximum(mu, rounding), jnp.finfo(omega.dtype).tiny)
    return _LowRank(
        jnp.where(used[:, None], basis, 0),
        jnp.where(used | jnp.isnan(values), values, 0),
        damping,
        rounding,
    )


def _estimated(
    product: Callable[[Array], Array],
    low_rank: _LowRank,
    start: Float[Array, " n"],
    steps: int,
    sketch: Float[Array, "slots n"],
    count: Int[Array, ""],
    spent: Int[Array, ""],
) -> _Growth:
    """The approximation with an estimate of its error: the power method on A − Â."""
    dtype = start.dtype
    last = _last(low_rank.values, count)
    if steps == 0:
        return _Growth(sketch, count, spent, low_rank, last)

    def step(c: tuple[Array, Array, Array], _: Any) -> tuple[tuple[Array, Array, Array], None]:
        vector, _, lowest = c
        image = product(vector)
        lowest = jnp.minimum(lowest, jnp.vdot(vector, image, precision=EXACT))
        inside = low_rank.values * jnp.matmul(low_rank.basis, vector, precision=EXACT)
        image = image - jnp.matmul(inside, low_rank.basis, precision=EXACT)
        norm = jnp.linalg.norm(image)
        return (jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), vector), norm, lowest), None

    zero = jnp.zeros((), dtype)
    begin = start / jnp.linalg.norm(start)
    (_, error, lowest), _ = jax.lax.scan(step, (begin, zero, zero), length=steps)
    # A NaN in A is one in the eigenvalues as well.
    indefinite = lowest < -NEGATIVE * low_rank.rounding
    values = jnp.where(indefinite, jnp.nan, low_rank.values)
    return _Growth(sketch, count, spent + steps, low_rank._replace(values=values), error)


def _last(values: Float[Array, " slots"], count: Int[Array, ""]) -> Scalar:
    """λ̂_ℓ."""
    return values[jnp.maximum(count - 1, 0)]


def _condition(
    values: Float[Array, " slots"], count: Int[Array, ""], damping: Scalar, error: Scalar
) -> Scalar:
    return (_last(values, count) + damping + error) / damping


def _slots(size: int, rank: Any, max_rank: Any, target: Any, damping: Any) -> int:
    """How many columns there is room for."""
    rank = check_count("rank", "nystrom", rank)
    if rank > size:
        raise ValueError(
            f"`rank` of `nystrom` must be at most the size of the operator, {size}, found {rank}. With so few rows "
            "write the matrix out: `cx.linear.Auto` does."
        )
    if target is None:
        if max_rank is not None:
            raise ValueError(
                "`max_rank` of `nystrom` needs a `target_condition`, at which the rank stops growing; without one the "
                "rank is `rank`."
            )
        return rank
    if jnp.shape(target) != () or (isinstance(target, int | float) and not target > 1):
        raise ValueError(
            f"`target_condition` of `nystrom` must be a number above 1, such as 30, found {target}."
        )
    if isinstance(damping, int | float) and damping == 0:
        raise ValueError(
            "`target_condition` of `nystrom` needs a `damping` above 0, found 0: no rank below n bounds the condition "
            "number without it. Pass the regularisation that the system has, and A without it, or leave "
            "`target_condition` out."
        )
    if max_rank is None:
        return min(size, _GROWTH * rank)
    max_rank = check_count("max_rank", "nystrom", max_rank)
    if not rank <= max_rank <= size:
        raise ValueError(
            f"`max_rank` of `nystrom` must lie between `rank` and the size of the operator, {rank} and {size}, found "
            f"{max_rank}."
        )
    return max_rank
