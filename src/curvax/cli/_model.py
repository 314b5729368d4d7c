"""The models of the command line and their bilevel problem.

All three are layers `x @ weight + bias` with tanh between them: none hidden for `logistic` and `ridge`, one for
`mlp`. The task decides the loss.

Penalties pull a hidden layer towards its random start, not towards zero (Li, Grandvalet and Davoine, Explicit
inductive bias for transfer learning with convolutional networks, 2018, arXiv:1802.01483). At zero the
units of an mlp die under a large penalty and stay dead at a saddle point under a smaller one: the inner solution
is then no minimum, and has no hypergradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import curvax as cx
from curvax.cli._hyperparameters import BIAS_PENALTY, Layers, Phi, example_weights, penalties


def init(sizes: tuple[int, ...], seed: int) -> list[dict[str, Array]]:
    """Parameters to start from: zeros for one layer, else random as usual for tanh.

    Args:
        sizes: Number of inputs, of hidden units (for the mlp), of outputs.
        seed: Of the random start.

    Returns:
        One dictionary (`weight`, `bias`) a layer.
    """
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    layers = []
    for key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True):
        scale = 0.0 if len(sizes) == 2 else inputs**-0.5
        weight = scale * jax.random.normal(key, (inputs, outputs))
        layers.append({"weight": weight, "bias": jnp.zeros((outputs,))})
    return layers


def predict(theta: Layers, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
    """Class scores, or one standardised value.

    Args:
        theta: The layers.
        x: Inputs.

    Returns:
        Outputs of the last layer.
    """
    for layer in theta[:-1]:
        x = jnp.tanh(x @ layer["weight"] + layer["bias"])
    return x @ theta[-1]["weight"] + theta[-1]["bias"]


def losses(theta: Layers, batch: dict[str, Array]) -> Float[Array, " n"]:
    """Loss of each example: cross entropy where the targets are classes, half the squared error else.

    Args:
        theta: The layers.
        batch: `x` and `y`.

    Returns:
        One loss an example.
    """
    outputs, y = predict(theta, batch["x"]), batch["y"]
    if jnp.issubdtype(y.dtype, jnp.integer):
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1)[:, 0]
    return 0.5 * (outputs[:, 0] - y) ** 2


def inner(theta: Layers, phi: Phi, batch: dict[str, Any]) -> Float[Array, ""]:
    """Weighted mean loss on the training split plus the penalties.

    Args:
        theta: The layers.
        phi: The hyperparameters.
        batch: `x`, `y`, `mask` (a fixed weight of each example: 1, or 0 to leave it out) and `start` (the weights
            of the hidden layers before training).

    Returns:
        The loss that training minimises.
    """
    y = batch["y"]
    labels = y if jnp.issubdtype(y.dtype, jnp.integer) else None
    weights = batch["mask"] * example_weights(phi, labels, y.shape[0])
    value = jnp.sum(weights * losses(theta, batch)) / jnp.sum(batch["mask"])
    for layer, penalty, start in zip(theta, penalties(phi, theta), [*batch["start"], 0.0], strict=True):
        value = value + 0.5 * jnp.sum(penalty * (layer["weight"] - start) ** 2)
        value = value + 0.5 * BIAS_PENALTY * jnp.sum(layer["bias"] ** 2)
    return value


def outer(theta: Layers, phi: Phi, batch: dict[str, Array]) -> Float[Array, ""]:
    """Mean loss on the validation split.

    Args:
        theta: The layers.
        phi: Unused: the hyperparameters act through the training only.
        batch: `x` and `y`.

    Returns:
        The loss that tuning minimises.
    """
    del phi
    return jnp.mean(losses(theta, batch))


@functools.cache
def problem() -> Any:
    """The bilevel problem of all models; one object, since another one would be compiled again."""
    return cx.Bilevel(inner=inner, outer=outer)
