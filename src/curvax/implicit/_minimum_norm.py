"""The derivative of the solution that moves least, where the solutions of the inner problem form a family."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._control import run_if
from curvax._pytree import (
    tree_all_finite,
    tree_axpy,
    tree_dtype,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax.implicit._condition import Linearised
from curvax.implicit._family import can_be_followed
from curvax.implicit._stage import AbstractStage, Request, StageInfo
from curvax.linear import TruncatedSpectrum


class MinimumNormStage(AbstractStage):
    """Solves with A⁺ by `TruncatedSpectrum`; singular where the family cannot be followed."""

    solver: TruncatedSpectrum
    symmetric: bool

    @property
    def knows_its_error(self) -> bool:
        """True: exact up to rounding, for the A that is left."""
        return True

    def _products(self, size: int, cycles: Array) -> Array:
        iterated = 6 * cycles * (0 if self.solver.rank is None else self.solver.rank + 8)
        return (jnp.where(cycles > 0, iterated, size) + 5).astype(jnp.int32)

    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """One decomposition, two solves and five products; skipped when not wanted."""
        structure = jax.eval_shape(lambda x: x, request.rhs)
        dtype = tree_dtype(structure)
        apply = lambda v: tree_axpy(request.damping, v, at.apply(v))  # noqa: E731
        # Not tagged definite: what is negative is found out here, and what of it is above the cutoff is told.
        tags = lx.symmetric_tag if self.symmetric else ()
        matrix = lx.FunctionLinearOperator(apply, structure, tags)

        def run() -> tuple[PyTree[Array], StageInfo]:
            state = self.solver.init(matrix, {})
            solve = lambda state, v: self.solver.compute(state, v, {})  # noqa: E731
            turned = tree_where(request.transposed, self.solver.transpose(state, {})[0], state)
            x, result, stats = solve(turned, request.rhs)
            followed = can_be_followed(
                apply, lambda v: solve(state, v)[0], lambda v: at.transposed(v)[1], request.rhs
            )
            product = tree_where(request.transposed, at.transposed(x)[0], at.apply(x))
            residual = tree_sub(tree_axpy(-request.damping, x, request.rhs), product)
            kept = stats["rank"] > 0
            smallest = jnp.where(kept, stats["smallest_kept"], jnp.inf)
            finite = tree_all_finite((x, request.rhs)) & jnp.isfinite(stats["largest"])
            # Left and right vectors of a negative eigenvalue have opposite signs, or the value is negative itself.
            signs = jnp.sum(state.left * state.right, axis=1) * state.values
            indefinite = self.symmetric & jnp.any((state.weights != 0) & (signs < 0))
            return x, StageInfo(
                num_matvecs=self._products(matrix.in_size(), stats["num_steps"]),
                ritz_min=jnp.asarray(jnp.inf, dtype),
                curvature_min=smallest,
                curvature_max=jnp.where(kept, stats["largest"], 0),
                solution_norm=tree_norm(x),
                residual_norm=tree_norm(request.undamped(x, residual)),
                singular=finite & ~followed,
                indefinite=finite & indefinite,
                exhausted=finite & (result == lx.RESULTS.max_steps_reached),
                nonfinite=~finite,
                recycled=request.recycled,
                decades=jnp.zeros((), dtype),
                tried=jnp.asarray(False),
            )

        like = jax.eval_shape(run)
        nothing = tree_zeros_like(like)
        return run_if(request.wanted, lambda _: run(), nothing)
