"""K-BFGS as an optimiser."""

import dataclasses
from typing import Any

import optax
from jaxtyping import PyTree

from curvax.operators._cotangents import Loss
from curvax.optim._options import Damping, Factors, Momentum, check_option
from curvax.optim._quasi_newton import QuasiNewtonCurvature
from curvax.optim._transformation import ModelFn, transformation


def kbfgs(
    model_fn: ModelFn,
    loss: Loss,
    learning_rate: Any = None,
    *,
    example: PyTree,
    momentum: float | Momentum | None = None,
    damping: Damping = Damping(),  # noqa: B008
    decay: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""K-BFGS: δ = −α H_G g H_A + μ δ₋₁, with H_G and H_A, the inverses of K-FAC's factors, by one BFGS update a step.

    For every layer of one use, with A the running mean of x xᵀ over its inputs:

    - H_A is updated along s = H_A x̄, y = (A + √(λ + η) I) s, x̄ the mean input of the batch. It starts at
      (A + √(λ + η) I)⁻¹, and is computed anew where A or λ has changed so much that for a probe z
      ‖(A + √(λ + η) I) H_A z − z‖ > ½ ‖z‖: an update reaches one direction, and all others would stay out of date.
    - H_G is updated along the change s of the mean of what the layer returns, and the change y of the mean gradient in
      it, from before the step to after it on the SAME batch, with double damping: s is moved towards H_G y until
      sᵀy ≥ 0.2 yᵀH_G y, then √(λ + η) s is added to y. It starts at (sᵀy / yᵀy) I.

    Nothing is drawn, and the factors of the gradients are never factorised. All other parameters (tied weights,
    embeddings, norm layers) have the diagonal of the empirical Fisher matrix. All else is as for
    [`kfac`][curvax.optim.kfac].

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example.
        learning_rate: A number, an optax schedule, or None for that of the exact quadratic model.
        example: One example of the inputs, of which only the shapes count.
        momentum: As for `kfac`.
        damping: As for `kfac`; always factored. `Damping(share="auto")` is 1.
        decay: Of the running mean of A, and of the diagonals.

    Returns:
        A transformation, as `kfac` returns it, whose `update` takes no key.

    Raises:
        TypeError: An argument of another kind.
        ValueError: As `kfac`; exact damping.

    Cost: beside the gradient in² + out² multiplications for each layer and a few for each example, and a forward and a
    backward pass after the step; two tangent passes without a learning rate; now and then inverses of all A.

    Source: D. Goldfarb, Y. Ren and A. Bahamou, "Practical quasi-Newton methods for training deep neural networks",
    2020, arXiv 2006.08877. There H_G starts at the identity, s and y are running means over the steps (pairs that are
    nearly parallel, where little noise has to be averaged out), λ stays, and H_A is never computed anew.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        loss, w = cx.operators.SquaredError(), jnp.ones((3, 2))
        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        optimiser = cx.optim.kbfgs(model_fn, loss, example=x[0])
        state = optimiser.init(w)
        grads = jax.grad(lambda w: jnp.mean(jax.vmap(lambda x, y: loss(model_fn(w, x), y))(x, y)))(w)
        updates, state = optimiser.update(grads, state, w, inputs=x, targets=y)
        ```
    """
    check_option("damping", damping, Damping)
    if damping.exact:
        raise ValueError(
            "`damping.exact` needs eigenvectors, which K-BFGS does not have; leave it out, or use `kfac`."
        )
    if damping.share == "auto":
        # H_G is learned from steps, with λ in every one of its updates: with less of it, residual networks go wrong.
        damping = dataclasses.replace(damping, share=1.0)
    return transformation(
        QuasiNewtonCurvature(Factors("empirical", decay=decay)),
        model_fn,
        loss,
        learning_rate,
        example=example,
        momentum=momentum,
        damping=damping,
        draws=False,
    )
