"""Directions that conjugate gradients leave behind, as a preconditioner for later solves with a nearby operator."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import tree_add, tree_dot, tree_dtype, tree_scale, tree_sub
from curvax.linear._slots import EXACT, along, flat, mixed

# A direction is kept when this share of its energy is new: what is left of one that is not is rounding and drift.
MIN_NEW = 0.5

# A call whose products a decade are this many times those of the best one has outlived its directions.
STALE = 1.5
# Below so many decades of residual, over all its solves, a call says nothing of how well they go.
FEWEST_DECADES = 3.0


class Recycled(eqx.Module):
    """A-conjugate directions: uᵢᵀ A uⱼ ≈ δᵢⱼ and wᵢ = A uᵢ, in the first `count` of m slots, and what A was like.

    Attributes:
        directions: uᵢ; leaves of shape (m, *leaf.shape).
        products: wᵢ, likewise.
        scale: uᵀw / wᵀw of the last one, a guess of 1/λ where nothing is known of A.
        lowest: Estimate of the smallest eigenvalue of A: later runs do not see what is deflated.
        highest: Of the largest one.
        least_effort: Fewest products a decade of residual that a call has needed with these directions.
        count: How many slots are taken.
    """

    directions: PyTree[Array]
    products: PyTree[Array]
    scale: Float[Array, ""]
    lowest: Float[Array, ""]
    highest: Float[Array, ""]
    least_effort: Float[Array, ""]
    count: Int[Array, ""]


def nothing_recycled(like: PyTree[Array], capacity: int) -> Recycled:
    """Empty slots for vectors like `like`."""
    slots = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), like)
    one = jnp.ones((), tree_dtype(like))
    return Recycled(slots, slots, one, one * jnp.inf, one * 0, one * jnp.inf, jnp.zeros((), jnp.int32))


def forget_if(stale: Bool[Array, ""], kept: Recycled) -> Recycled:
    """No directions if `stale`, else those that are kept."""
    inf = jnp.inf
    return Recycled(
        kept.directions,
        kept.products,
        jnp.where(stale, 1, kept.scale),
        jnp.where(stale, inf, kept.lowest),
        jnp.where(stale, 0, kept.highest),
        jnp.where(stale, inf, kept.least_effort),
        jnp.where(stale, 0, kept.count),
    )


def trial(kept: Recycled) -> PyTree[Array]:
    """Wc for signs c: the right-hand side that A U c is, as long as A is what it was on the span of U.

    M⁻¹Wc = Uc, so that the first direction of conjugate gradients is Uc, and its residual is Wc − αAUc: zero, with
    α = 1, if A has not moved. Were W wrong, M⁻¹A could have eigenvalues that no Ritz value finds in time, and the
    stopping test would believe a solution that is not one.
    """
    bits = (jnp.arange(_capacity(kept), dtype=jnp.uint32) * jnp.uint32(2654435769)) >> 31
    signs = jnp.where(_in_use(kept), jnp.where(bits == 1, 1, -1), 0).astype(kept.scale.dtype)
    return mixed(signs, kept.products)


def still_fits(decades: Scalar, ritz: Scalar) -> Bool[Array, ""]:
    """Whether one step of conjugate gradients on `trial` says that A has not moved too far.

    Args:
        decades: By how many powers of ten √(rᵀM⁻¹r) has fallen: to a fifth or less.
        ritz: Ritz value of that step, 1/α.
    """
    # NaN fits nothing.
    return (decades >= 0.7) & (ritz >= 0.5) & (ritz <= 2)


def maintain(
    kept: Recycled,
    products: Int[Array, ""],
    decades: Scalar,
    warm: Bool[Array, ""] | bool,
    usable: Bool[Array, ""],
) -> Recycled:
    """The directions for the next call: none after a failure, or when they have ceased to help.

    Args:
        kept: Directions after the call.
        products: Products that the call has spent.
        decades: By how many powers of ten its solves have reduced their residuals, in all.
        warm: Whether the call started from these directions, not from none.
        usable: Whether it succeeded.
    """
    telling = warm & (decades >= FEWEST_DECADES)
    spent = products.astype(decades.dtype) / jnp.where(telling, decades, 1)
    effort = jnp.where(telling, spent, jnp.inf).astype(kept.scale.dtype)
    stale = telling & (effort > STALE * kept.least_effort)
    least = jnp.minimum(kept.least_effort, effort)
    return forget_if(stale | ~usable, eqx.tree_at(lambda k: k.least_effort, kept, least))


def _products(a: PyTree[Array], b: PyTree[Array], dtype: Any) -> Float[Array, "m n"]:
    """All inner products of two lists of vectors."""
    products = jax.tree.map(lambda x, y: jnp.matmul(flat(x), flat(y).T, precision=EXACT), a, b)
    terms = [term.astype(dtype) for term in jax.tree.leaves(products)]
    return sum(terms[1:], start=terms[0])


def _along(slots: PyTree[Array], vector: PyTree[Array], used: Bool[Array, " m"]) -> Float[Array, " m"]:
    """The inner products of a vector with the slots in use."""
    return jnp.where(used, along(slots, vector), 0)


def _capacity(slots: "Recycled | Fresh") -> int:
    return jax.tree.leaves(slots.directions)[0].shape[0]


def _in_use(slots: "Recycled | Fresh") -> Bool[Array, " m"]:
    return jnp.arange(_capacity(slots), dtype=slots.count.dtype) < slots.count


def deflated(
    kept: Recycled, base: Callable[[PyTree[Array]], PyTree[Array]] | None, r: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array], PyTree[Array], Scalar]:
    """z = (I − UWᵀ) P (I − WUᵀ) r + UUᵀr, what P was given and returned, and ‖Uᵀr‖².

    P is `base`, or `scale` times the identity.

    Symmetric positive definite if P is, whatever the directions hold: with a nearby A it is only less effective. Where
    it is A itself, the span of U has the eigenvalue 1 and the rest those of PA. This is the inverse that L-BFGS builds
    from conjugate pairs, and the balancing preconditioner of domain decomposition.
    """
    used = _in_use(kept)
    inside = _along(kept.directions, r, used)
    rest = tree_sub(r, mixed(inside, kept.products))
    outside = tree_scale(kept.scale, rest) if base is None else base(rest)
    weights = inside - _along(kept.products, outside, used)
    z = tree_add(outside, mixed(weights, kept.directions))
    return z, rest, outside, jnp.sum(inside * inside)


class Fresh(eqx.Module):
    """The first directions of a run, as they came: scaled to pᵀAp = 1, in the first `count` of their slots.

    They are written during the run and read after it: slots that are read and written in one loop would be copied in
    every step. One slot more than is ever in use takes what is not kept.
    """

    directions: PyTree[Array]
    products: PyTree[Array]
    count: Int[Array, ""]


def no_fresh(like: PyTree[Array], kept: Recycled) -> Fresh:
    """Empty slots for one run, a third of what is kept."""
    size = -(-_capacity(kept) // 3) + 1
    slots = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), like)
    return Fresh(slots, slots, jnp.zeros((), jnp.int32))


def keep(
    fresh: Fresh,
    usable: Bool[Array, ""],
    p: PyTree[Array],
    product: PyTree[Array],
    squares: tuple[Scalar, ...],
) -> Fresh:
    """One more direction p with Ap, while there is room; `squares` are pᵀp, pᵀAp and ‖Ap‖²."""
    length, energy, stretch = squares
    last = _capacity(fresh) - 1
    # Far from overflow in every leaf: slots that are not in use are multiplied by zero, which no infinity survives.
    limit = min(float(jnp.finfo(leaf.dtype).max) for leaf in jax.tree.leaves(p)) ** 0.5
    bounded = (length < limit * energy) & (stretch < limit * energy)
    takes = usable & bounded & (fresh.count < last)
    weight = jnp.where(takes, jax.lax.rsqrt(jnp.where(takes, energy, 1)), 0)
    slot = jnp.where(takes, fresh.count, last)

    def store(slots: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        def leaf(array: Array, v: Array) -> Array:
            # A direction that is not taken may hold infinities.
            scaled = jnp.where(takes, (weight * v.astype(weight.dtype)).astype(v.dtype), 0)
            return jax.lax.dynamic_update_index_in_dim(array, scaled, slot, 0)

        return jax.tree.map(leaf, slots, vector)

    return Fresh(
        store(fresh.directions, p), store(fresh.products, product), fresh.count + takes.astype(jnp.int32)
    )


def merged(kept: Recycled, fresh: Fresh, lowest: Scalar, highest: Scalar) -> Recycled:
    """The directions of a run added to those before it, while there is room for all that a run may keep."""
    room = kept.count + _capacity(fresh) - 1 <= _capacity(kept)
    after = run_if(room & (fresh.count > 0), lambda old: _merge(old, fresh), kept)
    ends = jnp.minimum(kept.lowest, lowest), jnp.maximum(kept.highest, highest)
    return eqx.tree_at(lambda k: (k.lowest, k.highest), after, ends)


def _merge(kept: Recycled, fresh: Fresh) -> Recycled:
    """Make the new directions conjugate to the old ones and to each other, drop what is not new, and append."""
    dtype = kept.scale.dtype
    overlap = jnp.where(_in_use(kept), _products(fresh.directions, kept.products, dtype), 0)  # (new, old)
    u = tree_sub(fresh.directions, mixed(overlap, kept.directions))
    w = tree_sub(fresh.products, mixed(overlap, kept.products))
    energies = _products(u, w, dtype)
    # Symmetric up to what A has changed. The eigenvectors are conjugate, their eigenvalues the share that is new.
    shares, mix = jnp.linalg.eigh(0.5 * (energies + energies.T))
    new = (shares > MIN_NEW)[::-1]
    scales = jax.lax.rsqrt(jnp.where(new, shares[::-1], 1))
    weights = jnp.where(new[:, None], scales[:, None] * mix.T[::-1], 0)
    num_new = jnp.sum(new).astype(kept.count.dtype)

    def append(old: PyTree[Array], added: PyTree[Array]) -> PyTree[Array]:
        new = mixed(weights[:-1], added)  # without the slot of what is not kept
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, kept.count, 0), old, new)

    last = jnp.maximum(fresh.count - 1, 0)
    final = jax.tree.map(lambda slots: slots[last], w)
    energy, square = energies[last, last], tree_dot(final, final)
    scale = jnp.where((num_new > 0) & (energy > 0) & (square > 0), energy / square, kept.scale)
    return Recycled(
        append(kept.directions, u),
        append(kept.products, w),
        scale.astype(dtype),
        kept.lowest,
        kept.highest,
        kept.least_effort,
        kept.count + num_new,
    )
