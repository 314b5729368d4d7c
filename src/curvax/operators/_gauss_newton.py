"""The generalised Gauss–Newton matrix of a model and a loss."""

from collections.abc import Callable, Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax._pytree import tree_scale
from curvax.operators._base import (
    AbstractDerivativeOperator,
    as_arrays,
    as_tags,
    capture,
    check_scalar,
    linear_map,
    split,
    structure,
)


class GaussNewton(AbstractDerivativeOperator):
    """G = (1/N) Σᵢ JᵢᵀHᵢJᵢ, made by `gauss_newton`. Symmetric; J is never formed."""

    model_fn: Callable[[PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree], Array]
    params: PyTree[Array]
    rest: PyTree
    inputs: PyTree[Array]
    targets: PyTree[Array]
    tags: frozenset[object] = eqx.field(static=True)

    def _model(self, params: PyTree[Array]) -> tuple[PyTree[Array], PyTree]:
        whole = eqx.combine(params, self.rest)
        outputs = jax.vmap(lambda x: self.model_fn(whole, x))(self.inputs)
        return eqx.partition(outputs, eqx.is_inexact_array)

    def _loss_gradient(self, outputs: PyTree[Array], rest: PyTree) -> PyTree[Array]:
        def total(outputs: PyTree[Array]) -> Array:
            return jnp.sum(jax.vmap(self.loss_fn)(eqx.combine(outputs, rest), self.targets))

        return jax.grad(total)(outputs)

    def _mean(self, total: PyTree[Array]) -> PyTree[Array]:
        return tree_scale(1 / num_examples(self.inputs), total)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """G v: forward through the model, the loss's Hessian, back through the model."""

        def product(vector: PyTree[Array]) -> PyTree[Array]:
            outputs, tangent, rest = jax.jvp(self._model, (self.params,), (vector,), has_aux=True)
            _, curved = jax.jvp(lambda z: self._loss_gradient(z, rest), (outputs,), (tangent,))
            _, pullback, _ = jax.vjp(self._model, self.params, has_aux=True)
            return self._mean(pullback(curved)[0])

        return with_fast_contractions(product)(vector)

    def linearised(self) -> lx.AbstractLinearOperator:
        """G with the model and the loss's gradient linearised once."""
        outputs, push, rest = jax.linearize(self._model, self.params, has_aux=True)
        _, curve = jax.linearize(lambda z: self._loss_gradient(z, rest), outputs)
        pull = jax.linear_transpose(push, self.params)
        return linear_map(lambda vector: self._mean(pull(curve(push(vector)))[0]), self)

    def transpose(self) -> "GaussNewton":
        """G itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of the parameters."""
        return structure(self.params)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of the parameters."""
        return structure(self.params)


def num_examples(inputs: PyTree[Array]) -> int:
    """N: the size of the leading axis."""
    return jax.tree.leaves(inputs)[0].shape[0]


def check_examples(inputs: PyTree[Array], targets: PyTree[Array]) -> None:
    """Raise unless inputs and targets share one leading axis."""
    shapes = {
        name: [leaf.shape for leaf in jax.tree.leaves(tree)]
        for name, tree in (("inputs", inputs), ("targets", targets))
    }
    if not shapes["inputs"]:
        raise ValueError("`inputs` has no array leaf: the examples lie along its leading axis.")
    sizes = {shape[:1] for group in shapes.values() for shape in group}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            "`inputs` and `targets` must share one leading axis of at least one example, found shapes "
            f"{shapes['inputs']} and {shapes['targets']}."
        )


def gauss_newton(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    tags: object | Iterable[object] = lx.positive_semidefinite_tag,
) -> GaussNewton:
    """The generalised Gauss–Newton matrix G = (1/N) Σᵢ Jᵢᵀ Hᵢ Jᵢ, the MEAN over the N examples.

    Jᵢ = ∂model_fn(params, xᵢ)/∂params and Hᵢ = ∂²loss_fn(zᵢ, yᵢ)/∂z² at the outputs zᵢ. It is the
    Hessian of the mean loss without the term Σ ∂loss/∂z · ∂²model/∂params², and equals it for a model
    that is linear in its parameters. For softmax cross-entropy Hᵢ = diag(p) − ppᵀ, not
    diag(p(1 − p)): outputs that share an example are coupled. Any convex loss will do, squared
    error being the classical Gauss–Newton method.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytree.
        loss_fn: `loss_fn(outputs, y)` → scalar, for one example; convex in `outputs`. Regularisers are not
            part of it: add their curvature as another operator.
        params: Any pytree; only its floating-point arrays vary.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise; integers are welcome.
        tags: Positive semidefinite by default, which holds if and only if you keep `loss_fn` convex.
            It is not checked: for another loss pass `tags=()`.

    Returns:
        A symmetric operator of size n × n, n the number of floats in `params`.

    Raises:
        ValueError: no floating-point parameter, a complex one, or `inputs`/`targets` whose
            leading axes differ or are empty, or `loss_fn` not scalar.

    Cost: one product is a forward, a tangent and a backward pass over the examples; never forms J.
    Linearised once, only the tangent and backward pass remain in each product.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
    Neural Computation 14, 2002; Martens, "New insights and perspectives on the natural gradient method",
    JMLR 21, 2020.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0.0, 1.0])
        G = cx.operators.gauss_newton(
            lambda w, x: x @ w, lambda z, y: 0.5 * (z - y) ** 2, jnp.zeros(2), x, y
        )
        G.as_matrix()  # XᵀX / 2 = [[1, 1], [1, 2]]
        ```
    """
    dynamic, rest = split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    whole = eqx.combine(dynamic, rest)
    x, y = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (inputs, targets))
    model_fn = capture(model_fn, whole, x)
    outputs = eqx.filter_eval_shape(model_fn, whole, x)
    loss_fn = capture(loss_fn, outputs, y)
    check_scalar("loss_fn", loss_fn, outputs, y)
    return GaussNewton(model_fn, loss_fn, dynamic, rest, inputs, targets, as_tags(tags) | {lx.symmetric_tag})
