"""Memory of an unrolled derivative: the states that are stored, and the measured working set of a step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import Array, PyTree

from curvax.unroll._lossy import rounded
from curvax.unroll._step import Step, Walk

Outer = Callable[[PyTree[Array], PyTree[Array]], Array]


class Sizes(NamedTuple):
    """Bytes.

    Attributes:
        state: A state of the path: θ, the optimiser's state, counters.
        rounded: The same in half precision.
        theta: θ, and as much its gradient.
        working: What differentiating one step takes, or the outer loss if that is more.
        tape: What reverse mode stores of a step if nothing is to be computed again.
        tangent: What moving one tangent by a step takes, the step included.
        read: All that a step reads beside the state: φ, the data, what the loss closes over.
        stops: Whether the path may stop early.
    """

    state: int
    rounded: int
    theta: int
    working: int
    tape: int
    tangent: int
    read: int
    stops: bool

    def stored(
        self, lengths: tuple[int, ...] | None, num_steps: int, *, mixed: bool, rounded: bool = False
    ) -> int:
        """With the states that nested loops of these lengths store, or with the tape of all steps."""
        if lengths is None:
            return num_steps * self.tape + 2 * self.state + self.working
        # Every loop has a state and an adjoint of its own in hand.
        states = sum(lengths) + 2 * len(lengths)
        # A branch that may be skipped has a copy of what it reads, and that of a step of its tape.
        branches = len(lengths) if self.stops else int(math.prod(lengths) != num_steps)
        copies = branches * (self.read + self.state) + (self.tape if branches else 0)
        if rounded:
            in_hand = (2 * len(lengths) + 2) * self.state
            return copies + sum(lengths) * self.rounded + in_hand + self.working
        return copies + states * self.state + (lengths[-1] * self.theta if mixed else 0) + self.working

    def carried(self, chunk: int) -> int:
        """With so many tangents side by side."""
        return 2 * self.state + self.working + chunk * self.tangent


def measure(step: Step, walk: Walk, outer: Outer | None) -> Sizes:
    """Compile the derivatives of one step and of the outer loss, and ask the compiler what they take."""
    dynamic, rest = eqx.partition(walk, eqx.is_inexact_array)

    def moved(step: Step, phi: PyTree[Array], dynamic: Any, rest: Any) -> tuple[Any, Any]:
        after, _ = step.at(phi)(eqx.combine(dynamic, rest))
        return eqx.partition(after, eqx.is_inexact_array)

    def pulled(step: Step, dynamic: Any, rest: Any, adjoint: Any) -> Any:
        _, pull, _ = jax.vjp(lambda p, d: moved(step, p, d, rest), step.phi, dynamic, has_aux=True)
        return pull(adjoint)

    def pushed(step: Step, dynamic: Any, rest: Any, tangents: Any) -> Any:
        return jax.jvp(lambda p, d: moved(step, p, d, rest), (step.phi, dynamic), tangents, has_aux=True)[:2]

    working = _taken(pulled, step, dynamic, rest, dynamic)
    if outer is not None:
        traced = eqx.filter_closure_convert(lambda t, p: outer(t, p), walk.theta, step.phi)
        final = lambda fn, t, p: jax.value_and_grad(fn, argnums=(0, 1))(t, p)
        working = max(working, _taken(final, traced, walk.theta, step.phi))
    return Sizes(
        state=_bytes(walk),
        rounded=_bytes(jax.eval_shape(lambda w: rounded(w, jnp.bfloat16), walk)),
        theta=_bytes(walk.theta),
        working=working,
        tape=_tape(step, walk),
        tangent=_taken(pushed, step, dynamic, rest, (step.phi, dynamic)),
        read=_bytes(step),
        stops=walk.stopped is not None,
    )


def _bytes(tree: PyTree) -> int:
    is_shape = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    arrays = jax.tree.leaves(eqx.filter(tree, is_shape))
    # A random key holds numbers of its own.
    plain = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in arrays
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in plain)


def _taken(fn: Callable, *args: Any) -> int:
    """Bytes that a compiled call takes beside its arguments."""
    arrays, static = eqx.partition(args, eqx.is_array)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    compiled = jax.jit(lambda arrays: fn(*eqx.combine(arrays, static))).lower(shapes).compile()
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _tape(step: Step, walk: Walk) -> int:
    """Bytes of the residuals of a step that differ from step to step."""
    dynamic, rest = eqx.partition(walk, eqx.is_inexact_array)

    def residuals(dynamic: Any) -> list[Array]:
        run = lambda phi, d: eqx.filter(step.at(phi)(eqx.combine(d, rest))[0], eqx.is_inexact_array)
        return jax.tree.leaves(jax.vjp(run, step.phi, dynamic)[1])

    jaxpr = jax.make_jaxpr(residuals)(dynamic).jaxpr
    changing = {v for v in jaxpr.outvars if isinstance(v, Var)} - set(jaxpr.constvars)
    shapes: list[Any] = [v.aval for v in changing]
    return sum(shape.size * shape.dtype.itemsize for shape in shapes)
