"""One step of an inner loop as a pure function: draw a batch, take the gradient, let Optax move."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._pytree import tree_norm
from curvax.unroll._flat_roots import with_flat_roots
from curvax.unroll._gradient import gradient, mixed_gradient
from curvax.unroll._half import HalfPrecision, Scaling, guarded_gradient

# Under this name the gradient of a step is kept where the rest of the step is computed again.
GRADIENT = "curvax.unroll.gradient"


# (φ, number of the step) ↦ the optimiser.
Transformation = Callable[[PyTree[Array], Any], optax.GradientTransformationExtraArgs]


class Walk(NamedTuple):
    """Where a path has got to: θ, the optimiser's state, the steps taken, whether it has stopped (or None).

    And the scale of a loss in float16, or None.
    """

    theta: PyTree[Array]
    state: PyTree
    taken: Int[Array, ""]
    stopped: Bool[Array, ""] | None
    scaling: Scaling | None = None


class Step(eqx.Module):
    """The step as a pytree: all that it depends on, what the user's functions close over too, is among its leaves.

    Attributes:
        loss: (θ, φ, batch) ↦ ℓ, traced once.
        update: (φ, ∇ℓ, ℓ, state, θ, batch, count) ↦ (θ, state), traced once.
        draw: Key ↦ batch, traced once, or the batch of every step.
        phi: Hyperparameters.
        key: Random key that is folded with the number of a step, or None.
        tolerance: The path stops after a step whose gradient is at most that long, or None.
        value_dtype: Of the loss.
        uses_value: Whether the optimiser asks for the value of the loss.
        mixed: Whether the gradient is differentiated in mixed mode.
        half: How the gradient is computed in half precision, or None.
        narrow: The loss in half precision, traced once, or None.
    """

    loss: Callable
    update: Callable
    draw: Callable | PyTree
    phi: PyTree[Array]
    key: Array | None
    tolerance: Float[Array, ""] | None
    value_dtype: Any = eqx.field(static=True)
    uses_value: bool = eqx.field(static=True)
    mixed: bool = eqx.field(static=True, default=False)
    half: HalfPrecision | None = None
    narrow: Callable | None = None

    def batch(self, count: Int[Array, ""]) -> PyTree:
        """The data of the step of this number."""
        return self.draw if self.key is None else self.draw(jax.random.fold_in(self.key, count))

    def value(self, theta: PyTree[Array], batch: PyTree) -> Float[Array, ""]:
        """The loss for an optimiser that asks for it; zero otherwise."""
        return self.loss(theta, self.phi, batch) if self.uses_value else jnp.zeros((), self.value_dtype)

    @property
    def example(self) -> PyTree:
        """A batch, or the shapes of one."""
        return self.draw if self.key is None else eqx.filter_eval_shape(self.draw, self.key)

    def at(self, phi: PyTree[Array]) -> "Step":
        """The same step at other hyperparameters."""
        return eqx.tree_at(lambda step: step.phi, self, phi)

    def in_mixed_mode(self) -> "Step":
        """The same step, its gradient differentiated in mixed mode."""
        return Step(**{**vars(self), "mixed": True})

    def in_full_precision(self) -> "Step":
        """The same step without half precision."""
        return Step(**{**vars(self), "half": None, "narrow": None})

    def slope(self, walk: Walk, batch: PyTree) -> tuple[PyTree[Array], Scaling | None]:
        """∇ℓ at a point, and how the loss is to be scaled from there on."""
        loss = self.loss if self.narrow is None else self.narrow
        if self.half is not None and walk.scaling is not None:
            slope, sound = guarded_gradient(loss, self.loss, walk.theta, self.phi, batch, walk.scaling.value)
            return slope, jax.lax.stop_gradient(self.half.next(walk.scaling, sound))
        differentiated = mixed_gradient if self.mixed else gradient
        return differentiated(loss, walk.theta, self.phi, batch), walk.scaling

    def __call__(self, walk: Walk) -> tuple[Walk, Float[Array, ""]]:
        """The next point and ‖∇ℓ‖ at this one."""
        batch = self.batch(walk.taken)
        slope, scaling = self.slope(walk, batch)
        slope = checkpoint_name(slope, GRADIENT)
        value = self.value(walk.theta, batch)
        theta, state = self.update(self.phi, slope, value, walk.state, walk.theta, batch, walk.taken)
        length = jax.lax.stop_gradient(tree_norm(slope))
        stopped = None if self.tolerance is None else length <= self.tolerance.astype(length.dtype)
        return Walk(theta, state, walk.taken + 1, stopped, scaling), length


def initial_state(
    transformation: Transformation, theta: PyTree[Array], phi: PyTree[Array], like: PyTree | None = None
) -> PyTree:
    """The optimiser's state at the start, in the dtypes of `like`."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        state = jax.tree.map(jnp.asarray, transformation(phi, jnp.zeros((), jnp.int32)).init(theta))
    return state if like is None else jax.tree.map(lambda a, b: a.astype(b.dtype), state, like)


