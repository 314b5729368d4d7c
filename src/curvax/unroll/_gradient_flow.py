"""Inner solver: gradient flow, an ordinary differential equation solved by Diffrax."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_dtype, tree_scale
from curvax._results import RESULTS
from curvax.unroll._gradient import gradient

if TYPE_CHECKING:
    from types import ModuleType

_MISSING = (
    "`GradientFlow` needs Diffrax, which is not installed. Install it with `pip install 'curvax[ode]'`; "
    "`cx.Steps` with small steps of `optax.sgd` follows the same path without it."
)


class GradientFlow(eqx.Module):
    r"""The point that gradient flow reaches, from the start that the caller gives, after a time that may be learned.

        dθ/dt = −∇_θ g(θ, φ),   θ(0) = θ₀,   0 ≤ t ≤ T(φ).

    The limit of gradient descent as its steps become small: the horizon T takes the place of their number and their
    size together, and is a hyperparameter that has a derivative, df/dT = −∇f·∇g at the end.

    Args:
        horizon: T, a positive number; or a function phi -> T where it is a hyperparameter,
            `lambda phi: jnp.exp(phi["log horizon"])`.
        rtol: Relative tolerance of the solver, for each component of θ (with `cx.Unrolled()` of its sensitivities too).
        atol: Absolute tolerance.
        solver: A Diffrax solver; `diffrax.Tsit5()` where None. Where the curvatures differ by orders of magnitude an
            implicit one needs fewer steps: `diffrax.Kvaerno5()`.
        max_steps: Most steps that the solver may take; more are a failure.

    Used with `rule=cx.Unrolled()`, whose mode is then "forward", for `hypergradient` and `minimise`; with
    `cx.Implicit()` where T is long enough to arrive, and with `cx.FirstOrder()`. A sampler as `inner_data` is drawn
    from once for each call: a flow has one vector field.

    Raises:
        ImportError: Diffrax is missing: `pip install 'curvax[ode]'`.
        ValueError: `horizon`, a tolerance or `max_steps` is not positive; `solver` does not choose its own steps.
        TypeError: `horizon` is neither a number nor a function, `solver` no Diffrax solver.

    Cost: the inner gradients that the solver takes, six a step for Tsit5, with about λmax·T/3 steps at least for an
        explicit solver where the largest curvature is λmax. Memory: the stages of one step.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, phi, _: 0.5 * jnp.sum((w - phi["target"]) ** 2),
            outer=lambda w, phi, _: jnp.sum((w - 0.5) ** 2),
        )
        flow = cx.GradientFlow(lambda phi: jnp.exp(phi["log horizon"]), rtol=1e-5, atol=1e-5)
        phi = {"target": jnp.ones(3), "log horizon": jnp.asarray(0.0)}
        hg = cx.hypergradient(problem, phi, jnp.zeros(3), inner_solver=flow, rule=cx.Unrolled())
        hg.grad["log horizon"]  # 3 * 2 (θ − 0.5) exp(−1) with θ = 1 − exp(−1)
        ```

    Source: T. Deleu et al., "Continuous-time meta-learning with forward mode differentiation" (COMLN), ICLR 2022,
        arXiv 2203.01443. Ours serves any loss; theirs has shorter sensitivities for a last layer alone.
    """

    horizon: Float[Array, ""] | float | Callable[[PyTree], Array]
    rtol: Float[Array, ""] | float = eqx.field(kw_only=True)
    atol: Float[Array, ""] | float = eqx.field(kw_only=True)
    solver: Any = eqx.field(kw_only=True, default=None)
    max_steps: int = eqx.field(kw_only=True, static=True, default=4096)

    def __check_init__(self) -> None:
        diffrax = _diffrax()
        if not callable(self.horizon):
            _check_positive("horizon", self.horizon)
        _check_positive("rtol", self.rtol)
        _check_positive("atol", self.atol)
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(
                f"`max_steps` of `GradientFlow` must be an integer of at least 1, got {self.max_steps!r}."
            )
        if self.solver is not None and not isinstance(self.solver, diffrax.AbstractSolver):
            found = f"the class {self.solver.__name__}" if isinstance(self.solver, type) else self.solver
            raise TypeError(
                f"`solver` of `GradientFlow` must be a Diffrax solver, as `diffrax.Tsit5()`, got {found}."
            )
        if self.solver is not None and not _fits(self.solver, diffrax):
            raise ValueError(
                "`solver` of `GradientFlow` must be one of Diffrax's for a single vector field, with an error estimate "
                f"by which its steps are chosen; {type(self.solver).__name__} is not. Take `diffrax.Tsit5()`, or "
                "`diffrax.Kvaerno5()` where the flow is stiff."
            )


class Flow(eqx.Module):
    """The flow of a task: from hyperparameters to where it ends.

    Attributes:
        solver: The inner solver.
        loss: (θ, φ, batch) ↦ ℓ, of inexact arrays.
        theta0: Start.
        phi_static: What of the user's phi is no inexact array.
        batch: The data.
    """

    solver: GradientFlow
    loss: Callable[..., Array]
    theta0: PyTree[Array]
    phi_static: PyTree
    batch: PyTree

    def horizon(self, phi: PyTree[Array]) -> Float[Array, ""]:
        """T(φ)."""
        found: Any = self.solver.horizon
        if callable(found):
            found = found(eqx.combine(phi, self.phi_static))
            if not eqx.is_array_like(found) or jnp.ndim(found) != 0 or jnp.iscomplexobj(found):
                raise TypeError(
                    "`horizon` of `GradientFlow` was called with phi and must return one real number, got "
                    f"{jax.tree.map(jnp.shape, found)}."
                )
        return jnp.asarray(found, tree_dtype(self.theta0))

    def field(self, phi: PyTree[Array]) -> Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]]:
        """(φ, θ) ↦ dθ/ds on 0 ≤ s ≤ 1, that is −T ∇_θ ℓ: the horizon is one hyperparameter among others."""

        def scaled(phi: PyTree[Array], theta: PyTree[Array]) -> PyTree[Array]:
            return tree_scale(-self.horizon(phi), gradient(self.loss, theta, phi, self.batch))

        return eqx.filter_closure_convert(scaled, phi, self.theta0)

    def follow(
        self, field: Callable[[PyTree[Array]], PyTree[Array]], start: PyTree[Array], tighter: float = 1.0
    ) -> tuple[PyTree[Array], Array, RESULTS]:
        """Where dy/ds = field(y) leads from s = 0 to 1, the steps that were taken, and how it went.

        Args:
            field: The right-hand side.
            start: y at 0.
            tighter: What the tolerances are multiplied by.
        """
        diffrax, solver = _diffrax(), self.solver
        dtype = tree_dtype(start)
        with jax.numpy_dtype_promotion("standard"):  # Diffrax mixes precisions
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda s, y, _: field(y)),
                solver.solver or diffrax.Tsit5(),
                jnp.zeros((), dtype),
                jnp.ones((), dtype),
                None,
                start,
                stepsize_controller=diffrax.PIDController(
                    rtol=tighter * jnp.asarray(solver.rtol, dtype),
                    atol=tighter * jnp.asarray(solver.atol, dtype),
                ),
                max_steps=solver.max_steps,
                adjoint=diffrax.ForwardMode(),
                throw=False,
            )
        end = jax.tree.map(lambda leaf, like: leaf[0].astype(like.dtype), found.ys, start)
        return end, found.stats["num_steps"].astype(jnp.int32), _result(found.result, diffrax)

    def remaining(self, tighter: float) -> float:
        """Which part of an error is left with tolerances so much smaller.

        An error of a step of tol = O(hᵖ⁺¹) at order p adds up to one of O(hᵖ) at the end.
        """
        diffrax, solver = _diffrax(), self.solver.solver
        order = 5 if solver is None else solver.order(diffrax.ODETerm(lambda s, y, _: y)) or 1
        return float(tighter ** (order / (order + 1)))

    def end(
        self, phi: PyTree[Array], start: PyTree[Array] | None = None
    ) -> tuple[PyTree[Array], Array, RESULTS]:
        """θ(T), the steps that were taken, and how it went."""
        field = self.field(phi)
        theta, num_steps, result = self.follow(
            lambda theta: field(phi, theta), self.theta0 if start is None else start
        )
        return theta, num_steps, self.checked(phi, result)

    def checked(self, phi: PyTree[Array], result: RESULTS) -> RESULTS:
        """A horizon that is no positive number is a failure: time runs forward."""
        return RESULTS.where(self.horizon(phi) > 0, result, RESULTS.flow_not_finished)

    def __call__(self, phi: PyTree[Array]) -> PyTree[Array]:
        """θ(T)."""
        return self.end(phi)[0]


def _result(found: Any, diffrax: "ModuleType") -> RESULTS:
    """Diffrax's status in our enumeration."""
    arrived = found == diffrax.RESULTS.successful
    return RESULTS.where(arrived, RESULTS.successful, RESULTS.flow_not_finished)


def _diffrax() -> "ModuleType":
    try:
        import diffrax
    except ModuleNotFoundError as error:
        raise ImportError(_MISSING) from error
    return diffrax


def _fits(solver: Any, diffrax: "ModuleType") -> bool:
    """Whether a solver of Diffrax chooses its own steps and takes one vector field."""
    terms = solver.term_structure
    return (
        isinstance(solver, diffrax.AbstractAdaptiveSolver)
        and isinstance(terms, type)
        and issubclass(diffrax.ODETerm, terms)
    )


def _check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive number, as far as that is known."""
    if isinstance(value, str | bool) or not eqx.is_array_like(value) or jnp.ndim(value):
        wanted = "a positive number or a function of phi" if name == "horizon" else "a positive number"
        raise TypeError(f"`{name}` of `GradientFlow` must be {wanted}, got {value!r}.")
    known = isinstance(value, int | float | np.ndarray | np.generic)
    if known and not 0 < value < np.inf:
        raise ValueError(f"`{name}` of `GradientFlow` must be positive and finite, got {value}.")
