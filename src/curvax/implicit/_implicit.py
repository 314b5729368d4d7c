"""The implicit rule: one object for `hypergradient`, `solution_map` and Optimistix's `adjoint=`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_dtype, tree_size
from curvax.implicit._adjoint import implicit_solution, while_loop
from curvax.implicit._minimum_norm import MinimumNormStage
from curvax.implicit._progress import Accuracy
from curvax.implicit._rule import AbstractRule, Outcome, State, Task
from curvax.implicit._single import run_single
from curvax.implicit._stage import (
    DENSE_SIZE,
    DENSE_SIZE_GENERAL,
    AbstractStage,
    CheckedStage,
    ConjugateGradientStage,
    DenseStage,
    LineaxStage,
)
from curvax.implicit._sweeps import run_sweeps
from curvax.linear import CG, Auto, TruncatedSpectrum
from curvax.linear._upkeep import KeptPreconditioner, Upkeep, nothing_kept

# The rewrite functions of these modules are gradients: their Jacobians are Hessians.
_SYMMETRIC_SOURCES = ("optimistix._minimise", "optimistix._least_squares")

# Directions that are recycled by default, and how many numbers they may be together.
RECYCLED, FEWEST_RECYCLED, RECYCLED_SIZE = 24, 6, 2**17


def _nonnegative(value: Any, name: str) -> None:
    if isinstance(value, int | float | np.ndarray | np.generic) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"`{name}` of `Implicit` must be at least 0, got {value}.")


class Implicit(AbstractRule, optx.AbstractAdjoint):
    r"""Derivative of an inner solution by the implicit function theorem, to an accuracy on request.

    For an inner solution defined by F(θ, φ) = 0 (F = ∇_θ g for a minimum) and an outer loss f,

        df/dφ = ∂f/∂φ − Bᵀ q,   Aᵀ q = ∂f/∂θ,   A = ∂F/∂θ,   B = ∂F/∂φ:

    one linear solve whatever the number of hyperparameters, memory O(dim θ + dim φ).

    In `cx.hypergradient` the request is `error_estimate <= atol + rtol * norm(grad)`, where the estimate
    compares the hypergradients before and after one Newton sweep of θ and q with the undamped curvature, so that
    inner error, adjoint error and the bias of damping all count. With `optx.minimise(..., adjoint=rule)` (also
    `root_find`, `fixed_point`, `least_squares`) and in `cx.solution_map` no estimate can come out of the derivative;
    there a failed or unfinished inner solve raises as soon as it is differentiated: unfinished means that one
    Newton step would move θ by more than `rtol * norm(theta) + atol`.

    Args:
        rtol: Relative accuracy of the hypergradient. None switches the estimate off, at no cost; the adjoint is
            then solved to a forward error of √eps and the inner solver is believed.
        atol: Absolute accuracy of the hypergradient, in its units; decides near an outer optimum, where the
            gradient vanishes.
        linear_solver: A Lineax solver for the adjoint. By default conjugate gradients that stop on their forward
            error for minima (a dense decomposition up to 32 unknowns); for roots and fixed points a dense
            decomposition up to 128 unknowns, then `cx.linear.Auto`.
            The corrections that judge the result are made by the same defaults whatever is given here; a root or fixed
            point with more unknowns is judged by the contraction of two sweeps instead.
            Where A is singular and the solutions form a family, `cx.linear.TruncatedSpectrum` is the request for the
            derivative of the solution that moves least, −A⁺B dφ, and makes the corrections as well. Its `cutoff` says
            which eigenvalues are zeros: choose it above the relative accuracy of the inner solution. Where the family
            cannot be followed (B maps out of the range of A) there is no derivative: `singular_curvature`.
        preconditioner: A positive definite operator ≈ A⁻¹, tagged so (or symmetric), or a function
            (theta, args) -> operator with args = (phi, batch) in `hypergradient` and the user's `args` under
            Optimistix, which is called at every point that is worked at; a `cx.linear.Upkeep` of such a function is
            called when it is due. No derivative flows through it.
        damping: λ ≥ 0 added to the diagonal of A in the first adjoint solve (in every one under autodiff).
            The bias that it makes counts in the error estimate.
        max_sweeps: Sweeps allowed to reach the request. From a warm start at least four are tried before the inner
            solver is called.
        recycle: How many directions of the solves to keep, as a preconditioner for the solves that follow, in the
            same call and, through `state`, in the next: 2 · recycle vectors like theta, and 4 · recycle vector
            operations a product. None: up to 24 while they are at most 2^17 numbers (theta up to 21845). Only where
            conjugate gradients solve, undamped, and an estimate is made: not for roots, fixed points, `rtol=None`.
            With a `preconditioner` of your own none by default.

    Raises:
        ValueError: A tolerance, the damping or the number of sweeps is out of range. When it is used: a preconditioner
            that is not tagged, for conjugate gradients or MINRES, or not shaped like θ.

    Cost: about √κ/2 · log(1/rtol) Hessian products for the adjoint and as many for the estimate's loose
        corrections; a Hessian product costs 1–2 gradients.

    Example:
        ```python
        import jax, jax.numpy as jnp, optimistix as optx, curvax as cx

        def loss(w, lam):
            return jnp.sum((w - 1.0) ** 2) + lam * jnp.sum(w**2)

        def solution(lam):
            solver = optx.BFGS(rtol=1e-5, atol=1e-5)
            return optx.minimise(loss, solver, jnp.zeros(3), lam, adjoint=cx.Implicit()).value

        jax.grad(lambda lam: jnp.sum(solution(lam)))(jnp.array(0.5))  # -3 / 1.5**2
        ```

    Source: F. Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, arXiv 1602.02355, for the
        inexact adjoint; M. Blondel et al., "Efficient and modular implicit differentiation", 2021, arXiv 2105.15183.
        The error estimate by sweeps is ours; see the page on accuracy in the documentation.
    """

    rtol: Float[Array, ""] | float | None = 1e-2
    atol: Float[Array, ""] | float = 0.0
    linear_solver: lx.AbstractLinearSolver | None = None
    preconditioner: lx.AbstractLinearOperator | Callable[[PyTree, Any], lx.AbstractLinearOperator] | None = (
        None
    )
    damping: Float[Array, ""] | float = 0.0
    max_sweeps: int = 1
    recycle: int | None = None

    def __check_init__(self) -> None:
        _nonnegative(self.atol, "atol")
        _nonnegative(self.damping, "damping")
        for name in ("rtol", "atol", "damping"):
            value = getattr(self, name)
            if value is None and name == "rtol":
                continue
            if (
                value is None
                or isinstance(value, str | bool | complex | list | tuple | dict)
                or jnp.ndim(value)
            ):
                raise TypeError(f"`{name}` of `Implicit` must be a number, a scalar, got {value!r}.")
        if isinstance(self.rtol, int | float) and not 0 <= self.rtol < 1:
            raise ValueError(f"`rtol` of `Implicit` must lie in [0, 1) or be None, got {self.rtol}.")
        if isinstance(self.max_sweeps, bool) or not isinstance(self.max_sweeps, int) or self.max_sweeps < 1:
            raise ValueError(
                f"`max_sweeps` of `Implicit` must be an integer of at least 1, got {self.max_sweeps!r}."
            )
        if self.recycle is not None and (
            isinstance(self.recycle, bool) or not isinstance(self.recycle, int) or self.recycle < 0
        ):
            raise ValueError(
                f"`recycle` of `Implicit` must be None or an integer of at least 0, got {self.recycle!r}."
            )
        if self.linear_solver is not None and not isinstance(self.linear_solver, lx.AbstractLinearSolver):
            raise TypeError(
                f"`linear_solver` of `Implicit` must be a Lineax solver, got {type(self.linear_solver).__name__}."
            )
        if self.preconditioner is not None and not callable(self.preconditioner):
            if not isinstance(self.preconditioner, lx.AbstractLinearOperator):
                raise TypeError(
                    "`preconditioner` of `Implicit` must be a Lineax operator or a function (theta, args) -> operator, "
                    f"got {type(self.preconditioner).__name__}."
                )

    # --- as an Optimistix adjoint ---

    def apply(
        self, primal_fn: Callable, rewrite_fn: Callable, inputs: PyTree, tags: frozenset[object]
    ) -> PyTree[Array]:
        """Run the solver and attach the implicit derivative; called by Optimistix."""
        if getattr(rewrite_fn, "__module__", "") in _SYMMETRIC_SOURCES:
            tags = tags | {lx.symmetric_tag}
        return implicit_solution(primal_fn, rewrite_fn, (*inputs, while_loop()), self, tags)

    def solver_for(self, tags: frozenset[object], dtype: Any) -> lx.AbstractLinearSolver:
        """The linear solver of the derivative for a Jacobian with these tags in this precision."""
        if self.linear_solver is not None:
            return self.linear_solver
        tolerance = 1e-6 if self.rtol is None else jnp.clip(0.1 * jnp.asarray(self.rtol), 1e-10, 1e-3)
        symmetric = lx.symmetric_tag in tags or lx.positive_semidefinite_tag in tags
        if symmetric:
            return CG(rtol=tolerance)
        return Auto(rtol=jnp.maximum(tolerance * 1e-3, 100 * jnp.finfo(dtype).eps), atol=0.0, probe=False)

    @staticmethod
    def args_of(inputs: tuple) -> Any:
        """The user's `args` among the inputs of an Optimistix solve (fn, solver, y0, args, …)."""
        return inputs[3]

    # --- as a rule of `hypergradient` ---

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Refuse an error estimate of a problem that changes at every step."""
        del has_rollout
        if stochastic_steps and self.rtol is not None:
            raise ValueError(
                "`rule=Implicit(rtol=...)` estimates the error against a fixed inner problem, but `inner_data` is a "
                "sampler and `cx.Steps` draws a new batch at every step. Pass the inner data as arrays, or "
                "`Implicit(rtol=None)` for a stochastic hypergradient without an estimate."
            )

    @property
    def follows_trend(self) -> bool:
        """With an estimate a warm start is only corrected, so that a better one saves work."""
        return self.rtol is not None

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """The hypergradient by sweeps, reported and never raised."""
        dtype = tree_dtype((task.theta0, task.phi))
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves((task.theta0, task.phi)))
        estimated = self.rtol is not None
        rtol = jnp.asarray(self.rtol if estimated else eps**0.5, dtype)
        stage, own_rtol = self._stage(task.theta0, task.condition.symmetric)
        first = jnp.clip(0.7 * rtol, 10 * eps, 0.1) if own_rtol is None else own_rtol
        accuracy = Accuracy(
            eps=eps,
            rtol=rtol,
            atol=jnp.asarray(self.atol, dtype),
            adjoint_rtol=jnp.asarray(first, dtype),
            damping=jnp.asarray(self.damping, dtype),
            max_sweeps=self.max_sweeps,
        )
        if not estimated:
            return run_single(task, stage, accuracy, state)
        return run_sweeps(task, stage, accuracy, state)

    def num_recycled(self, theta: PyTree[Array], symmetric: bool) -> int:
        """As `recycle` says; by default up to 24 where they cost little memory and there is an estimate."""
        stage, _ = self._stage(theta, symmetric)
        if isinstance(stage, DenseStage) and (symmetric or not self.recycle):
            return 0
        # Of a damped solve the directions are those of another matrix.
        undamped = isinstance(self.damping, int | float) and self.damping == 0
        serves = stage.recycles and self.rtol is not None and undamped
        if self.recycle is not None:
            if self.recycle and not serves:
                raise ValueError(
                    f"`recycle={self.recycle}` of `Implicit` needs an error estimate (`rtol` that is not None), no "
                    "`damping`, and conjugate gradients: an inner minimum, not a root or a fixed point."
                )
            return self.recycle
        fitting = min(RECYCLED, RECYCLED_SIZE // max(tree_size(theta), 1))
        return fitting if serves and self.preconditioner is None and fitting >= FEWEST_RECYCLED else 0

    @property
    def keeps_preconditioner(self) -> bool:
        """With an `Upkeep`."""
        return isinstance(self.preconditioner, Upkeep)

    def kept_preconditioner(self, theta: PyTree, args: PyTree, symmetric: bool) -> KeptPreconditioner | None:
        """The place of the operator of an `Upkeep`."""
        keeper = self.preconditioner
        if not isinstance(keeper, Upkeep):
            return None
        stage, _ = self._stage(eqx.filter(theta, eqx.is_inexact_array), symmetric)
        if keeper.every is None and not isinstance(stage, ConjugateGradientStage):
            raise ValueError(
                "`preconditioner=Upkeep(...)` of `Implicit` needs `every` here: only conjugate gradients of this "
                "library (`linear_solver=None` or `cx.linear.CG`, an inner minimum) know when the effort grows."
            )
        return nothing_kept(keeper, theta, args)

    def _stage(self, theta: PyTree[Array], symmetric: bool) -> tuple[AbstractStage, Any]:
        """How the solves are done, and the forward error that the user's own CG asks for."""
        size, solver = tree_size(theta), self.linear_solver
        if isinstance(solver, CG):
            if not symmetric:
                raise ValueError(
                    "`linear_solver=CG(...)` needs a symmetric curvature, but the inner problem is a root or a fixed "
                    "point. Use `cx.linear.Auto` or `lx.GMRES`."
                )
            return ConjugateGradientStage(self.preconditioner, solver.max_steps), solver.rtol
        if isinstance(solver, TruncatedSpectrum):
            if self.preconditioner is not None:
                raise ValueError(
                    "`preconditioner` of `Implicit` has no use with `linear_solver=TruncatedSpectrum(...)`, which is a "
                    "decomposition. Leave one of them out."
                )
            return MinimumNormStage(solver, symmetric), None
        own: AbstractStage | None = None
        small = DENSE_SIZE if symmetric else DENSE_SIZE_GENERAL
        if size <= small and (self.preconditioner is None or solver is not None):
            own = DenseStage(symmetric)
        elif symmetric:
            own = ConjugateGradientStage(self.preconditioner, None)
        if solver is not None:
            first = LineaxStage(solver, self.preconditioner, symmetric)
            if own is not None and self.rtol is not None:
                return CheckedStage(first, own), None
            return first, None
        if own is not None:
            return own, None
        tolerance = jnp.finfo(tree_dtype(theta)).eps ** 0.5
        return LineaxStage(
            Auto(rtol=float(tolerance), atol=0.0, probe=False), self.preconditioner, False
        ), None
