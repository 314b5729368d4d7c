"""What a way to differentiate a path costs when it is tried."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from curvax.unroll._forward import by_tangents
from curvax.unroll._memory import Outer
from curvax.unroll._path import advance
from curvax.unroll._plan import Method
from curvax.unroll._reverse import Followed, by_adjoint
from curvax.unroll._rollout import Rollout

REPEATS = 3


def seconds_of_path(rollout: Rollout, phi: PyTree[Array]) -> float:
    """Of the path alone: a gradient and an update for each step."""

    def run(rollout: Rollout, phi: PyTree[Array]) -> PyTree[Array]:
        step, walk = rollout.step(phi)
        return advance(step, walk, rollout.steps.num_steps).theta

    return _tried(run, rollout, phi)[0]


def tried(rollout: Rollout, phi: PyTree[Array], outer: Outer, method: Method) -> tuple[float, int]:
    """Seconds and bytes of the hypergradient by this method."""
    theta = rollout.theta0
    outer = eqx.filter_closure_convert(lambda t, p: outer(t, p), theta, phi)

    def run(rollout: Rollout, phi: PyTree[Array], outer: Outer) -> tuple[Array, PyTree[Array]]:
        step, walk = rollout.step(phi)
        found: Followed
        if method.mode == "forward":
            found = by_tangents(rollout, step, walk, outer, truncate=None, chunk=method.chunk)
        else:
            step = step.in_mixed_mode() if method.mode == "mixed" else step
            found = by_adjoint(rollout, step, walk, outer, lengths=method.lengths, truncate=None, clip=None)
        return found.value, found.grad

    return _tried(run, rollout, phi, outer)


def _tried(fn: Callable, *args: Any) -> tuple[float, int]:
    """Seconds of a compiled call, the least of three, and the bytes it takes beside arguments and results."""
    arrays, static = eqx.partition(args, eqx.is_array)
    compiled = jax.jit(lambda arrays: fn(*eqx.combine(arrays, static))).lower(arrays).compile()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(arrays))
        found.append(time.perf_counter() - start)
    analysis: Any = compiled.memory_analysis()
    return min(found), int(analysis.temp_size_in_bytes)
