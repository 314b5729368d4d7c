"""Optax transformations from a curvature: what all constructors of this room share."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax._pytree import tree_dtype
from curvax.operators._cotangents import Loss
from curvax.optim._blocks import BlockInfo, Context, Matrices, context, example_layers
from curvax.optim._checks import (
    check_batch,
    check_functions,
    check_inputs,
    check_key,
    check_masks,
    check_state,
)
from curvax.optim._kronecker import AbstractCurvature
from curvax.optim._options import Damping, Momentum, as_momentum
from curvax.optim._start import full
from curvax.optim._state import OptimiserState, StepInfo
from curvax.optim._tail import Tail, as_rate

ModelFn = Callable[[PyTree, PyTree], PyTree]


def transformation(
    curvature: AbstractCurvature,
    model_fn: ModelFn,
    loss: Loss,
    learning_rate: Any,
    *,
    example: PyTree,
    momentum: float | Momentum | None,
    damping: Damping,
    draws: bool,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with a curvature.

    Args:
        curvature: Which.
        model_fn: Of parameters and one example.
        loss: Of one example.
        learning_rate: A number, a schedule or None.
        example: Of the inputs.
        momentum: A number, a `Momentum` or None.
        damping: Options.
        draws: Whether a key is needed.
    """
    check_functions(model_fn, loss)
    tail = Tail(as_rate(learning_rate), as_momentum(momentum), damping)
    share = damping.in_preconditioner(given_rate=learning_rate is not None)

    def init(params: PyTree) -> OptimiserState:
        infos = infos_of(model_fn, params, example)
        dtype = tree_dtype(eqx.filter(params, eqx.is_inexact_array))
        velocity = zeros_of(infos) if tail.keeps_velocity else {}
        start = full((), damping.initial, dtype)
        return OptimiserState(
            full((), 0, jnp.int32), curvature.init(infos), velocity, start, StepInfo.empty(dtype)
        )

    def update(
        updates: PyTree,
        state: OptimiserState,
        params: PyTree | None = None,
        *,
        inputs: PyTree = None,
        targets: PyTree = None,
        key: PRNGKeyArray | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OptimiserState]:
        del extra
        now = checked(model_fn, loss, example, params, state, inputs, targets, key, draws)
        gradient = now.pack(gradient_leaves(updates, now))
        total = (share * state.damping + damping.penalty).astype(state.damping.dtype)
        known = curvature.observe(state.curvature, now, total)
        solve = lambda matrices: curvature.apply(known, now.infos, matrices, total)
        step, velocity, adapted, info = tail(state, now, gradient, solve)
        known = curvature.stepped(known, now, step, total)
        following = OptimiserState(state.count + 1, known, velocity, adapted, info)
        return like_gradients(updates, now.unpack(step)), following

    return optax.GradientTransformationExtraArgs(init, update)


def infos_of(model_fn: ModelFn, params: PyTree, example: PyTree) -> tuple[BlockInfo, ...]:
    """What is known of the blocks before the first batch."""
    check_masks(params)
    try:
        layers = example_layers(model_fn, params, example)
    except Exception as error:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(example)]
        error.add_note(
            f"While looking for layers: `model_fn(params, example)`, `example` of shapes {shapes}."
        )
        error.add_note("`example` must be ONE example of the inputs, without the axis of the batch.")
        raise
    return tuple(BlockInfo.of(group) for group in layers.groups)


def zeros_of(infos: tuple[BlockInfo, ...]) -> Matrices:
    """Zeros in all blocks."""
    return {info.name: full(info.shape, 0, info.dtype) for info in infos}


def checked(
    model_fn: ModelFn,
    loss: Loss,
    example: PyTree,
    params: PyTree,
    state: OptimiserState,
    inputs: PyTree,
    targets: PyTree,
    key: PRNGKeyArray | None,
    draws: bool,
) -> Context:
    """What a step needs, or an error that names what is missing."""
    check_batch(params, inputs, targets)
    check_masks(params)
    check_inputs(inputs, example)
    check_key(key, draws)
    now = context(model_fn, loss, params, inputs, targets, key if draws else None, state.count)
    check_state(state.curvature, now.infos)
    return now


def gradient_leaves(updates: PyTree, now: Context) -> list[Array]:
    """The gradients of the floating-point parameters, in order."""
    leaves = jax.tree.leaves(eqx.filter(updates, eqx.is_inexact_array))
    found, wanted = [leaf.shape for leaf in leaves], [leaf.shape for leaf in now.leaves]
    if found != wanted:
        raise ValueError(
            "`updates` must be the gradients with respect to all floating-point arrays of `params`, of the shapes "
            f"{wanted}; found {found}."
        )
    return leaves


def like_gradients(updates: PyTree, leaves: list[Array]) -> PyTree:
    """Steps in the places and dtypes of the gradients."""
    all_leaves, treedef = jax.tree.flatten(updates)
    remaining = iter(leaves)
    replaced = [
        next(remaining).astype(leaf.dtype) if eqx.is_inexact_array(leaf) else leaf for leaf in all_leaves
    ]
    return jax.tree.unflatten(treedef, replaced)
