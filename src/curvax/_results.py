"""What can go wrong, as one enumeration that every room shares."""

from typing import TYPE_CHECKING, Any, ClassVar

import optimistix as optx

if TYPE_CHECKING:
    # Equinox's enumerations declare members as strings that become items: checkers need the result spelt out.
    class RESULTS:
        """The enumeration below, as a type checker is to see it."""

        successful: ClassVar["RESULTS"]
        nonfinite: ClassVar["RESULTS"]
        singular: ClassVar["RESULTS"]
        max_steps_reached: ClassVar["RESULTS"]
        nonlinear_max_steps_reached: ClassVar["RESULTS"]
        nonlinear_divergence: ClassVar["RESULTS"]
        singular_curvature: ClassVar["RESULTS"]
        indefinite_curvature: ClassVar["RESULTS"]
        no_influence: ClassVar["RESULTS"]
        adjoint_not_converged: ClassVar["RESULTS"]
        inner_not_converged: ClassVar["RESULTS"]
        precision_limited: ClassVar["RESULTS"]
        chaotic_path: ClassVar["RESULTS"]
        flow_not_finished: ClassVar["RESULTS"]
        where: ClassVar[Any]
        promote: ClassVar[Any]
        error_if: ClassVar[Any]

        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...

else:

    class RESULTS(optx.RESULTS):
        """How a solve, a hypergradient or a run ended.

        A subclass of `optimistix.RESULTS`, so that its members (and Lineax's) can be promoted into it
        with `RESULTS.promote`. Compare with members of this class only: `==` across two enumerations
        raises, even for `successful`.

        The members added here are told apart in the order in which they are listed.
        """

        successful = ""
        singular_curvature = (
            "The curvature of the inner problem is singular to working precision: its smallest Ritz "
            "value is at rounding level. The inner solution is not unique to first order, so "
            "the hypergradient is not defined. Regularise the inner problem (an L2 term), ask for a "
            "damped derivative with `Implicit(damping=..., rtol=None)`, or, where the solutions form a family that "
            "can be followed, for that of the solution that moves least with "
            "`Implicit(linear_solver=cx.linear.TruncatedSpectrum())`."
        )
        indefinite_curvature = (
            "A direction of negative curvature was found: the point that the inner solver returned is "
            "not a minimum of the inner problem. Use another start or another inner solver. (If a `preconditioner` "
            "was given: it may not be positive definite.)"
        )
        no_influence = (
            "A hyperparameter has no influence that the rule could see: neither the outer loss nor the inner "
            "gradient depends on it (`cx.FirstOrder()` looks at the outer loss alone). The settings of the inner "
            "optimiser and the start are seen by `cx.Unrolled()`, where they are written as functions of phi: "
            "`cx.Steps(lambda phi: optax.sgd(phi['rate']), 100, start=lambda phi: phi['start'])`."
        )
        adjoint_not_converged = (
            "The linear solve for the adjoint spent its budget of steps. Pass a preconditioner, a direct "
            "`linear_solver`, or allow more steps."
        )
        inner_not_converged = (
            "The estimated error of the hypergradient is over the accuracy that was requested: the inner "
            "solution, or an adjoint that is damped or solved loosely, is not accurate enough. Raise "
            "`max_sweeps`, tighten the inner solver or `linear_solver`, lower `damping`, or loosen "
            "`rtol`/`atol` of the rule."
        )
        precision_limited = (
            "The accuracy that was requested of the hypergradient is beyond what this floating-point "
            "precision allows at the condition number of the inner curvature. Use float64, regularise the "
            "inner problem, or loosen `rtol`/`atol` of the rule."
        )
        chaotic_path = (
            "The steps of the inner solver amplify perturbations so much that rounding errors grow to more than one "
            "per cent on the way: in another order of operations the path would lead elsewhere, and its derivative "
            "would be another. Take smaller or fewer steps, clip the inner gradients, differentiate only the last "
            "steps (`cx.Unrolled(truncate=...)`), or compute in float64."
        )
        flow_not_finished = (
            "The gradient flow did not get to its horizon: the solver spent its `max_steps`, or the horizon is no "
            "positive number. Allow more steps, take an implicit solver (`diffrax.Kvaerno5()`) or looser tolerances, "
            "shorten the horizon, or write it as the exponential of a hyperparameter."
        )


def describe(result: RESULTS) -> str:
    """The message of a (concrete) result."""
    enumeration: Any = RESULTS
    return enumeration[result]
