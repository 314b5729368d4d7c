"""Claim: mixed mode differentiates the training of a transformer in half the memory of reverse over reverse.

A decoder of width 128 with 4 heads and 4 to 32 layers, batches of 1024 tokens of 64 kinds (random texts of 256 or 512),
every block under `jax.checkpoint`, a learning rate for each parameter (its logarithm) as hyperparameters, two steps of
gradient descent, float32. One row has a batch of a single text of 256 tokens: there the states of the path, which both
store, are most of the memory, and no claim is made. Peer: `jax.grad` through `lax.scan` over the steps, with
`jax.checkpoint` around the step as well: the usual way, reverse over reverse mode. Memory is XLA's plan of temporaries.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax

import curvax as cx

WIDTH, HEADS, KINDS = 128, 4, 64
# (layers, tokens, texts): the first three grow, the next is longer, the last is a batch too small to matter.
CASES = ((4, 256, 4), (16, 256, 4), (32, 256, 4), (16, 512, 2), (16, 256, 1))
TIMED = (16, 256, 4)
STEPS = 2
LOG_RATE = -4.0
REPEATS = 4


def start(layers: int, tokens: int) -> tuple[Any, Any]:
    """Logarithms of the rates and the weights."""
    shapes = {
        "qkv": (layers, WIDTH, 3 * WIDTH),
        "out": (layers, WIDTH, WIDTH),
        "up": (layers, WIDTH, 4 * WIDTH),
        "down": (layers, 4 * WIDTH, WIDTH),
        "tokens": (KINDS, WIDTH),
        "places": (tokens, WIDTH),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    theta = {
        name: jax.random.normal(key, shape, jnp.float32)
        * shape[-2] ** -0.5
        / (layers if len(shape) == 3 else 1) ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, LOG_RATE, leaf.dtype), theta), theta


def texts(tokens: int, number: int) -> tuple[jax.Array, ...]:
    """Texts to train on and texts to validate on."""
    return tuple(jax.random.randint(jax.random.key(i), (number, tokens + 1), 0, KINDS) for i in (1, 2))


def normal(x):
    return (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


@functools.partial(jax.checkpoint, prevent_cse=False)
def block(x, weights):
    """Attention and a network, on texts of shape (batch, tokens, width)."""
    batch, tokens, _ = x.shape
    q, k, v = (y.reshape(batch, tokens, HEADS, -1) for y in jnp.split(normal(x) @ weights["qkv"], 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, tokens, WIDTH)
    x = x + mixed @ weights["out"]
    return x + jax.nn.gelu(normal(x) @ weights["up"]) @ weights["down"]


def loss(theta, text):
    """Cross entropy of the next token, the mean over a text."""
    x = theta["tokens"][text[:, :-1]] + theta["places"]
    stack = {name: theta[name] for name in ("qkv", "out", "up", "down")}
    x, _ = jax.lax.scan(lambda x, weights: (block(x, weights), None), x, stack)
    logits = normal(x) @ theta["tokens"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]))


def inner(theta, phi, text):
    del phi
    return loss(theta, text)


def descent(phi):
    """A rate for each parameter."""
    return optax.stateless(lambda g, _: jax.tree.map(lambda g, r: -jnp.exp(r) * g, g, phi))


PROBLEM = cx.Bilevel(inner=inner, outer=inner)
SOLVER = cx.Steps(descent, STEPS)


def curvax(phi, theta, training, validation):
    """Ours, as a user writes it."""
    hg = cx.hypergradient(
        PROBLEM,
        phi,
        theta,
        inner_solver=SOLVER,
        rule=cx.Unrolled(),
        inner_data=training,
        outer_data=validation,
    )
    return hg.value, hg.grad


def reverse_over_reverse(phi, theta, training, validation):
    """`jax.grad` through the steps."""

    def trained(phi):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(theta, _):
            updates, _ = descent(phi).update(jax.grad(loss)(theta, training), optax.EmptyState())
            return optax.apply_updates(theta, updates), None

        return loss(jax.lax.scan(step, theta, length=STEPS)[0], validation)

    return jax.value_and_grad(trained)(phi)


CONTENDERS: dict[str, Callable] = {"Curvax, mixed": curvax, "JAX, reverse over reverse": reverse_over_reverse}


def measure() -> harness.Report:
    rows, claims = [], []
    for layers, tokens, number in CASES:
        case = (layers, tokens, number)
        arguments = (*start(layers, tokens), *texts(tokens, number))
        programs = {name: jax.jit(f).lower(*arguments).compile() for name, f in CONTENDERS.items()}
        memory = {name: p.memory_analysis().temp_size_in_bytes / 2**20 for name, p in programs.items()}
        calls = {name: functools.partial(p, *arguments) for name, p in programs.items()}
        found = {name: call()[1] for name, call in calls.items()}
        times = harness.in_turns(calls, repeats=REPEATS, warm_ups=0) if case == TIMED else {}
        ours, peer = CONTENDERS
        rows += [
            {
                "layers": layers,
                "texts × tokens": f"{number} × {tokens}",
                "contender": name,
                "seconds": harness.milliseconds(times[name]) / 1e3 if times else "",
                "temporaries, MB": memory[name],
                "difference": harness.relative_error(found[name], found[peer]),
            }
            for name in CONTENDERS
        ]
        if layers >= TIMED[0] and number > 1:
            claims.append(
                harness.Claim(
                    f"{layers} layers, {tokens} tokens: memory of the peer ÷ ours",
                    memory[peer] / memory[ours],
                    at_least=2,
                    aim=2.5,
                )
            )
        if case == TIMED:
            claims.append(
                harness.Claim(
                    f"{layers} layers, {tokens} tokens: time ÷ the peer's",
                    harness.ratio(times[ours], times[peer]),
                    at_most=0.95,
                )
            )
    return harness.Report(
        title="Learning rates of a transformer",
        setting=(
            f"Width {WIDTH}, {STEPS} steps, blocks under `jax.checkpoint`, a rate for each parameter, float32. "
            "`difference` is from the peer, in the same precision. With a single text of 256 tokens the stored states "
            "of the path are most of the memory: no claim is made of it."
        ),
        rows=rows,
        claims=claims,
    )


if __name__ == "__main__":
    harness.main(measure)