def build(
    transformation: Transformation,
    loss: Callable,
    theta: PyTree[Array],
    phi: PyTree[Array],
    data: PyTree,
    key: Array | None,
    *,
    tolerance: Float[Array, ""] | float | None,
    half: HalfPrecision | None = None,
) -> tuple[Step, Walk]:
    """The step at these hyperparameters, and where it starts.

    Args:
        transformation: (φ, count) ↦ the optimiser.
        loss: (θ, φ, batch) ↦ scalar; called once, to be traced.
        theta: Start; inexact arrays.
        phi: Hyperparameters; inexact arrays.
        data: The batch of every step, or a sampler key ↦ batch.
        key: Random key; None where nothing is drawn.
        tolerance: As in `Step`.
        half: As in `Step`.
    """
    sampled = callable(data)
    batch = eqx.filter_eval_shape(data, key) if sampled else data
    traced_loss = _traced(loss, theta, phi, batch)
    value = eqx.filter_eval_shape(traced_loss, theta, phi, batch)
    state, count = initial_state(transformation, theta, phi), jnp.zeros((), jnp.int32)

    def update(
        phi: Any, slope: Any, value: Any, state: Any, theta: Any, batch: Any, count: Any
    ) -> tuple[PyTree[Array], PyTree]:
        def move(slope: Any, value: Any, state: Any, theta: Any) -> tuple[PyTree[Array], PyTree]:
            updates, state = optimizer.update(
                slope, state, theta, value=value, grad=slope, value_fn=lambda t: traced_loss(t, phi, batch)
            )
            # Optax promotes scalars of another dtype: the path keeps its own.
            return jax.tree.map(lambda t, u: t + u.astype(t.dtype), theta, updates), state

        with jax.numpy_dtype_promotion("standard"):
            # Outside of `move`: a square root that the user takes of φ keeps its derivative.
            optimizer = transformation(phi, count)
            return with_flat_roots(move)(slope, value, state, theta)

    traced_update = _traced(update, phi, theta, value, state, theta, batch, count)
    _, after = eqx.filter_eval_shape(traced_update, phi, theta, value, state, theta, batch, count)
    if [leaf.dtype for leaf in jax.tree.leaves(state)] != [leaf.dtype for leaf in jax.tree.leaves(after)]:
        # A schedule may widen the state: it starts in the dtypes that a step returns.
        state = initial_state(transformation, theta, phi, like=after)
        traced_update = _traced(update, phi, theta, value, state, theta, batch, count)
    step = Step(
        loss=traced_loss,
        update=traced_update,
        draw=_traced(data, key) if sampled else data,
        phi=phi,
        key=key if sampled else None,
        tolerance=None if tolerance is None else jnp.asarray(tolerance),
        value_dtype=value.dtype,
        uses_value=_reads(traced_update, (phi, theta, value, state, theta, batch, count), 2),
        half=half,
        narrow=None if half is None else _traced(half.loss(loss), theta, phi, batch),
    )
    stopped = None if tolerance is None else jnp.asarray(False)
    return step, Walk(theta, state, count, stopped, None if half is None else half.start())


def _traced(fn: Callable, *args: Any) -> Callable:
    """`fn` as its program, with what it closes over among its leaves; args are arrays or shapes."""
    # Equinox leaves a function that has no closure as it is: it would be called whenever the program is used.
    return eqx.filter_closure_convert(lambda *a: fn(*a), *args)


def _reads(fn: Callable, args: tuple, position: int) -> bool:
    """Whether a function depends on its argument at this position, an array, by its program."""
    jaxpr = eqx.filter_make_jaxpr(fn)(*args)[0].jaxpr
    variable = jaxpr.invars[len(jax.tree.leaves(args[:position]))]
    read = [atom for equation in jaxpr.eqns for atom in equation.invars]
    return any(atom is variable for atom in [*read, *jaxpr.outvars])
