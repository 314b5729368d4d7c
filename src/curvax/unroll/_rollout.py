"""The inner loop of a task: from hyperparameters to steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax.unroll._path import advance
from curvax.unroll._step import Step, Walk, build, initial_state
from curvax.unroll._steps import Steps


class Rollout(eqx.Module):
    """φ ↦ the point that `cx.Steps` reaches, whole or step by step.

    Attributes:
        steps: The inner solver.
        loss: (θ, φ, batch) ↦ ℓ, of inexact arrays.
        theta0: Start.
        phi_static: What of the user's phi is no inexact array.
        data: The batch of every step, or a sampler key ↦ batch.
        key: Random key of the steps, or None.
    """

    steps: Steps
    loss: Callable[..., Array]
    theta0: PyTree[Array]
    phi_static: PyTree
    data: PyTree
    key: Array | None

    def __check_init__(self) -> None:
        if self.steps.tolerance is not None and callable(self.data):
            raise ValueError(
                "`tolerance` of `Steps` stops the path where the inner gradient is small, but `inner_data` is a "
                "sampler, whose batches differ. Leave the tolerance out or give fixed data."
            )

    def transformation(
        self, phi: PyTree[Array], count: Int[Array, ""]
    ) -> optax.GradientTransformationExtraArgs:
        """The optimiser at φ, in the step of this number."""
        return self.steps.transformation(eqx.combine(phi, self.phi_static), count)

    def begin(self, phi: PyTree[Array]) -> PyTree[Array]:
        """θ at the start, which may be a function of φ."""
        if self.steps.start is None:
            return self.theta0
        found = eqx.filter(self.steps.start(eqx.combine(phi, self.phi_static)), eqx.is_inexact_array)
        wanted, given = (jax.tree.map(jnp.shape, tree) for tree in (self.theta0, found))
        if jax.tree.flatten(wanted) != jax.tree.flatten(given):
            raise ValueError(
                "`start` of `Steps` was called with phi and must return what θ is at the start, of the structure and "
                f"the shapes of `theta0`, {wanted}; got {given}."
            )
        return jax.tree.map(lambda a, b: a.astype(b.dtype), found, self.theta0)

    def step(self, phi: PyTree[Array], start: PyTree[Array] = None) -> tuple[Step, Walk]:
        """The step at φ and where it starts; the user's loss is traced here, and only here."""
        theta = self.begin(phi) if start is None else start
        return build(
            self.transformation,
            self.loss,
            theta,
            phi,
            self.data,
            self.key,
            tolerance=self.steps.tolerance,
            half=self.steps.half,
        )

    def moved(self, step: Step, walk: Walk, phi: PyTree[Array]) -> tuple[Step, Walk]:
        """The same at another φ, which may be part of the start and of the optimiser's first state."""
        theta = walk.theta if self.steps.start is None else self.begin(phi)
        state = initial_state(self.transformation, theta, phi, like=walk.state)
        return step.at(phi), walk._replace(theta=theta, state=state)

    def end(self, phi: PyTree[Array], start: PyTree[Array] = None) -> Walk:
        """Where the path ends; not to be differentiated in reverse."""
        return advance(*self.step(phi, start), self.steps.num_steps)

    def __call__(self, phi: PyTree[Array]) -> PyTree[Array]:
        """θ at the end of the path."""
        return self.end(phi).theta
