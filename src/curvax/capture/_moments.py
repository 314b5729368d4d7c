"""The statistics that Kronecker factors are made of."""

from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax.capture._inputs import AbstractInputs, accumulation_dtype
from curvax.capture._second_moment import second_moment
from curvax.capture._site import Site


class Moments(NamedTuple):
    """Second moments of what flows through a site, SUMS over the examples and positions that count.

    Attributes:
        inputs: Σ x xᵀ, (stack, in, in), or its diagonal (stack, in) where `site.input_factor` is `"diagonal"`.
        cotangents: Σ g gᵀ, (stack, out, out), or its diagonal (stack, out).
        count: How many examples and positions count, (stack,).
    """

    inputs: Float[Array, "..."]
    cotangents: Float[Array, "..."]
    count: Float[Array, "..."]  # type: ignore[assignment]


class SecondMoments(eqx.Module):
    """The statistic for Kronecker factors: second moments of inputs and cotangents.

    For cotangents c with Σ c cᵀ the Hessian of the loss in the outputs, or samples that have it as their mean, the
    block of the Gauss–Newton matrix of the SUM over examples is Σ_b (Σ_t g x ᵀ)(Σ_t g xᵀ)ᵀ ≈ (Σ g gᵀ) ⊗ (Σ x xᵀ) /
    count.

    - `"expand"`: every shared position is an example of its own. The sums are over examples and positions.
    - `"reduce"`: x is the mean and g the sum over the shared positions of each example. The sums are over examples.
      Steps of a `scan` that shares the weight stay examples of their own, as do lookups in a table.

    Positions with zero cotangent do not count: masked tokens, branches not taken, empty slots of experts.

    Args:
        sharing: `"expand"` or `"reduce"`.

    Cost: in² + out² multiplications for each example and shared position, or each example.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        params, inputs = {"weight": jnp.ones((3, 2))}, jnp.ones((4, 2))
        cotangents = jnp.ones((4, 3))
        moments = cx.capture.statistics(
            lambda params, x: params["weight"] @ x, params, inputs, cotangents, cx.capture.SecondMoments()
        )
        moments["['weight']"][0].inputs  # a stack of one: [[[4., 4.], [4., 4.]]]
        ```

    Source: R. Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures",
        2023, arXiv 2311.00636, for expand and reduce.
    """

    sharing: Literal["expand", "reduce"] = eqx.field(static=True, default="expand")

    def __check_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f'`sharing` must be "expand" or "reduce", found {self.sharing!r}.')

    def __call__(
        self, site: Site, inputs: AbstractInputs, cotangents: Float[Array, "B T out"], aux: PyTree
    ) -> Moments:
        """The moments of one member of the stack.

        Args:
            site: Where.
            inputs: x.
            cotangents: g.
            aux: Not used.
        """
        dtype = accumulation_dtype(cotangents)
        mask = inputs.mask(cotangents)
        diagonal = "diagonal" in (site.input_factor, site.cotangent_factor)
        if self.sharing == "reduce" and not diagonal:
            of_inputs = second_moment(inputs.mean(mask))
            gradients = jnp.sum(cotangents, axis=1, dtype=dtype)
            return Moments(of_inputs, second_moment(gradients), jnp.sum(jnp.any(mask, axis=1), dtype=dtype))
        rows = cotangents.reshape(-1, cotangents.shape[-1])
        if site.cotangent_factor == "diagonal":
            of_cotangents = jnp.sum(jnp.square(rows.astype(dtype)), axis=0)
        else:
            of_cotangents = second_moment(rows)
        return Moments(inputs.second_moment(mask), of_cotangents, jnp.sum(mask, dtype=dtype))


class PerExampleGradients(eqx.Module):
    """The statistic that is the gradient of each example: Σ_T g xᵀ, (stack, B, out, in). Exact for any model.

    Cost: B times the memory of the parameters.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        params, inputs = {"weight": jnp.ones((1, 2))}, jnp.array([[1.0, 2.0], [3.0, 4.0]])
        gradients = cx.capture.statistics(
            lambda params, x: params["weight"] @ x, params, inputs, jnp.ones((2, 1)), cx.capture.PerExampleGradients()
        )
        gradients["['weight']"][0]  # [[[[1., 2.]], [[3., 4.]]]]
        ```
    """

    def __call__(
        self, site: Site, inputs: AbstractInputs, cotangents: Float[Array, "B T out"], aux: PyTree
    ) -> Float[Array, "B out in"]:
        """Those of one member of the stack.

        Args:
            site: Where.
            inputs: x.
            cotangents: g.
            aux: Not used.
        """
        return inputs.outer(cotangents)
