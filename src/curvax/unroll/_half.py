"""Inner gradients in half precision: what is cast, how the loss is scaled, and what happens when it overflows."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._pytree import tree_all_finite, tree_scale, tree_unit
from curvax.unroll._gradient import Loss, Program, in_mixed_mode

# What a float16 loss is multiplied by at the start, at most, and after how many sound steps by twice as much.
FIRST_SCALE, LARGEST_SCALE, GROWTH_INTERVAL = 2.0**15, 2.0**24, 200


class HalfPrecision(eqx.Module):
    r"""Inner gradients in half precision, everything else as it is: `cx.Steps(..., half=cx.HalfPrecision())`.

    θ and the floating-point data are cast to `dtype` and the inner loss is evaluated and differentiated there, as are
    the products with its second derivatives. The value of the loss, θ itself (the master copy), the optimiser with its
    state, φ, the adjoint of the path and all sums over steps keep their precision. Constants in the loss that are
    wider than `dtype`, φ among them, widen what they meet, by JAX's rules.

    bfloat16 has the range of float32: nothing overflows, and nothing is scaled. In float16 the loss is multiplied by
    a scale that doubles after `growth_interval` sound steps. Where the loss, the gradient or a product comes out
    infinite or NaN it is computed again in full precision, and the scale is halved: no step is left out, and no such
    number enters a hypergradient (`hg.stats.path.num_repeated` counts the steps). Products are scaled by the size of
    their vector too. An infinity that the model itself turns into a finite number, as a sigmoid does, is not seen.

    Args:
        dtype: `jnp.bfloat16` or `jnp.float16`.
        loss_scale: The first scale of float16, a power of two; 2¹⁵ where None.
        growth_interval: Sound steps after which the scale is doubled; 200 where None.

    What it does to the hypergradient is measured by `cx.Unrolled(measure_error=True)`.

    Raises:
        ValueError: Another dtype; a scale or an interval with bfloat16, which needs none; not a positive one.

    Cost: that of the inner gradients in that precision; float16 reserves the memory of a repeated step as well, and
        under `vmap`, in forward mode too, computes all steps twice.

    Example:
        ```python
        solver = cx.Steps(optax.adam(1e-2), 200, half=cx.HalfPrecision(jnp.bfloat16))
        ```

    Source: P. Micikevicius et al., "Mixed precision training", 2018, arXiv 1710.03740. There a step that overflows is
        left out; a path that is differentiated must not lose any.
    """

    dtype: Any = eqx.field(static=True, default=jnp.bfloat16)
    loss_scale: float | None = eqx.field(static=True, default=None, kw_only=True)
    growth_interval: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self) -> None:
        if not is_half(self.dtype):
            raise ValueError(
                "`dtype` of `HalfPrecision` must be `jnp.bfloat16` or `jnp.float16`, got "
                f"{self.dtype!r}. Without `half` the steps are taken in the precision of θ."
            )
        scaled = self.loss_scale is not None or self.growth_interval is not None
        if scaled and not self.scales:
            raise ValueError(
                "`loss_scale` and `growth_interval` of `HalfPrecision` are for `jnp.float16`: bfloat16 has the range "
                "of float32. Leave them out."
            )
        if self.loss_scale is not None and not (
            0 < self.loss_scale <= LARGEST_SCALE and math.log2(self.loss_scale).is_integer()
        ):
            raise ValueError(
                f"`loss_scale` of `HalfPrecision` must be a power of two, at most 2**24, got {self.loss_scale}."
            )
        interval = self.growth_interval
        if interval is not None and (
            isinstance(interval, bool) or not isinstance(interval, int) or interval < 1
        ):
            raise ValueError(
                f"`growth_interval` of `HalfPrecision` must be an integer of at least 1, got {interval!r}."
            )

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled."""
        return jnp.dtype(self.dtype) == jnp.float16

    def loss(self, loss: Loss) -> Loss:
        """`loss` with θ and the data cast."""

        def narrow(theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Array:
            return loss(_cast(theta, self.dtype), phi, _cast(batch, self.dtype))

        return narrow

    def start(self) -> "Scaling | None":
        """The scale at the start of a path."""
        if not self.scales:
            return None
        none = jnp.zeros((), jnp.int32)
        return Scaling(jnp.asarray(self.loss_scale or FIRST_SCALE, jnp.float32), none, none)

    def next(self, scaling: "Scaling", sound: Bool[Array, ""]) -> "Scaling":
        """The scale after a step that was sound or not."""
        since = jnp.where(sound, scaling.since + 1, 0)
        grown = since >= (self.growth_interval or GROWTH_INTERVAL)
        larger = jnp.where(grown, jnp.minimum(2 * scaling.value, LARGEST_SCALE), scaling.value)
        smaller = jnp.maximum(scaling.value / 2, 2.0**-24)
        value = jnp.where(sound, larger, smaller).astype(jnp.float32)
        repeated = scaling.repeated + (~sound).astype(jnp.int32)
        return Scaling(value, jnp.where(grown, 0, since).astype(jnp.int32), repeated)


class Scaling(NamedTuple):
    """What the loss is multiplied by, for how many steps that was sound, and how many were not in all."""

    value: Float[Array, ""]
    since: Int[Array, ""]
    repeated: Int[Array, ""]


def guarded_gradient(
    narrow: Loss, loss: Loss, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree, scale: Float[Array, ""]
) -> tuple[PyTree[Array], Bool[Array, ""]]:
    """∇_θ of `narrow`, scaled, or of `loss` where that is not finite; and whether it is.

    Differentiated in mixed mode; the products are guarded likewise.
    """

    def attempt(given: Any, vector: Any, program: Program) -> tuple[tuple[Array, ...], Array]:
        scale = given[-1]

        def scaled(theta: PyTree[Array], given: Any) -> Array:
            found = given[0](theta, given[2], given[3])
            return given[4].astype(found.dtype) * found

        def full(theta: PyTree[Array], given: Any) -> Array:
            return given[1](theta, given[2], given[3])

        unit = jnp.ones((), scale.dtype) if vector is None else tree_unit(jax.lax.stop_gradient(vector))
        found, beside = program(scaled, None if vector is None else tree_scale(unit, vector))
        sound = tree_all_finite((found, beside))
        found = tree_scale(1 / unit, tree_scale(1 / scale, found))
        kept = jax.lax.cond(sound, lambda: found, lambda: program(full, vector)[0])
        return kept, sound.astype(scale.dtype)

    given = (narrow, loss, phi, batch, jax.lax.stop_gradient(scale))
    slope, sound = in_mixed_mode(attempt, theta, given)
    assert sound is not None
    return slope, jax.lax.stop_gradient(sound) > 0


def is_half(dtype: Any) -> bool:
    """Whether this is a dtype of half precision."""
    try:
        return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    except TypeError:
        return False


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point arrays in this precision, if they are wider."""

    def cast(leaf: Any) -> Any:
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating and leaf.dtype.itemsize > 2 else leaf

    return jax.tree.map(cast, tree)
