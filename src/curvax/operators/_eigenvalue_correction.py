"""New eigenvalues in a basis that is kept: EKFAC as batches come in."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax.operators._cotangents import Kind, Loss
from curvax.operators._kfac import _checked, _layers
from curvax.operators._kfac_statistics import corrected_values, passes
from curvax.operators._layer_spectra import in_eigenbases, with_values
from curvax.operators._layerwise import Layerwise


def eigenvalue_correction(
    curvature: Layerwise,
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    kind: Kind = "exact",
    key: PRNGKeyArray | None = None,
) -> Layerwise:
    """The eigenvectors of a `kfac` or `ekfac` with S = Σ (UᵀḡV)² / N, the MEAN over the N examples of another batch.

    The eigenvectors of a layer change slowly and are dear, the eigenvalues change with every batch and are cheap: take
    `ekfac` now and then and this in between, averaged by `MovingAverage`. With few examples, and sampled targets, it is
    a randomised estimate of the eigenvalues of all.

    Args:
        curvature: From `kfac` (decomposed here) or `ekfac`, of the same model, not damped.
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, as for `kfac`.
        params: Where.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise.
        kind: `"exact"`, `"monte_carlo"` or `"empirical"`, as for `kfac`.
        key: For `"monte_carlo"`.

    Returns:
        A symmetric positive semidefinite operator of the kind of `ekfac`. No other eigenvalues with these vectors are
            nearer to the blocks, in the Frobenius norm.

    Raises:
        ValueError: As `ekfac`; blocks that are no Kronecker products, or not those of the model.
        RuntimeError: The Hessian of a loss that is any function has a negative eigenvalue.

    Cost: a forward and a backward pass (for every output, if exact), and in² + out² multiplications for each example
    and position; no eigendecomposition where the blocks have theirs.

    Source: T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018,
    arXiv 1806.03884, section 3.3.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        arguments = lambda w, x: jnp.tanh(w @ x), cx.operators.SquaredError(), jnp.ones((3, 2))
        curvature = cx.operators.ekfac(*arguments, x, y)
        curvature = cx.operators.eigenvalue_correction(curvature, *arguments, 2 * x, y)
        ```
    """
    arrays = _checked(params, inputs, targets, kind, "expand", key)
    return _corrected(curvature, model_fn, loss, *arrays, kind, key)


@eqx.filter_jit
def _corrected(
    curvature: Layerwise,
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    kind: Kind,
    key: PRNGKeyArray | None,
) -> Layerwise:
    layers = _layers(model_fn, params, inputs)
    if tuple((group.name, group.block) for group in layers.groups) != curvature.coordinates:
        raise ValueError("`curvature` must be of the same model and parameters: its blocks are others.")
    turned = in_eigenbases(curvature, "eigenvalue_correction()")
    bases = {name: (block.operator.left, block.operator.right) for name, block in turned.blocks.items()}
    values = corrected_values(layers, passes(layers, loss, kind, inputs, targets, key), params, inputs, bases)
    blocks = {}
    for name, block in turned.blocks.items():
        new = values[name].astype(block.operator.values.dtype)
        found = eqx.tree_at(lambda b: b.operator.values, block, new)
        blocks[name] = with_values(found, lambda values: values)
    return eqx.tree_at(lambda c: c.blocks, turned, blocks)
