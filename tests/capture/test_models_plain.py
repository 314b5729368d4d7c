"""Models written as plain functions: transformers, graphs, experts, a U-Net, and weights in all sorts of disguises."""

import jax
import jax.numpy as jnp
import pytest

from helpers.captured import agree, kinds, normal, shapes
from helpers.sweep import sweep

KEY = jax.random.key(0)


def _params(**shapes):
    keys = jax.random.split(KEY, len(shapes))
    return {n: 0.5 * normal(k, *s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def _normalised(x, scale):
    return scale * (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


# A transformer: scanned, rematerialised, heads by reshape, tied embedding, masked attention.

D, H, T, V, LAYERS = 4, 2, 3, 5, 2
TRANSFORMER = _params(
    embed=(V, D), position=(8, D), scale=(LAYERS, D), qkv=(LAYERS, D, 3 * D), out=(LAYERS, D, D),
    up=(LAYERS, D, 6), up_bias=(LAYERS, 6), down=(LAYERS, 6, D),
)  # fmt: skip


def _block(x, layer):
    heads = lambda y: y.reshape(T, H, D // H)
    q, k, v = map(heads, jnp.split(_normalised(x, layer["scale"]) @ layer["qkv"], 3, axis=-1))
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jnp.einsum("thd,shd->hts", q, k), -1e9)
    mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(T, D)
    x = x + mixed @ layer["out"]
    return x + jax.nn.gelu(x @ layer["up"] + layer["up_bias"]) @ layer["down"], None


def transformer(p, tokens):
    x = p["embed"][tokens] + p["position"][:T]
    layers = {name: p[name] for name in ("scale", "qkv", "out", "up", "up_bias", "down")}
    block = jax.checkpoint(_block, policy=jax.checkpoint_policies.dots_saveable)
    return jax.lax.scan(block, x, layers)[0] @ p["embed"].T


def test_scanned_transformer(key):
    layers = agree(transformer, TRANSFORMER, jax.random.randint(key, (3, T), 0, V), key)
    assert not layers.fallbacks
    assert kinds(layers) == {
        "['down']": ["dense"],
        "['embed']": ["embedding", "dense"],
        "['out']": ["dense"],
        "['position']": ["bias"],
        "['qkv']": ["dense"],
        "['scale']": ["scale"],
        "['up']": ["dense"],
    }
    assert shapes(layers)["['up']"] == (LAYERS, 6, D + 1)
    assert shapes(layers)["['scale']"] == (LAYERS, D, 1)
    assert shapes(layers)["['position']"] == (1, T * D, 1)  # the rows that are used


# Graphs, experts, images.


def graph_network(p, x):
    nodes, senders, receivers = x
    for _ in range(2):  # the same weights twice
        messages = jnp.tanh(jnp.concatenate([nodes[senders], nodes[receivers]], -1) @ p["message"])
        received = jax.ops.segment_sum(messages, receivers, nodes.shape[0])
        nodes = jnp.tanh(nodes @ p["self"] + received + p["bias"])
    return nodes.sum(0)


def experts_by_one_hot(p, x):
    """Top-1 routing with capacity: tokens are dispatched by products with one-hot masks; slots may stay empty."""
    gates = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3, dtype=x.dtype)
    place = jnp.where(chosen > 0, jnp.cumsum(chosen, 0) - 1, -1).astype(int)
    dispatch = jax.nn.one_hot(place, 4, dtype=x.dtype)
    slots = jnp.einsum("tec,td->ecd", dispatch, x)
    hidden = jnp.tanh(jnp.einsum("ecd,edf->ecf", slots, p["up"]) + p["up_bias"][:, None])
    out = jnp.einsum("ecf,efd->ecd", hidden, p["down"])
    return jnp.einsum("tec,ecd,te->td", dispatch, out, gates)


def experts_all(p, x):
    """Every expert on every token."""
    out = jnp.einsum("td,edf->tef", x, p["up"])
    return jnp.einsum("tef,te->tf", jnp.tanh(out), jax.nn.softmax(x @ p["router"]))


def unet(p, image):
    """Down by strides, up by a transposed convolution, a skip, channels last."""
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w, stride: jax.lax.conv_general_dilated(
        x, w, (stride,) * 2, "SAME", dimension_numbers=numbers
    )
    first = jax.nn.silu(conv(image[None], p["first"], 1) + p["first_bias"])
    low = jax.nn.silu(conv(first, p["down"], 2))
    up = jax.lax.conv_transpose(low, p["up"], (2, 2), "SAME", dimension_numbers=numbers)
    joined = jnp.concatenate([first, jax.nn.silu(up)], -1)
    return (conv(joined, p["last"], 1) + p["last_bias"])[0]


GRAPH = (
    normal(KEY, 3, 4, 2),
    jnp.array([[0, 1, 2, 3, 0]] * 3),
    jnp.array([[1, 2, 3, 0, 2], [1, 0, 3, 2, 2], [2, 2, 3, 0, 1]]),
)
STRUCTURED = {
    "graph": (
        graph_network,
        _params(message=(4, 2), self=(2, 2), bias=(2,)),
        GRAPH,
        {"['bias']": ["bias"], "['message']": ["dense", "dense"], "['self']": ["dense", "dense"]},
    ),
    "experts by one-hot": (
        experts_by_one_hot,
        _params(router=(2, 3), up=(3, 2, 4), up_bias=(3, 4), down=(3, 4, 2)),
        normal(KEY, 3, 6, 2),
        {"['down']": ["dense"], "['router']": ["dense"], "['up']": ["dense"]},
    ),
    "all experts": (
        experts_all,
        _params(router=(2, 3), up=(3, 2, 4)),
        normal(KEY, 3, 6, 2),
        {"['router']": ["dense"], "['up']": ["dense"]},
    ),
    "unet": (
        unet,
        _params(
            first=(3, 3, 1, 2), first_bias=(2,), down=(3, 3, 2, 3), up=(3, 3, 3, 2), last=(1, 1, 4, 1), last_bias=(1,)
        ),
        normal(KEY, 3, 6, 6, 1),
        {f"['{name}']": ["convolution"] for name in ("down", "first", "last", "up")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_models(name, key):
    model_fn, params, inputs, expected = STRUCTURED[name]
    layers = agree(model_fn, params, inputs, key)
    assert kinds(layers) == expected and not layers.fallbacks
    if name == "experts by one-hot":
        assert shapes(layers)["['up']"] == (3, 4, 3)  # the bias of every expert is folded in


# Weights in disguise. Every function takes w of shape (4, 6) and x of shape (6,), unless said otherwise.


def _flat(w, x):
    """All parameters in one vector."""
    w = w.ravel()
    return w[:6].reshape(2, 3) @ jnp.tanh(w[6:18].reshape(3, 4) @ x[:4] + w[18:21]) + w[21:23]


def _nested(w, x):
    """A stack of two times two layers, scanned in two levels, and a weight shared by all."""
    inner = lambda h, layer: (jnp.tanh(layer @ h), None)
    outer = lambda h, group: (jax.lax.scan(inner, h, group)[0], None)
    return jax.lax.scan(outer, x[:2], w.reshape(6, 2, 2)[:4].reshape(2, 2, 2, 2))[0]


def _over_time(w, x):
    """Shared by the steps of a scan, beside a stacked scale."""
    step = lambda h, s: (jnp.tanh(w[:, :4] @ h) * s, None)
    return jax.lax.scan(step, x[:4], w[:, 4])[0]


DISGUISES = {
    "scaled, cast, transposed": (
        lambda w, x: x @ (2.0 * w.astype(jnp.float64).T / jnp.sqrt(3.0)),
        {"": (1, 4, 6)},
    ),
    "negative": (lambda w, x: (-w) @ x, {"": (1, 4, 6)}),
    "scaled by data": (lambda w, x: (w * x[0]) @ x, {"": (1, 4, 6)}),
    "a part in three": (
        lambda w, x: jnp.concatenate([part @ x[:2] for part in jnp.split(w, 3, axis=1)]),
        {"#0": (1, 4, 2), "#1": (1, 4, 2), "#2": (1, 4, 2)},
    ),
    "rows one by one": (lambda w, x: jnp.stack([row @ x for row in w]), None),
    "heads": (lambda w, x: jnp.einsum("hkd,d->kh", w.reshape(2, 2, 6), x), {"": (1, 4, 6)}),
    "every other column": (lambda w, x: w[:, ::2] @ x[:3], {"": (1, 4, 3)}),
    "backwards": (lambda w, x: w[::-1] @ x, {"": (1, 4, 6)}),
    "with a constant": (lambda w, x: (w + jnp.ones((4, 6))) @ x, {"": (1, 4, 6)}),
    "repeated": (
        lambda w, x: jnp.einsum("nij,nj->ni", jnp.broadcast_to(w, (3, 4, 6)), jnp.outer(x[:3], x)),
        {"": (1, 4, 6)},
    ),
    "twice": (lambda w, x: jnp.tanh(w @ x) @ jnp.sin(w @ x[::-1]), {"": (1, 4, 6)}),
    "there and back": (lambda w, x: w.T @ jnp.tanh(w @ x), {"": (1, 4, 6)}),
    "in jit and remat": (
        lambda w, x: jax.jit(lambda w, x: jax.checkpoint(lambda w: jnp.tanh((3.0 * w) @ x))(w.T))(w * 0.5, x[:4]),
        {"": (1, 6, 4)},
    ),
    "ensemble": (
        lambda w, x: jax.vmap(lambda w: jnp.tanh(w @ x[:2]))(w.reshape(3, 4, 2)),
        {"": (1, 12, 2)},
    ),
    "loop": (
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(w[:, :4] @ h), x[:4]),
        {"": (1, 4, 4)},
    ),
    "carried unchanged": (
        lambda w, x: jax.lax.scan(lambda c, _: ((2.0 * w[:, :4] @ c[0], c[1]), None), (x[:4], w), None, length=2)[0][0],
        {"": (1, 4, 4)},
    ),
    "over time": (_over_time, {"#0": (1, 4, 4), "#1": (4, 1, 1)}),
    "nested scans": (_nested, {"": (4, 2, 2)}),
    "one flat vector": (_flat, {"#0": (1, 2, 4), "#1": (1, 3, 5)}),
    "branch by the example": (
        lambda w, x: jax.lax.cond(x[0] > 0, lambda: w @ x, lambda: jnp.tanh(w @ x[::-1]) * x[1]),
        {"": (1, 4, 6)},
    ),
    "branch in a loop": (
        lambda w, x: jax.lax.fori_loop(
            0, 3, lambda i, h: jax.lax.cond(i % 2 == 0, lambda: jnp.tanh(w[:, :4] @ h), lambda: h + w[:, 4]), x[:4]
        ),
        {"#0": (1, 4, 4), "#1": (1, 4, 1)},
    ),
    "on a constant": (lambda w, x: jnp.tanh(w @ jnp.arange(6.0)) * x[:4], {"": (1, 4, 6)}),
}  # fmt: skip


ALWAYS = (
    "scaled, cast, transposed",
    "scaled by data",
    "a part in three",
    "there and back",
    "in jit and remat",
    "carried unchanged",
    "over time",
    "nested scans",
    "one flat vector",
    "branch by the example",
    "on a constant",
)


@pytest.mark.parametrize("name", sweep(DISGUISES, always=ALWAYS))
def test_disguises(name, key):
    model_fn, expected = DISGUISES[name]
    layers = agree(model_fn, normal(KEY, 4, 6), normal(key, 3, 6), key)
    assert not layers.fallbacks
    if expected is not None:
        assert shapes(layers) == expected


def test_same_part_under_two_names_is_one_block(key):
    """A slice and the reshape of a slice with the same coordinates; a transposed one swaps its factors."""

    def model_fn(w, x):
        return w[:, :4] @ x[:4] + w.reshape(4, 3, 2)[:, :2].reshape(4, 4) @ x[2:] + x[:4] @ w[:, :4]

    (group,) = agree(model_fn, normal(KEY, 4, 6), normal(key, 3, 6), key).groups
    assert [site.transposed for site in group.sites] == [False, False, True]
