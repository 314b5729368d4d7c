"""Fisher matrices of a model and a likelihood: exact, sampled, empirical, centred."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax._contractions import with_fast_contractions
from curvax._pytree import tree_axpy, tree_dot, tree_scale
from curvax.operators._base import (
    AbstractDerivativeOperator,
    as_arrays,
    capture,
    linear_map,
    split,
    structure,
)
from curvax.operators._cotangents import check_kind, cotangents
from curvax.operators._gauss_newton import GaussNewton, check_examples, gauss_newton, num_examples
from curvax.operators._losses import AbstractLoss


class Fisher(AbstractDerivativeOperator):
    """F = (1/N) Σᵢ Σ_k (Jᵢᵀc_ik)(Jᵢᵀc_ik)ᵀ − ḡḡᵀ, made by `fisher`; ḡ = 0 but for the centred kind. Symmetric."""

    model_fn: Callable[[PyTree, PyTree], PyTree]
    params: PyTree[Array]
    rest: PyTree
    inputs: PyTree[Array]
    cotangents: PyTree[Array]
    mean: PyTree[Array] | None
    tags: frozenset[object] = eqx.field(static=True)

    def _model(self, params: PyTree[Array]) -> PyTree[Array]:
        whole = eqx.combine(params, self.rest)
        outputs = jax.vmap(lambda x: self.model_fn(whole, x))(self.inputs)
        return eqx.filter(outputs, eqx.is_inexact_array)

    def _curved(self, tangent: PyTree[Array]) -> PyTree[Array]:
        """(1/N) Σ_k c_k (c_kᵀ u), example by example."""
        count = num_examples(self.inputs)

        def one(directions: PyTree[Array], tangent: PyTree[Array]) -> PyTree[Array]:
            weights = jax.vmap(lambda c: tree_dot(c, tangent))(directions) / count
            return jax.tree.map(
                lambda c: jnp.tensordot(weights.astype(c.dtype), c, 1, precision=jax.lax.Precision.HIGHEST),
                directions,
            )

        return jax.vmap(one)(self.cotangents, tangent)

    def _centred(self, product: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
        if self.mean is None:
            return product
        return tree_axpy(-tree_dot(self.mean, vector), self.mean, product)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """F v: forward through the model, onto the cotangents, back through the model."""

        def product(vector: PyTree[Array]) -> PyTree[Array]:
            _, tangent = jax.jvp(self._model, (self.params,), (vector,))
            _, pullback = jax.vjp(self._model, self.params)
            return self._centred(pullback(self._curved(tangent))[0], vector)

        return with_fast_contractions(product)(vector)

    def linearised(self) -> lx.AbstractLinearOperator:
        """F with the model linearised once."""
        _, push = jax.linearize(self._model, self.params)
        pull = jax.linear_transpose(push, self.params)
        return linear_map(lambda vector: self._centred(pull(self._curved(push(vector)))[0], vector), self)

    def transpose(self) -> "Fisher":
        """F itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of the parameters."""
        return structure(self.params)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of the parameters."""
        return structure(self.params)


def fisher(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
    *,
    kind: Literal["exact", "monte_carlo", "empirical", "centred"] = "exact",
    num_samples: int = 1,
    key: PRNGKeyArray | None = None,
) -> GaussNewton | Fisher:
    """The Fisher matrix F = (1/N) Σᵢ E[gᵢgᵢᵀ], the MEAN over the N examples; gᵢ is the gradient of example i's loss.

    - `"exact"`: E over targets drawn from the model. For the losses of exponential families in their natural
      parameters (`SquaredError`, `SoftmaxCrossEntropy`, ...) this is the Gauss–Newton matrix, and is returned as one.
    - `"monte_carlo"`: the mean over `num_samples` targets drawn once for each example; unbiased, of rank at most
      N · num_samples.
    - `"empirical"`: at the targets of the data. Not an estimate of the exact one: it vanishes where the model fits, and
      depends on the noise.
    - `"centred"`: the covariance of the gradients, (1/N) Σ (gᵢ − ḡ)(gᵢ − ḡ)ᵀ, the empirical one less ḡḡᵀ.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example.
        loss: −log-likelihood of one example, `loss(output, target)`. An `AbstractLoss` for the exact and the sampled
            kind; any function for the others.
        params: Any pytree; only its floating-point arrays vary.
        inputs: Examples, stacked along the leading axis of every leaf.
        targets: Likewise; integers are welcome.
        kind: Which.
        num_samples: For `"monte_carlo"`.
        key: For `"monte_carlo"`; the draws are fixed when the operator is made.

    Returns:
        A symmetric positive semidefinite operator of size n × n, n the number of floats in `params`.

    Raises:
        ValueError: An unknown kind, a missing or superfluous key, a loss without a likelihood for a kind that needs
            one, no floating-point parameter, a complex one, or examples that do not fit.

    Cost: made in a forward pass (a backward pass too if centred); one product is a forward, a tangent and a backward
    pass.

    Source: J. Martens, "New insights and perspectives on the natural gradient method", 2020, arXiv 1412.1193;
        F. Kunstner et al., "Limitations of the empirical Fisher approximation", 2019, arXiv 1905.12558.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0, 1])
        model_fn = lambda w, x: x @ w
        F = cx.operators.fisher(model_fn, cx.operators.SoftmaxCrossEntropy(), jnp.zeros((2, 3)), x, y)
        F.as_matrix()  # 6 × 6, of rank 4
        ```
    """
    check_kind(kind, ("exact", "monte_carlo", "empirical", "centred"), key, num_samples)
    if kind in ("exact", "monte_carlo") and not isinstance(loss, AbstractLoss):
        raise ValueError(
            f"`kind={kind!r}` draws targets from the likelihood of `loss`, which must be an `AbstractLoss` "
            "(`cx.operators.SquaredError()`, ...). For any other convex loss use `cx.operators.gauss_newton`."
        )
    if kind == "exact":
        return gauss_newton(model_fn, loss, params, inputs, targets)
    dynamic, rest = split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs)
    model_fn = capture(model_fn, eqx.combine(dynamic, rest), example)
    directions = cotangents(loss, "monte_carlo" if kind == "monte_carlo" else "empirical", num_samples)
    keys = None if key is None else jax.random.split(key, num_examples(inputs))

    def outputs(dynamic: PyTree[Array]) -> PyTree:
        return jax.vmap(lambda x: model_fn(eqx.combine(dynamic, rest), x))(inputs)

    found = eqx.filter(jax.vmap(directions)(outputs(dynamic), targets, keys), eqx.is_inexact_array)
    mean = None
    if kind == "centred":
        _, pull = jax.vjp(lambda p: eqx.filter(outputs(p), eqx.is_inexact_array), dynamic)
        (total,) = pull(jax.tree.map(lambda c: c[:, 0], found))
        mean = tree_scale(1 / num_examples(inputs), total)
    tags = frozenset([lx.positive_semidefinite_tag])
    return Fisher(model_fn, dynamic, rest, inputs, found, mean, tags)
