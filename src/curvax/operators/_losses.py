"""Losses of a likelihood, which know a root of their Hessian and how to draw targets."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar


class AbstractLoss(eqx.Module):
    """−log p(target | output) of ONE example, with the outputs as natural parameters of an exponential family.

    For these E[g gᵀ] over targets drawn from p(· | output) is the Hessian H of the loss in the outputs, g its gradient:
    Fisher and Gauss–Newton matrix are one. A loss that you write yourself gives the three methods below; a test of it
    is that `hessian_root` squared is `jax.hessian` of it.
    """

    @abstractmethod
    def __call__(self, output: PyTree[Array], target: PyTree[Array]) -> Scalar:
        """The loss of one example.

        Args:
            output: Of the model.
            target: What it should be.
        """

    @abstractmethod
    def hessian_root(self, output: PyTree[Array], target: PyTree[Array]) -> PyTree[Float[Array, "k *output"]]:
        """Directions b₁, ..., b_k, stacked along a leading axis, with Σ b bᵀ = H.

        Args:
            output: Of the model.
            target: What it should be; only which of it counts matters.
        """

    @abstractmethod
    def sample(
        self, output: PyTree[Array], target: PyTree[Array], key: PRNGKeyArray
    ) -> PyTree[Float[Array, "*output"]]:
        """The gradient of the loss in the output at a target drawn from p(· | output): E[g gᵀ] = H.

        Args:
            output: Of the model.
            target: What it should be; only which of it counts matters.
            key: For the draw.
        """


class SquaredError(AbstractLoss):
    """½ ‖output − target‖², the SUM over all entries: a normal distribution of variance 1. H = I.

    Example:
        >>> print(cx.operators.SquaredError()(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])))
        2.5
    """

    def __call__(self, output: Float[Array, "*s"], target: Float[Array, "*s"]) -> Scalar:
        """½ ‖output − target‖².

        Args:
            output: Any shape.
            target: Of the same shape.
        """
        _check_same(self, output, target)
        return 0.5 * jnp.sum(jnp.square(output - jnp.asarray(target, output.dtype)))

    def hessian_root(self, output: Float[Array, "*s"], target: Float[Array, "*s"]) -> Float[Array, "k *s"]:
        """Unit vectors.

        Args:
            output: Any shape.
            target: Not used.
        """
        return jnp.eye(output.size, dtype=output.dtype).reshape(output.size, *output.shape)

    def sample(
        self, output: Float[Array, "*s"], target: Float[Array, "*s"], key: PRNGKeyArray
    ) -> Float[Array, "*s"]:
        """Standard normal numbers.

        Args:
            output: Any shape.
            target: Not used.
            key: For the draw.
        """
        return jax.random.normal(key, output.shape, output.dtype)


class SoftmaxCrossEntropy(AbstractLoss):
    """−Σ y log softmax(output) along the last axis, the SUM over all leading ones (tokens). H = diag(p) − p pᵀ.

    Targets are integer labels, or probabilities along the last axis. A position with a negative label (padding) does
    not count; one with a label that is too large gives NaN.

    Example:
        >>> print(cx.operators.SoftmaxCrossEntropy()(jnp.zeros(4), jnp.array(1)))
        1.3862...
    """

    def __call__(self, output: Float[Array, "*s c"], target: Array) -> Scalar:
        """−Σ y log softmax(output).

        Args:
            output: Logits, classes along the last axis.
            target: Labels of shape (*s), or probabilities of shape (*s, c).
        """
        log_p = jax.nn.log_softmax(output)
        if not _are_labels(self, output, target):
            return -jnp.sum(target.astype(output.dtype) * log_p)
        picked = jnp.take_along_axis(log_p, jnp.maximum(target, 0)[..., None], -1, mode="fill")[..., 0]
        return -jnp.sum(jnp.where(target >= 0, picked, 0))

    def hessian_root(self, output: Float[Array, "*s c"], target: Array) -> Float[Array, "k *s c"]:
        """√p_c (e_c − p) for each class c at each position.

        Args:
            output: Logits.
            target: Labels, or probabilities.
        """
        p, classes = jax.nn.softmax(output), output.shape[-1]
        columns = jnp.sqrt(p)[..., None] * (jnp.eye(classes, dtype=p.dtype) - p[..., None, :])
        columns = columns * jnp.sqrt(self._weight(output, target))[..., None, None]
        flat = columns.reshape(-1, classes, classes)
        places = jnp.eye(len(flat), dtype=p.dtype)
        return jnp.einsum("st,scd->sctd", places, flat).reshape(-1, *output.shape)

    def sample(self, output: Float[Array, "*s c"], target: Array, key: PRNGKeyArray) -> Float[Array, "*s c"]:
        """softmax(output) − one-hot(label), labels drawn.

        Args:
            output: Logits.
            target: Labels, or probabilities.
            key: For the draw.
        """
        p = jax.nn.softmax(output)
        drawn = jax.nn.one_hot(_category(key, p), output.shape[-1], dtype=output.dtype)
        return jnp.sqrt(self._weight(output, target))[..., None] * (p - drawn)

    def _weight(self, output: Array, target: Array) -> Float[Array, "*s"]:
        """Σ y: what each position counts."""
        if _are_labels(self, output, target):
            return (target >= 0).astype(output.dtype)
        return jnp.sum(target.astype(output.dtype), axis=-1)


class BinaryCrossEntropy(AbstractLoss):
    """−Σ y log σ(output) + (1 − y) log σ(−output), the SUM over all entries. H = diag(p (1 − p)), p = σ(output).

    Example:
        >>> print(cx.operators.BinaryCrossEntropy()(jnp.zeros(2), jnp.array([0, 1])))
        1.3862...
    """

    def __call__(self, output: Float[Array, "*s"], target: Array) -> Scalar:
        """The loss of logits.

        Args:
            output: Logits, any shape.
            target: 0, 1, or probabilities, of the same shape.
        """
        _check_same(self, output, target)
        return jnp.sum(jax.nn.softplus(output) - target.astype(output.dtype) * output)

    def hessian_root(self, output: Float[Array, "*s"], target: Array) -> Float[Array, "k *s"]:
        """√(p (1 − p)) times unit vectors.

        Args:
            output: Logits.
            target: Not used.
        """
        # σ(z) σ(−z): 1 − p would be rounded to zero.
        deviation = jnp.sqrt(jax.nn.sigmoid(output) * jax.nn.sigmoid(-output))
        return jnp.diag(deviation.ravel()).reshape(output.size, *output.shape)

    def sample(self, output: Float[Array, "*s"], target: Array, key: PRNGKeyArray) -> Float[Array, "*s"]:
        """p − y, y drawn.

        Args:
            output: Logits.
            target: Not used.
            key: For the draw.
        """
        p = jax.nn.sigmoid(output)
        return p - jax.random.bernoulli(key, p).astype(p.dtype)


class PoissonLoss(AbstractLoss):
    """Σ exp(output) − y · output: counts y with the rate exp(output), up to log y!. H = diag(exp(output)).

    Example:
        >>> print(cx.operators.PoissonLoss()(jnp.zeros(2), jnp.array([3, 1])))
        2.0
    """

    def __call__(self, output: Float[Array, "*s"], target: Array) -> Scalar:
        """The loss of logarithms of rates.

        Args:
            output: Any shape.
            target: Counts, of the same shape.
        """
        _check_same(self, output, target)
        return jnp.sum(jnp.exp(output) - target.astype(output.dtype) * output)

    def hessian_root(self, output: Float[Array, "*s"], target: Array) -> Float[Array, "k *s"]:
        """√exp(output) times unit vectors.

        Args:
            output: Logarithms of rates.
            target: Not used.
        """
        return jnp.diag(jnp.exp(0.5 * output).ravel()).reshape(output.size, *output.shape)

    def sample(self, output: Float[Array, "*s"], target: Array, key: PRNGKeyArray) -> Float[Array, "*s"]:
        """exp(output) − y, y drawn.

        Args:
            output: Logarithms of rates.
            target: Not used.
            key: For the draw.
        """
        rate = jnp.exp(output)
        return rate - jax.random.poisson(key, rate).astype(rate.dtype)


# Classes are drawn in two stages beyond so many, first a block of so many: sums run on over few numbers.
BLOCK = 32


def _category(key: PRNGKeyArray, p: Float[Array, "*s c"]) -> Int[Array, "*s"]:
    """A class of these probabilities, by one uniform number a position (`jax.random.categorical` draws c of them)."""
    classes, wide = p.shape[-1], jnp.float64 if p.dtype == jnp.float64 else jnp.float32
    p = p.astype(wide)
    if classes <= 2 * BLOCK:
        total = jnp.sum(p, axis=-1, keepdims=True)
        return _first_above(p, jax.random.uniform(key, total.shape, wide) * total)[0]
    padded = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -classes % BLOCK)])
    blocks = padded.reshape(*p.shape[:-1], -1, BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    total = jnp.sum(sums, axis=-1, keepdims=True)
    block, rest = _first_above(sums, jax.random.uniform(key, total.shape, wide) * total)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return jnp.minimum(block * BLOCK + _first_above(inside, rest)[0], classes - 1)


def _first_above(
    parts: Float[Array, "*s k"], level: Float[Array, "*s 1"]
) -> tuple[Int[Array, "*s"], Float[Array, "*s 1"]]:
    """Up to which part the sum first exceeds the level, and by how much the level exceeds those before it."""
    below = jnp.cumsum(parts, axis=-1)
    index = jnp.minimum(jnp.sum(below <= level, axis=-1, keepdims=True), parts.shape[-1] - 1)
    return index[..., 0], level - jnp.take_along_axis(below - parts, index, axis=-1)


def _check_same(loss: AbstractLoss, output: Array, target: Array) -> None:
    if jnp.shape(output) != jnp.shape(target):
        raise ValueError(
            f"`{type(loss).__name__}` needs a target of the shape of the output of one example, "
            f"{jnp.shape(output)}; found {jnp.shape(target)}."
        )


def _are_labels(loss: AbstractLoss, output: Array, target: Array) -> bool:
    """Whether targets are labels; else they are probabilities."""
    shape, found = jnp.shape(output), jnp.shape(target)
    labels = jnp.issubdtype(jnp.result_type(target), jnp.integer)
    if len(shape) == 0 or found != (shape[:-1] if labels else shape):
        raise ValueError(
            f"`{type(loss).__name__}` needs, for logits of shape {shape} with classes along the last axis, integer "
            f"labels of shape {shape[:-1]} or probabilities of shape {shape}; found {jnp.result_type(target)} of shape "
            f"{found}."
        )
    return labels
