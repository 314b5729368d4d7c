"""K-FAC and EKFAC: a Kronecker product for every layer of any model."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax.capture import Group, Layers, Moments, find_layers, statistics
from curvax.operators._base import as_arrays, split
from curvax.operators._cotangents import Kind, Loss, check_kind
from curvax.operators._gauss_newton import check_examples
from curvax.operators._kfac_statistics import (
    FactorMoments,
    Pass,
    check_sharing,
    corrected_values,
    passes,
    sum_of_inputs,
)
from curvax.operators._kronecker import EigenKronecker, Kronecker
from curvax.operators._layerwise import Layerwise
from curvax.operators._stacked import Stacked

Factors = dict[str, tuple[Array, Array]]


def kfac(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    kind: Kind = "exact",
    sharing: Literal["expand", "reduce"] = "expand",
    key: PRNGKeyArray | None = None,
) -> Layerwise:
    """K-FAC: for every layer of a model G ⊗ A ≈ its block of the Gauss–Newton matrix, the MEAN over the N examples.

    A = Σ x xᵀ / count over what the layer reads, G = Σ g gᵀ / N over the cotangents of what it returns, so that for a
    weight of shape (out, in) the block is jnp.kron(G, A). Layers are found in the model's program
    (`cx.capture.report` prints them): products, convolutions and lookups of any kind, through `jit`, `jax.checkpoint`,
    `scan`, `cond` and `vmap`, with the bias folded in; layers of a `scan` are a stack. Biases, scales and parameters
    used in other ways have the exact block (biases up to 1024 entries), or its diagonal.

    Exact for deep linear networks with `SquaredError` and one use of each weight for an example. Where a weight is used
    more often (tokens, pixels, steps of a `scan`, tied weights), uses are taken as independent (`"expand"`) or as one
    use with the mean input and the summed cotangent (`"reduce"`, exact for a linear layer followed by a mean). If a
    weight is used both as it is and transposed, both sums are brought to factors of equal trace and added, and the
    trace is kept.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, convex in the outputs. `SquaredError`,
            `SoftmaxCrossEntropy`, ... know a root of their Hessian; that of any other function is written out, for up
            to 1024 outputs.
        params: Any pytree; only its floating-point arrays vary.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise; integers are welcome.
        kind: Whose second moment G is: `"exact"`, a backward pass for every output; `"monte_carlo"`, one backward pass
            with the gradients at targets drawn from the model (for a loss that is any function, a random sign for every
            direction of its Hessian); `"empirical"`, one with the gradients at the targets of the data.
        sharing: `"expand"` or `"reduce"`.
        key: For `"monte_carlo"`.

    Returns:
        A symmetric positive semidefinite operator over the floating-point parameters, with `inverse()`, `damped(λ)`
            (exact), `damped_factors(λ)` (π), `power(p)`, `trace()`, `logdet()`. `kfac(...).damped(1e-3).inverse()` is a
            preconditioner for `cx.Implicit` and `cx.linear.CG`.

    Raises:
        ValueError: An unknown kind or sharing, a missing or superfluous key, no floating-point parameter, a complex
            one, examples that do not fit, too many outputs for the exact kind.
        RuntimeError: The Hessian of a loss that is any function has a negative eigenvalue.

    Cost: a forward and a backward pass to all layers and in² + out² multiplications for each layer, example and
    position; the exact kind one more backward pass and out² for every output.

    Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
    arXiv 1503.05671; R. Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
    architectures", 2023, arXiv 2311.00636.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(3)}
        model_fn = lambda params, x: params["w"] @ x + params["b"]
        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 3
        curvature = cx.operators.kfac(model_fn, cx.operators.SoftmaxCrossEntropy(), params, x, y)
        step = curvature.damped(1e-2).inverse().mv(params)
        ```
    """
    arrays = _checked(params, inputs, targets, kind, sharing, key)
    return _kfac(model_fn, loss, *arrays, kind, sharing, key)


def ekfac(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    kind: Kind = "exact",
    sharing: Literal["expand", "reduce"] = "expand",
    key: PRNGKeyArray | None = None,
) -> Layerwise:
    """EKFAC: K-FAC's eigenvectors, with the second moments of the gradients along them in the place of its eigenvalues.

    For each layer (U ⊗ V) diag(S) (U ⊗ V)ᵀ, U and V the eigenvectors of G and A, and S = Σ (UᵀḡV)² / N over the
    gradients ḡ of examples, shared positions summed. With these vectors no S is nearer to the block, so EKFAC is never
    farther from it than K-FAC (in the Frobenius norm, for the same cotangents). Uses of a weight by several operations,
    or by the steps of a `scan`, count as gradients of their own.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, as for `kfac`.
        params: Any pytree; only its floating-point arrays vary.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise.
        kind: `"exact"`, `"monte_carlo"` or `"empirical"`, as for `kfac`; S is of the same draws.
        sharing: `"expand"` or `"reduce"`: of the factors.
        key: For `"monte_carlo"`.

    Returns:
        A symmetric positive semidefinite operator over the floating-point parameters, as `kfac` returns it, whose
            blocks are in their eigenbases.

    Raises:
        ValueError: As `kfac`.
        RuntimeError: The Hessian of a loss that is any function has a negative eigenvalue.

    Cost: that of `kfac`, an eigendecomposition of each factor, another backward pass, and in² + out² multiplications
    for each example and position (out · in for each example more where it has several positions).

    Source: T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018,
    arXiv 1806.03884.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        curvature = cx.operators.ekfac(model_fn, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        curvature.damped(1e-2).inverse().mv(jnp.ones((3, 2)))
        ```
    """
    arrays = _checked(params, inputs, targets, kind, sharing, key)
    return _ekfac(model_fn, loss, *arrays, kind, sharing, key)


def _checked(
    params: PyTree, inputs: PyTree, targets: PyTree, kind: Any, sharing: Any, key: PRNGKeyArray | None
) -> tuple[PyTree, PyTree, PyTree]:
    check_kind(kind, ("exact", "monte_carlo", "empirical"), key, 1)
    check_sharing(sharing)
    split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    return as_arrays(params), inputs, targets


@eqx.filter_jit
def _kfac(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    kind: Kind,
    sharing: Literal["expand", "reduce"],
    key: PRNGKeyArray | None,
) -> Layerwise:
    layers = _layers(model_fn, params, inputs)
    found = _factors(layers, passes(layers, loss, kind, inputs, targets, key), params, inputs, sharing)
    return _of_factors(layers, found)


@eqx.filter_jit
def _ekfac(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    kind: Kind,
    sharing: Literal["expand", "reduce"],
    key: PRNGKeyArray | None,
) -> Layerwise:
    layers = _layers(model_fn, params, inputs)
    taken = passes(layers, loss, kind, inputs, targets, key)
    factored = _of_factors(layers, _factors(layers, taken, params, inputs, sharing))
    bases = {}
    for name, block in factored.blocks.items():
        assert isinstance(block, Stacked)
        eigen = eqx.filter_vmap(lambda one: one.eigen())(block.operator)
        bases[name] = (eigen.left, eigen.right)
    blocks = {}
    for name, values in corrected_values(layers, taken, params, inputs, bases).items():
        values = values.astype(factored.blocks[name].in_structure().dtype)
        blocks[name] = Stacked(eqx.filter_vmap(_eigen_kronecker)(*bases[name], values))
    return Layerwise.of(layers, blocks)


def _eigen_kronecker(left: Array | None, right: Array | None, values: Array) -> EigenKronecker:
    return EigenKronecker(left, right, values, lx.positive_semidefinite_tag)


def _layers(model_fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree) -> Layers:
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    return find_layers(model_fn, params, example)


def _factors(layers: Layers, taken: Pass, params: PyTree, inputs: PyTree, sharing: Any) -> Factors:
    """For each group the factors of rows and of columns."""
    measure = lambda cotangents, statistic, directions: statistics(
        layers, params, inputs, cotangents, statistic, targets=taken.targets, directions=directions
    )
    if taken.directions:
        read = measure(taken.mixed, FactorMoments(sharing, "inputs"), False)
        returned = measure(taken.cotangents, FactorMoments(sharing, "cotangents"), True)
        moments = {
            name: [
                m._replace(cotangents=g.cotangents) for m, g in zip(read[name], returned[name], strict=True)
            ]
            for name in read
        }
    else:
        moments = {
            name: list(m) for name, m in measure(taken.cotangents, FactorMoments(sharing), False).items()
        }
    return {group.name: of_group(group, moments[group.name]) for group in layers.groups}


def of_group(group: Group, moments: list[Moments]) -> tuple[Array, Array]:
    """The factors of a block from the moments (`FactorMoments`) of its sites."""
    if not moments:
        stack, rows, columns = group.block.shape
        dtype = group.block.structures[0].dtype
        return jnp.zeros((stack, rows), dtype), jnp.zeros((stack, columns), dtype)
    pairs = []
    for turned in (False, True):
        same = [(s, m) for m, s in zip(moments, group.sites, strict=True) if s.transposed == turned]
        if not same:
            continue
        (site, first), *others = same
        mean, returned = first.inputs, first.cotangents
        if others or site.steps > 1:
            read = sum((sum_of_inputs(*one) for one in others), start=sum_of_inputs(site, first))
            count = sum((m.count for _, m in others), start=first.count)
            count = count.reshape(-1, *(1,) * (read.ndim - 1)).astype(read.dtype)
            mean = jnp.where(count > 0, read / jnp.maximum(count, 1), 0)
            returned = sum((m.cotangents for _, m in others), start=returned)
        pairs.append((mean, returned) if turned else (returned, mean))
    return pairs[0] if len(pairs) == 1 else _together(pairs)


def _together(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """A Kronecker product for the sum of some, with its trace; unchanged if each is scaled between its factors."""
    rows, columns, total = [], [], []
    for left, right in pairs:
        of_left, of_right = _trace(left), _trace(right)
        usable = (of_left > 0) & (of_right > 0)
        scale = jnp.sqrt(jnp.where(usable, of_right / of_left, 1))
        rows.append(left * _along(scale, left))
        columns.append(right / _along(scale, right))
        total.append(of_left * of_right)
    left, right = sum(rows[1:], start=rows[0]), sum(columns[1:], start=columns[0])
    both = _trace(left) * _trace(right)
    scale = jnp.where(both > 0, sum(total[1:], start=total[0]) / both, 1)
    return left, right * _along(scale, right)


def _trace(factor: Array) -> Float[Array, " stack"]:
    return jnp.sum(factor, axis=1) if factor.ndim == 2 else jnp.trace(factor, axis1=1, axis2=2)


def _along(scale: Float[Array, " stack"], like: Array) -> Array:
    return scale.reshape(-1, *(1,) * (like.ndim - 1))


def _of_factors(layers: Layers, found: Factors) -> Layerwise:
    def make(left: Array, right: Array) -> Kronecker:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(left.dtype, right.dtype)
        return Kronecker(_factor(left.astype(dtype)), _factor(right.astype(dtype)))

    return Layerwise.of(
        layers, {name: Stacked(eqx.filter_vmap(make)(*factors)) for name, factors in found.items()}
    )


def _factor(factor: Array) -> lx.AbstractLinearOperator:
    tags = lx.positive_semidefinite_tag
    if factor.ndim == 1:
        return lx.TaggedLinearOperator(lx.DiagonalLinearOperator(factor), tags)
    return lx.MatrixLinearOperator(factor, tags)
