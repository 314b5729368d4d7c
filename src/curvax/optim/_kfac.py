"""K-FAC and EKFAC as optimisers."""

from typing import Any

import optax
from jaxtyping import PyTree

from curvax.operators._cotangents import Loss
from curvax.optim._eigen import EigenCurvature
from curvax.optim._kronecker import KroneckerCurvature
from curvax.optim._options import Damping, Factors, Momentum, Schedule, check_option
from curvax.optim._transformation import ModelFn, transformation


def kfac(
    model_fn: ModelFn,
    loss: Loss,
    learning_rate: Any = None,
    *,
    example: PyTree,
    momentum: float | Momentum | None = None,
    damping: Damping = Damping(),  # noqa: B008
    factors: Factors = Factors(),  # noqa: B008
    schedule: Schedule = Schedule(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    r"""K-FAC: δ = −α (F + γI)⁻¹ g + μ δ₋₁, with a Kronecker product G ⊗ A for every layer of a model as F.

    The layers are those that `cx.capture.report(model_fn, params, example)` prints, of any model: through `jit`,
    `jax.checkpoint`, `scan` (a pair of factors for each layer of it), with tied weights, convolutions and embeddings.
    Biases that are not folded in, scales (norm layers) and parameters used in other ways have a diagonal. Where there
    are no statistics, steps are those of first order, scaled by the mean curvature of all others; `cx.optim.report`
    says where.

    Without `learning_rate`, α and (without `momentum`) μ minimise in every step the exact quadratic model
    M(δ) = gᵀδ + ½ δᵀ(B + (λ + η) I) δ over the plane of the preconditioned gradient and the step before, B the
    Gauss–Newton matrix of the batch; γ is 0.1 λ + η then, and λ + η beside a given rate. Nothing needs tuning but
    `damping.initial`, whose adaptation corrects it.

    `update` needs the batch, and does a forward pass of its own: in one `jit` with the gradient XLA computes it once.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, convex in the outputs: `cx.operators.SquaredError()`,
            `SoftmaxCrossEntropy()`, ..., or any function, whose Hessian is written out. The objective is its MEAN over
            the batch, and ½ `damping.penalty` ‖θ‖² where that is given: `grads` are to be of the same.
        learning_rate: A number, an optax schedule, or None for that of the exact quadratic model.
        example: One example of the inputs (arrays or `jax.ShapeDtypeStruct`s), of which only the shapes count: layers
            are found with it in `init`.
        momentum: A decay, a [`Momentum`][curvax.optim.Momentum], or None: that of the quadratic model, and none beside
            a given learning rate.
        damping: λ, its adaptation, exact or factored, η, and the bound on the length of steps.
        factors: How the factors are estimated, and their running means.
        schedule: When, and when they are factorised.

    Returns:
        A transformation with `init(params)` and `update(grads, state, params, inputs=..., targets=..., key=...)`; `key`
            for factors of kind `"monte_carlo"`, a new one at each step. `params` may be a whole Equinox module.
            The state, an [`OptimiserState`][curvax.optim.OptimiserState], is a pytree of arrays: saved and restored, a
            run goes on bit for bit. `state.info` is about the last step.

    Raises:
        TypeError: An argument of another kind.
        ValueError: A learning rate that is not positive; in `update` what is missing or does not fit.

    What goes wrong is counted in the state, by block: statistics that are not finite stay out of the running means
    (`rejected`), a factor without an inverse becomes a multiple of the identity (`fallbacks`); a step is not taken if
    it is not finite, or was looked at and leads up (`info.skipped`).

    Cost: beside the gradient, factors (about one gradient for an MLP, less for a transformer), two tangent passes
    without a learning rate, and out · in · (out + in) multiplications for each layer; now and then a forward pass.
    Memory: four times out² + in² for each layer and one step.

    Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
    arXiv 1503.05671. There γ, the root of what is added to the factors, starts at √(λ + η) and is adapted apart, by the
    best of three (section 6.6); here it is √(0.1 λ + η) (`damping.share`), which needs no factorisation more. There λ
    falls by one factor only; here faster where the model has far too much curvature.

    Example:
        ```python
        import jax, jax.numpy as jnp, optax, curvax as cx

        loss, w = cx.operators.SoftmaxCrossEntropy(), jnp.zeros((3, 2))
        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 3
        model_fn = lambda w, x: w @ x
        optimiser = cx.optim.kfac(model_fn, loss, example=x[0])
        state = optimiser.init(w)

        @jax.jit
        def step(w, state, key):
            grads = jax.grad(lambda w: jnp.mean(jax.vmap(lambda x, y: loss(model_fn(w, x), y))(x, y)))(w)
            updates, state = optimiser.update(grads, state, w, inputs=x, targets=y, key=key)
            return optax.apply_updates(w, updates), state

        w, state = step(w, state, jax.random.key(1))
        ```
    """
    _check(damping, factors, schedule)
    return transformation(
        KroneckerCurvature(factors, schedule, damping),
        model_fn,
        loss,
        learning_rate,
        example=example,
        momentum=momentum,
        damping=damping,
        draws=factors.kind == "monte_carlo",
    )


def ekfac(
    model_fn: ModelFn,
    loss: Loss,
    learning_rate: Any = None,
    *,
    example: PyTree,
    momentum: float | Momentum | None = None,
    damping: Damping = Damping(),  # noqa: B008
    factors: Factors = Factors(),  # noqa: B008
    schedule: Schedule = Schedule(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    r"""EKFAC: K-FAC's eigenvectors U ⊗ V, and S, the second moments of the gradients along them, for eigenvalues.

    The direction is −U ((UᵀgV) / (S + γ)) Vᵀ for every layer. S is a running mean that costs nearly nothing and is
    up to date at every step, so the eigenvectors may be computed more seldom. Where they change, S is carried over to
    the new ones as if the gradients were uncorrelated along the old ones. All else is as for
    [`kfac`][curvax.optim.kfac]; damping is always exact.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees.
        loss: `loss(output, target)` → scalar, for one example, convex in the outputs.
        learning_rate: A number, an optax schedule, or None for that of the exact quadratic model.
        example: One example of the inputs, of which only the shapes count.
        momentum: As for `kfac`.
        damping: As for `kfac`.
        factors: How the factors and S are estimated, and their running means.
        schedule: When, and when the factors are decomposed. Its drift is ‖off-diagonal‖ / ‖diagonal‖ of UᵀFU, at four
            products of matrices for each factor.

    Returns:
        A transformation, as `kfac` returns it.

    Raises:
        TypeError: An argument of another kind.
        ValueError: As `kfac`.

    Cost: as `kfac`, with eigendecompositions (about three times a Cholesky factorisation and its inverse), twice the
    multiplications for each layer, and in² + out² for each example and position more.

    Source: T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018,
    arXiv 1806.03884. There S starts again from nothing at new eigenvectors.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        loss, w = cx.operators.SquaredError(), jnp.ones((3, 2))
        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        optimiser = cx.optim.ekfac(model_fn, loss, 0.1, example=x[0], momentum=0.9)
        state = optimiser.init(w)
        grads = jax.grad(lambda w: jnp.mean(jax.vmap(lambda x, y: loss(model_fn(w, x), y))(x, y)))(w)
        updates, state = optimiser.update(grads, state, w, inputs=x, targets=y, key=jax.random.key(1))
        ```
    """
    _check(damping, factors, schedule)
    return transformation(
        EigenCurvature(factors, schedule, damping),
        model_fn,
        loss,
        learning_rate,
        example=example,
        momentum=momentum,
        damping=damping,
        draws=factors.kind == "monte_carlo",
    )


def _check(damping: Damping, factors: Factors, schedule: Schedule) -> None:
    check_option("damping", damping, Damping)
    check_option("factors", factors, Factors)
    check_option("schedule", schedule, Schedule)
