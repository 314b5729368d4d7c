"""The cotangents of a model's outputs that a curvature matrix is the second moment of."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from curvax._lapack import eigh
from curvax.operators._dense import ravel, structure_dtype, unravel
from curvax.operators._losses import AbstractLoss

Loss = Callable[[PyTree, PyTree], Scalar]
Kind = Literal["exact", "monte_carlo", "empirical"]

# A loss that is any function has the Hessian in its outputs written out, one for each example.
MOST_OUTPUTS = 1024
# Directions of one example, all entries counted: above it, one of them after the other takes longer than anybody waits.
MOST_DIRECTIONS = 2**22


def cotangents(
    loss: Loss, kind: Kind, num_samples: int = 1
) -> Callable[[PyTree, PyTree, PRNGKeyArray | None], PyTree[Float[Array, "k *output"]]]:
    """A function (output, target, key) of one example that returns its directions c₁, ..., c_k.

    Σ c cᵀ is the Hessian of the loss in the outputs (`"exact"`), has it as its mean (`"monte_carlo"`), or is g gᵀ with
    the gradient g of the loss (`"empirical"`). Leaves that are not floating-point keep their places.

    Args:
        loss: Knows its root and how to draw if it is an `AbstractLoss`; the Hessian of any other is written out.
        kind: Which.
        num_samples: k, for `"monte_carlo"`.
    """

    def directions(output: PyTree, target: PyTree, key: PRNGKeyArray | None) -> PyTree:
        floating, rest = eqx.partition(output, eqx.is_inexact_array)
        of_floats = lambda floating: loss(eqx.combine(floating, rest), target)
        check_scalar(of_floats, floating)
        if kind == "empirical":
            return _with_rest(jax.tree.map(lambda g: g[None], jax.grad(of_floats)(floating)), rest)
        size = sum(leaf.size for leaf in jax.tree.leaves(floating))
        if kind == "exact":
            _check_number(size)
            root = loss.hessian_root(output, target) if isinstance(loss, AbstractLoss) else None
            return root if root is not None else _with_rest(_root(of_floats, floating), rest)
        assert key is not None
        keys = jax.random.split(key, num_samples) if num_samples > 1 else key[None]
        scale = 1 / math.sqrt(num_samples)
        if isinstance(loss, AbstractLoss):
            drawn = jax.vmap(lambda key: loss.sample(output, target, key))(keys)
        else:
            # Curvature propagation: H^{1/2} z with signs z.
            root = _root(of_floats, floating)
            signs = jax.vmap(lambda key: jax.random.rademacher(key, (size,), jnp.int8))(keys)
            drawn = _with_rest(jax.tree.map(ft.partial(_mixed, signs), root), rest)
        return jax.tree.map(lambda c: c * jnp.asarray(scale, c.dtype), drawn)

    return directions


def check_scalar(loss: Callable[[PyTree], Any], output: PyTree[Array]) -> None:
    """Raise unless a loss of the outputs of one example is one number."""
    found = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(loss, output))]
    if found != [()]:
        raise ValueError(
            "`loss` must return a scalar for the output and the target of ONE example, such as "
            f"`0.5 * jnp.sum((output - target) ** 2)`; it returned {', '.join(map(str, found)) or 'no array'}."
        )


def _mixed(signs: Array, root: Array) -> Array:
    return jnp.tensordot(signs.astype(root.dtype), root, 1, precision=jax.lax.Precision.HIGHEST)


def _with_rest(floating: PyTree, rest: PyTree) -> PyTree:
    return eqx.combine(floating, rest)


def _check_number(size: int) -> None:
    if size**2 > MOST_DIRECTIONS:
        raise ValueError(
            f'`kind="exact"` needs a backward pass for each of the {size} outputs of an example, each with {size} '
            f'entries: over the limit of {MOST_DIRECTIONS} entries in all. Use `kind="monte_carlo"` with a `key`.'
        )


def _root(loss: Callable[[PyTree], Scalar], output: PyTree[Array]) -> PyTree[Float[Array, "k *output"]]:
    """Directions of any convex loss, from the eigenvectors of its Hessian; NaN and an error if it is not convex."""
    like = jax.eval_shape(lambda: output)
    dtype = structure_dtype(like)
    flat = ravel(output, dtype)
    if flat.size > MOST_OUTPUTS:
        raise ValueError(
            f"The Hessian of `loss` in the {flat.size} outputs of an example would be written out, which is done for "
            f"at most {MOST_OUTPUTS} outputs. Use a loss that knows a root of it: `cx.operators.SquaredError`, "
            "`SoftmaxCrossEntropy`, `BinaryCrossEntropy`, `PoissonLoss` or your own `AbstractLoss`."
        )
    second = jax.hessian(lambda flat: loss(unravel(flat, like)))
    hessian = second(flat)
    values, vectors = eigh(hessian)
    # Where a loss is flat its Hessian is a difference of terms that cancel, p − p² of a sure prediction: its rounding
    # is of the size that the curvature has elsewhere.
    elsewhere = jnp.max(jnp.abs(second(jnp.zeros_like(flat))), initial=0)
    scale = jnp.maximum(jnp.max(jnp.abs(values), initial=0), jnp.where(jnp.isfinite(elsewhere), elsewhere, 0))
    slack = 100 * flat.size * jnp.finfo(dtype).eps * scale
    values = eqx.error_if(
        values,
        jnp.any(values < -slack),
        "`loss` is not convex in the outputs of the model: its Hessian there has a negative eigenvalue, and the "
        "Gauss–Newton matrix is not positive semidefinite. Use a convex loss, or the gradients with "
        '`kind="empirical"`.',
    )
    columns = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return jax.vmap(lambda column: unravel(column, like), 1)(columns)


def check_kind(kind: Any, kinds: tuple[str, ...], key: PRNGKeyArray | None, num_samples: int) -> None:
    """Raise unless a kind is known and has the key it needs, and no other."""
    if kind not in kinds:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, kinds))}, found {kind!r}.")
    if kind == "monte_carlo" and key is None:
        raise ValueError('`kind="monte_carlo"` draws targets and needs a `key`, such as `jax.random.key(0)`.')
    if kind != "monte_carlo" and key is not None:
        raise ValueError(f'`key` is for `kind="monte_carlo"` alone; leave it out for {kind!r}.')
    if num_samples < 1 or (num_samples > 1 and kind != "monte_carlo"):
        raise ValueError(
            f'`num_samples` must be at least 1, and is for `kind="monte_carlo"` alone; found {num_samples}.'
        )
