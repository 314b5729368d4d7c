"""What an unrolled rule tells of its path."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from curvax.unroll._step import Walk


class PathStats(eqx.Module):
    """How a path was differentiated and how it behaved: `hg.stats.path` of a rule that follows one.

    Steps are counted from 0: step i leads from θ_i to θ_(i+1), and θ_n is the end of the path.

    Attributes:
        mode: "mixed", "reverse" or "forward"; "difference" of `cx.FiniteDifference`.
        lengths: Lengths of the nested loops; their sum is how many states are stored at a time. None: the whole tape
            of reverse mode. Empty in forward mode, which stores none.
        reason: Why this mode and schedule, with what they were predicted to cost.
        truncate: How many of the last steps were differentiated; None: all.
        num_steps: Steps that were taken, n.
        gradient_norms: ‖∇_θ g‖ at θ_i, for i = 0, …; NaN for steps that were not taken.
        derivative_norms: ‖∂f/∂θ_i‖, the adjoint of the path at θ_i, for i = 0, …, n; in forward mode ‖dθ_i/dφ‖
            (Frobenius). NaN where no derivative was taken: before a truncated path begins, behind its end.
        num_clipped: Steps at which clipping changed the adjoint.
        num_repeated: Steps whose gradient overflowed in float16 and was computed again.
    """

    mode: str = eqx.field(static=True)
    lengths: tuple[int, ...] | None = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    truncate: int | None = eqx.field(static=True)
    num_steps: Int[Array, ""]
    gradient_norms: Float[Array, " steps"]
    derivative_norms: Float[Array, " steps+1"]
    num_clipped: Int[Array, ""]
    num_repeated: Int[Array, ""]

    @property
    def growth(self) -> Float[Array, ""]:
        """By what factor the derivative grew: its largest norm, divided by the one it started from.

        The adjoint starts at the end of the path, the sensitivities of forward mode at the first step. A path with a
        growth above the inverse of the machine precision is not reproducible: rounding decides where it leads.
        """
        norms = self.derivative_norms
        before = 0 if self.truncate is None else jnp.maximum(self.num_steps - self.truncate, 0)
        start = norms[before + 1] if self.mode == "forward" else norms[self.num_steps]
        return jnp.nanmax(norms) / jnp.where(start > 0, start, jnp.nan)

    @property
    def rate(self) -> Float[Array, ""]:
        """By what factor a step changes the derivative: the geometric mean over the half that it passes last.

        Along a path that has settled this is the spectral radius of the step map: a power iteration with it, or its
        transpose, is what carries the derivative. Above 1 perturbations grow. NaN where no derivative was carried that
        far; in forward mode, where steps add to the sensitivities, it tends to 1 on a path that contracts.
        """
        norms, end = self.derivative_norms, self.num_steps
        begin = jnp.zeros((), end.dtype)
        if self.truncate is not None:
            begin = jnp.maximum(end - self.truncate, 0)
        half = jnp.maximum((end - begin) // 2, 1)
        late, early = (end, end - half) if self.mode == "forward" else (begin, begin + half)
        return (norms[late] / norms[early]) ** (1 / half.astype(norms.dtype))

    @property
    def rounding(self) -> Float[Array, ""]:
        """To what relative size rounding errors grow along the path: machine precision times growth.

        In forward mode, where sensitivities add up from step to step, growth of a factor of n over n steps is none.
        """
        growth = self.growth
        if self.mode == "forward":
            growth = growth / jnp.maximum(self.num_steps, 1).astype(growth.dtype)
        return jnp.finfo(growth.dtype).eps * growth

    @property
    def num_stored(self) -> int | None:
        """States that are stored at a time, beside the working set of a step; None for the whole tape."""
        return None if self.lengths is None else sum(self.lengths)

    def describe(self) -> str:
        """Where the path or its derivative ceased to be finite, exploded or vanished; concrete values only."""
        count = int(self.num_steps)
        slopes, norms = (
            np.asarray(self.gradient_norms)[:count],
            np.asarray(self.derivative_norms)[: count + 1],
        )
        if not np.all(np.isfinite(slopes)):
            step = np.argmax(~np.isfinite(slopes))
            return f"The inner gradient is not finite at step {step} of {count}: {_BLOWN_UP}"
        first = 0 if self.truncate is None else max(0, count - self.truncate)
        order = np.arange(first + 1, count + 1) if self.mode == "forward" else np.arange(count, first - 1, -1)
        name = "Sensitivity" if self.mode == "forward" else "Adjoint"
        broken = ~np.isfinite(norms[order])
        if np.any(broken):
            place = order[np.argmax(broken)]
            return f"The path is finite; its derivative ceases to be at θ_{place} of {count}: {_BLOWN_UP}"
        largest = order[np.argmax(norms[order])]
        return (
            f"{name} of the path: {norms[order[0]]:.2e} at θ_{order[0]}, at most {norms[largest]:.2e} "
            f"(at θ_{largest}), {norms[order[-1]]:.2e} at θ_{order[-1]}."
        )


def num_repeated(walk: Walk) -> Int[Array, ""]:
    """Of a path that has ended here."""
    return jnp.zeros((), jnp.int32) if walk.scaling is None else walk.scaling.repeated


_BLOWN_UP = (
    "take a smaller step, clip the gradients (`optax.clip_by_global_norm`) or bound the hyperparameters."
)
