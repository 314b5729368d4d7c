"""What a step is refused for, with the argument's name and what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from curvax.operators._base import as_arrays
from curvax.optim._blocks import BlockInfo


def check_functions(model_fn: Any, loss: Any) -> None:
    """Raise unless both can be called."""
    for name, value, form in (("model_fn", model_fn, "(params, x)"), ("loss", loss, "(output, target)")):
        if not callable(value):
            raise TypeError(f"`{name}` must be a function {name}{form} of ONE example, found {value!r}.")
    if isinstance(loss, type):
        raise TypeError(
            f"`loss` is the class `{loss.__name__}`; pass an instance of it, `{loss.__name__}()`."
        )


def check_masks(params: PyTree) -> None:
    """Raise if optax has taken parameters away."""
    is_mask = lambda leaf: isinstance(leaf, optax.MaskedNode)
    if any(map(is_mask, jax.tree.leaves(params, is_leaf=is_mask))):
        raise ValueError(
            "`params` has parameters that are masked, by `optax.masked`, `optax.partition` or the like, and `model_fn` "
            "needs all of them. Keep those that this optimiser does not train out of `params`, and let `model_fn` put "
            "them in: `lambda trained, x: eqx.combine(trained, frozen)(x)`."
        )


def check_batch(params: PyTree, inputs: PyTree, targets: PyTree) -> None:
    """Raise if something is not there."""
    needed = {"params": params, "inputs": inputs, "targets": targets}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"`update` of this optimiser needs {', '.join(f'`{name}`' for name in missing)}: the batch on which the "
            "gradients were taken, and the parameters. Call `update(grads, state, params, inputs=..., targets=...)`."
        )


def check_inputs(inputs: PyTree, example: PyTree) -> None:
    """Raise unless inputs are a batch of what the example is one of; lengths may vary."""
    inputs, example = as_arrays((inputs, example))
    found = [getattr(leaf, "ndim", None) for leaf in jax.tree.leaves(inputs)]
    wanted = [getattr(leaf, "ndim", 0) + 1 for leaf in jax.tree.leaves(example)]
    if jax.tree.structure(inputs) != jax.tree.structure(example) or found != wanted:
        raise ValueError(
            "`inputs` must be arrays like `example`, with the axis of the batch in front: found "
            f"{_described(inputs)}, where `example` is {_described(example)}."
        )


def check_key(key: Any, draws: bool) -> None:
    """Raise unless there is one key where it is needed."""
    if not draws:
        return
    if key is None:
        raise ValueError(
            '`update` needs a `key`, a new one at each step, for factors of kind "monte_carlo", such as '
            '`key=jax.random.fold_in(key, step)`; or use `factors=cx.optim.Factors("empirical")`.'
        )
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == jnp.uint32 and jnp.shape(key) in ((2,), (4,))
    if not raw and not (typed and jnp.shape(key) == ()):
        found = f"{key.dtype} of shape {jnp.shape(key)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(f"`key` must be one key, such as `jax.random.key(0)`; found {found}.")


def check_state(curvature: Any, infos: tuple[BlockInfo, ...]) -> None:
    """Raise unless a state was made for these blocks."""
    found, known = {info.name for info in infos}, set(curvature.rejected)
    if found != known:
        raise ValueError(
            "`state` belongs to another model: the layers of `model_fn` with these `params` and `inputs` are "
            f"{sorted(found)}, and `init` found {sorted(known)}. Call `init` again."
        )
    for info in infos:
        if not info.measured:
            continue
        sides = [side.shape[:2] for side in curvature.factors[info.name]]
        if sides != [(info.shape[0], info.shape[1]), (info.shape[0], info.shape[2])]:
            before = (sides[0][0], sides[0][1], sides[1][1])
            raise ValueError(
                f"`state` belongs to another model: the block {info.name} of `params` is {info.shape} (stack, rows, "
                f"columns), and at `init` it was {before}. Call `init` again."
            )


def _described(tree: PyTree) -> str:
    leaves = jax.tree.leaves(tree)
    shown = [str(leaf.shape) if hasattr(leaf, "shape") else repr(leaf)[:30] for leaf in leaves[:6]]
    more = f" and {len(leaves) - 6} more" if len(leaves) > 6 else ""
    return f"{type(tree).__name__} of {', '.join(shown)}{more}" if shown else "empty"
