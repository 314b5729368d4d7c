"""The empirical Fisher matrix estimated from some of the examples, with the variance of the estimate."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import tree_dot
from curvax.operators._base import as_arrays, capture, split
from curvax.operators._dense import structure_dtype
from curvax.operators._fisher import Fisher, fisher
from curvax.operators._gauss_newton import check_examples, num_examples

Sampling = Literal["uniform", "importance", "stratified"]

# Gradients of so many examples at once.
_CHUNK = 32
# Part of the draws that is uniform, so that no weight exceeds its inverse.
_UNIFORM = 0.1


class SampledFisher(eqx.Module):
    """F̂ = 1/|S| Σ_{i∈S} gᵢgᵢᵀ / (N pᵢ), made by `sampled_fisher`.

    Attributes:
        sample: F̂ as an operator.
        indices: S, the examples that were drawn; some more than once.
        weights: 1 / (N pᵢ) for each of them.
        anchors: With an anchor w₀, F̂(w₀) of the same draws and F(w₀) of all examples; else None.
    """

    sample: Fisher
    indices: Int[Array, " s"]
    weights: Float[Array, " s"]
    anchors: tuple[Fisher, Fisher] | None
    loss: Callable[[PyTree, PyTree], Scalar]
    data: tuple[PyTree[Array], PyTree[Array]]
    stratum: int = eqx.field(static=True)

    @property
    def operator(self) -> lx.AbstractLinearOperator:
        """F̂; with an anchor F̂(w) − F̂(w₀) + F(w₀), which is tagged symmetric but need not be definite."""
        if self.anchors is None:
            return self.sample
        there, whole = self.anchors
        return lx.TaggedLinearOperator(self.sample - there + whole, lx.symmetric_tag)

    def quadratic(self, vector: PyTree[Array]) -> tuple[Scalar, Scalar]:
        """vᵀF̂v, and the estimate of its variance: from the spread of the draws, within their strata.

        Args:
            vector: v, like the floating-point parameters.
        """
        values = _squares(self.sample, vector)
        known = jnp.zeros((), values.dtype)
        if self.anchors is not None:
            there, whole = self.anchors
            values = values - _squares(there, vector)
            known = jnp.asarray(tree_dot(vector, whole.mv(vector)), values.dtype)
        strata = values.reshape(-1, self.stratum)
        share = self.stratum / values.size
        return jnp.mean(values) + known, jnp.sum(jnp.var(strata, axis=1, ddof=1)) * share**2 / self.stratum

    def anchored(self, anchor: PyTree) -> "SampledFisher":
        """With the control variate F̂(w₀) − F(w₀): of low variance while the parameters are near the anchor w₀.

        Cost: a forward pass over all examples at w₀; three products in the place of one, one of them with all examples.

        Args:
            anchor: w₀, of the structure of the parameters.

        Source: R. Johnson and T. Zhang, "Accelerating stochastic gradient descent using predictive variance reduction",
            2013, for the control variate; here it is for a matrix.
        """
        inputs, targets = self.data
        of = lambda inputs, targets: fisher(
            self.sample.model_fn, self.loss, anchor, inputs, targets, kind="empirical"
        )
        some = jax.tree.map(lambda leaf: leaf[self.indices], self.data)
        there, whole = _weighted(of(*some), self.weights), of(inputs, targets)
        return eqx.tree_at(lambda s: s.anchors, self, (there, whole), is_leaf=lambda x: x is None)


def sampled_fisher(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    size: int,
    *,
    sampling: Sampling = "importance",
    key: PRNGKeyArray,
) -> SampledFisher:
    """An unbiased estimate of the empirical Fisher matrix F = (1/N) Σ gᵢgᵢᵀ from `size` examples, and its variance.

    F̂ = 1/|S| Σ_{i∈S} gᵢgᵢᵀ / (N pᵢ); products cost |S|/N of those with F.

    - `"uniform"`: pᵢ = 1/N.
    - `"importance"`: pᵢ ∝ ‖gᵢ‖², for nine tenths of the draws, for which E ‖F̂ − F‖² is least; the others are uniform.
    - `"stratified"`: in the order of ‖gᵢ‖ the examples are cut into |S|/2 strata that have about equal shares of these
      probabilities; of each two are drawn, uniformly.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example.
        loss: `loss(output, target)` → scalar, for one example; any function.
        params: Any pytree; only its floating-point arrays vary.
        inputs: All N examples, stacked along the leading axis of every leaf.
        targets: Likewise.
        size: |S|, at least 2; even for strata, and at most N.
        sampling: Which.
        key: For the draws.

    Returns:
        A `SampledFisher`: `.operator`, `.quadratic(v)` → vᵀF̂v and its variance, `.anchored(w₀)` with a control variate.

    Raises:
        ValueError: An unknown sampling, a size out of range, no floating-point parameter, a complex one, or examples
            that do not fit.

    Cost: made in a forward pass; the norms of the gradients, for the last two, take a gradient of all examples.

    Source: P. Zhao and T. Zhang, "Stochastic optimization with importance sampling", 2015, arXiv 1401.2753.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        x = jax.random.normal(jax.random.key(0), (100, 3)) * jnp.logspace(-1, 1, 100)[:, None]
        loss, y = cx.operators.SquaredError(), jnp.ones(100)
        some = cx.operators.sampled_fisher(lambda w, x: x @ w, loss, jnp.ones(3), x, y, 20, key=jax.random.key(1))
        value, variance = some.quadratic(jnp.ones(3))
        ```
    """
    if sampling not in get_args(Sampling):
        raise ValueError(
            f"`sampling` must be one of {', '.join(map(repr, get_args(Sampling)))}, found {sampling!r}."
        )
    dynamic, rest = split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    count = num_examples(inputs)
    if size < 2 or (sampling == "stratified" and (size % 2 or size > count)):
        raise ValueError(
            f'`size` must be at least 2, and for `sampling="stratified"` even and at most the {count} examples; found '
            f"{size}."
        )
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    model_fn = capture(model_fn, eqx.combine(dynamic, rest), example)

    def squared_norm(one: PyTree) -> Scalar:
        x, y = one
        gradient = jax.grad(lambda p: loss(model_fn(eqx.combine(p, rest), x), y))(dynamic)
        return jnp.asarray(tree_dot(gradient, gradient))

    if sampling == "uniform":
        indices = jax.random.randint(key, (size,), 0, count)
        weights = jnp.ones(size, structure_dtype(jax.eval_shape(lambda: dynamic)))
    else:
        norms = map_in_chunks(squared_norm, (inputs, targets), _CHUNK)
        indices, weights = (_by_importance if sampling == "importance" else _by_strata)(norms, size, key)
    some = jax.tree.map(lambda leaf: leaf[indices], (inputs, targets))
    whole = fisher(model_fn, loss, params, *some, kind="empirical")
    stratum = 2 if sampling == "stratified" else size
    return SampledFisher(_weighted(whole, weights), indices, weights, None, loss, (inputs, targets), stratum)


def _probabilities(norms: Float[Array, " n"]) -> Float[Array, " n"]:
    total, count = jnp.sum(norms), len(norms)
    share = jnp.where(total > 0, norms / jnp.where(total > 0, total, 1), 1 / count)
    return (1 - _UNIFORM) * share + _UNIFORM / count


def _by_importance(norms: Float[Array, " n"], size: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    count, probabilities = len(norms), _probabilities(norms)
    indices = jax.random.choice(key, count, (size,), p=probabilities)
    return indices, 1 / (count * probabilities[indices])


def _by_strata(norms: Float[Array, " n"], size: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    count, strata = len(norms), size // 2
    order = jnp.argsort(norms)
    reached = jnp.cumsum(_probabilities(norms)[order])
    number = np.arange(1, strata, dtype=np.int32)
    inner = jnp.searchsorted(reached, jnp.asarray(number / strata, norms.dtype))
    # At least one example in each, however large the share of a few is.
    inner = jnp.minimum(jax.lax.cummax(inner - number) + number, count - strata + number)
    edges = jnp.concatenate([jnp.zeros(1, inner.dtype), inner, jnp.full(1, count, inner.dtype)])
    members = jnp.diff(edges)[:, None]
    places = jax.random.randint(key, (strata, 2), edges[:-1, None], edges[1:, None])
    weights = jnp.broadcast_to(members.astype(norms.dtype) * (strata / count), (strata, 2))
    return order[places.reshape(-1)], weights.reshape(-1)


def _weighted(operator: Fisher, weights: Float[Array, " s"]) -> Fisher:
    """With each example counted by its weight."""
    root = jnp.sqrt(weights)
    spread = lambda c: c * root.reshape(-1, *(1,) * (c.ndim - 1)).astype(c.dtype)
    return eqx.tree_at(lambda f: f.cotangents, operator, jax.tree.map(spread, operator.cotangents))


def _squares(operator: Fisher, vector: PyTree[Array]) -> Float[Array, " s"]:
    """(gᵢ·v)², the weights included."""
    _, tangent = jax.jvp(operator._model, (operator.params,), (vector,))
    one: Any = lambda cotangents, tangent: tree_dot(jax.tree.map(lambda c: c[0], cotangents), tangent)
    return jnp.asarray(jax.vmap(one)(operator.cotangents, tangent)) ** 2
