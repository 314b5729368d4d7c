"""The hypergradient by forward mode: the sensitivities of the path are carried along with it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from curvax._pytree import tree_add, tree_dot, tree_scale, tree_size
from curvax.unroll._outcome import beyond
from curvax.unroll._reverse import Followed, tail
from curvax.unroll._rollout import Rollout
from curvax.unroll._step import Step, Walk, initial_state

# Tangents that are carried side by side. More of them save no time, and each takes the memory of a state.
CHUNK = 16


class Drawn(NamedTuple):
    """Random directions in place of all unit vectors.

    Attributes:
        number: How many.
        key: From which they are drawn.
        blind: For each leaf of φ, whether it has no influence on the path: directions are zero there.
    """

    number: int
    key: Array
    blind: Sequence[bool]


class _Run(NamedTuple):
    """One run of the path: what it shows of itself, and what it adds to the squared norms of dθ/dφ."""

    value: Float[Array, ""]
    walk: Walk
    gradient_norms: Float[Array, " steps"]
    first: Int[Array, ""]
    direct: PyTree[Array]


def by_tangents(
    rollout: Rollout,
    step: Step,
    walk: Walk,
    outer: Callable[[PyTree[Array], PyTree[Array]], Array],
    *,
    truncate: int | None,
    chunk: int = CHUNK,
    drawn: Drawn | None = None,
) -> Followed:
    """The outer loss at the end of the path and its derivative, one tangent for each number in φ.

    Nothing of the path is stored. `chunk` tangents share a run of the path. With `drawn` the derivative is ∂f/∂φ plus
    the mean of (v·h) v over random signs v, h the part that goes through the path: its expectation is exact, since
    E v vᵀ = I. E‖(v·h) v − h‖² = (m − 1)‖h‖² and E(v·h)² = ‖h‖², so that one direction tells its own variance.
    Other arguments as for `by_adjoint`.
    """
    total, phi = rollout.steps.num_steps, step.phi
    size = tree_size(phi) if drawn is None else drawn.number
    chunk = min(chunk, size)
    num_chunks = -(-size // chunk)
    start = tail(step, walk, total, truncate)
    late = start.num_steps // 2 if start.num_steps < total else 0

    def run(indices: Int[Array, " chunk"]) -> tuple[_Run, tuple[Array, PyTree[Array]], Array]:
        directions = basis(phi, indices) if drawn is None else _signs(phi, indices, drawn)
        frozen, _ = eqx.partition(start.walk, eqx.is_inexact_array)
        tangents = jax.tree.map(lambda leaf: jnp.zeros((chunk, *leaf.shape), leaf.dtype), frozen)
        if truncate is None or truncate >= total:
            theta, state = _started(rollout, walk.state, phi, directions)
            tangents = tangents._replace(theta=theta, state=state)
        parts = [(directions, tangents)]
        early = start.num_steps - late
        end, parts, norms, squares = _carried(step, start.walk, parts, early)
        if late:
            # What the older half contributes is carried on apart from what the later half adds.
            parts = [(tree_scale(0, directions), parts[0][1]), (directions, tree_scale(0, parts[0][1]))]
            end, parts, more_norms, more_squares = _carried(step, end, parts, late)
            norms = jnp.concatenate([norms, more_norms])
            squares = jnp.concatenate([squares[:-1], more_squares])
        value, (pull, direct) = jax.value_and_grad(outer, argnums=(0, 1))(end.theta, phi)
        slopes = jnp.stack([jax.vmap(lambda t: tree_dot(pull, t))(t.theta) for _, t in parts])
        found = _Run(value, end, start.all_norms(norms), start.walk.taken, direct)
        return found, (squares, combined(jnp.sum(slopes, axis=0), directions)), slopes

    indices = jnp.arange(num_chunks * chunk, dtype=jnp.int32).reshape(num_chunks, chunk)
    if num_chunks == 1:
        last, (squares, through), slopes = run(indices[0])
    else:

        def add(carry: tuple[_Run, Any], indices: Array) -> tuple[tuple[_Run, Any], Array]:
            found, more, slopes = run(indices)
            return (found, tree_add(carry[1], more)), slopes

        shapes = jax.eval_shape(lambda i: run(i)[:2], indices[0])
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (last, (squares, through)), slopes = jax.lax.scan(add, blank, indices)
    spread = None
    if drawn is not None:
        squares, through = squares / size, tree_scale(1 / size, through)
        seen = sum(leaf.size for leaf, b in zip(jax.tree.leaves(phi), drawn.blind, strict=True) if not b)
        along = jnp.sum(slopes.reshape(-1, 2 if late else 1, chunk), axis=1)
        spread = jnp.sqrt(max(seen - 1, 0) * jnp.sum(along**2)) / size
    norms = jnp.full(total + 1, jnp.nan, squares.dtype)
    norms = jax.lax.dynamic_update_slice(norms, jnp.sqrt(squares), (last.first,))
    norms = jnp.where(jnp.arange(total + 1, dtype=jnp.int32) <= last.walk.taken, norms, jnp.nan)
    grad = tree_add(last.direct, through)
    none = jnp.zeros((), squares.dtype)
    bias = None
    if late:
        # (…, halves, …): by the older half and by the later one.
        older, later = jnp.sqrt(
            jnp.sum(slopes.reshape(-1, 2, chunk) ** 2, axis=(0, 2)) / (1 if drawn is None else size)
        )
        early = start.num_steps - late
        places = {"near": late / 2, "far": late + early / 2, "begin": start.num_steps}
        bias = beyond(older / early, later / late, **places, end=last.walk.taken)
    elif start.num_steps < total:
        bias = jnp.full((), jnp.nan, squares.dtype)
    return Followed(last.value, grad, last.walk, last.gradient_norms, norms, none, None, spread, bias)


# Directions in φ and the tangents of a walk along them.
_Part = tuple[PyTree[Array], Any]


def _carried(
    step: Step, walk: Walk, parts: Sequence[_Part], num_steps: int
) -> tuple[Walk, list[_Part], Array, Array]:
    """The end of the path, its tangents, the gradient norms at its points and ‖dθ/dφ‖² at each and at the end.

    With several parts dθ/dφ is their sum.
    """
    number = len(parts)
    directions, tangents = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def square_of(tangents: Any) -> Array:
        together = jax.tree.map(lambda t: sum(jnp.split(t, number)), tangents.theta)
        return tree_dot(together, together)

    def push(walk: Walk, tangents: Any) -> tuple[Walk, Any, Array]:
        dynamic, rest = eqx.partition(walk, eqx.is_inexact_array)

        def moved(phi: PyTree[Array], dynamic: Any) -> tuple[Any, Any]:
            after, norm = step.at(phi)(eqx.combine(dynamic, rest))
            after, after_rest = eqx.partition(after, eqx.is_inexact_array)
            return after, (after_rest, norm)

        after, moved_tangents, (after_rest, norm) = jax.vmap(
            lambda p, t: jax.jvp(moved, (step.phi, dynamic), (p, t), has_aux=True), out_axes=(None, 0, None)
        )(directions, tangents)
        return eqx.combine(after, after_rest), moved_tangents, norm

    def body(carry: tuple[Walk, Any], _: None) -> tuple[tuple[Walk, Any], tuple[Array, Array]]:
        walk, tangents = carry
        square = square_of(tangents)
        if walk.stopped is None:
            after, moved, norm = push(walk, tangents)
        else:
            nan = jnp.full((), jnp.nan, square.dtype)
            after, moved, norm = jax.lax.cond(walk.stopped, lambda w, t: (w, t, nan), push, walk, tangents)
        return (after, moved), (norm, square)

    (walk, tangents), (norms, squares) = jax.lax.scan(body, (walk, tangents), length=num_steps)
    split = [
        jax.tree.map(lambda leaf, i=i: jnp.split(leaf, number)[i], (directions, tangents))
        for i in range(number)
    ]
    return walk, split, norms, jnp.append(squares, square_of(tangents))


def _started(
    rollout: Rollout, like: PyTree, phi: PyTree[Array], directions: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The tangents of the start and of the optimiser's state there: its settings may be part of it."""

    def begun(phi: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        theta = rollout.begin(phi)
        state = initial_state(rollout.transformation, theta, phi, like=like)
        return theta, eqx.filter(state, eqx.is_inexact_array)

    return jax.vmap(lambda p: jax.jvp(begun, (phi,), (p,))[1])(directions)


def basis(phi: PyTree[Array], indices: Int[Array, " chunk"]) -> PyTree[Array]:
    """The unit vectors of these numbers, in the shape of φ; zeros beyond the last one."""
    leaves, structure = jax.tree.flatten(phi)
    vectors, offset = [], 0
    for leaf in leaves:
        unit = indices[:, None] == offset + jnp.arange(leaf.size, dtype=jnp.int32)
        vectors.append(unit.astype(leaf.dtype).reshape(len(indices), *leaf.shape))
        offset += leaf.size
    return jax.tree.unflatten(structure, vectors)


def _signs(phi: PyTree[Array], indices: Int[Array, " chunk"], drawn: Drawn) -> PyTree[Array]:
    """Random signs for each of these directions, in the shape of φ; zeros beyond the last one."""
    leaves, structure = jax.tree.flatten(phi)

    def one(index: Int[Array, ""]) -> list[Array]:
        keys = jax.random.split(jax.random.fold_in(drawn.key, index), len(leaves))
        wanted = index < drawn.number
        return [
            jax.random.rademacher(key, leaf.shape, leaf.dtype) * (wanted & (not blind)).astype(leaf.dtype)
            for key, leaf, blind in zip(keys, leaves, drawn.blind, strict=True)
        ]

    return jax.tree.unflatten(structure, jax.vmap(one)(indices))


def combined(slopes: Float[Array, " chunk"], directions: PyTree[Array]) -> PyTree[Array]:
    """Σ_k slopes_k · directions_k, exactly where each direction is a unit vector."""
    return jax.tree.map(
        lambda d: jnp.sum(slopes.astype(d.dtype).reshape(-1, *[1] * (d.ndim - 1)) * d, axis=0), directions
    )
