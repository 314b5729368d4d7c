"""Flax models: linen and nnx, with the layers of a scan, and every gradient of every example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from helpers.captured import agree, kinds, normal, shapes

KEY = jax.random.key(0)
F64 = {"param_dtype": jnp.float64}


class Tied(nn.Module):
    """Tokens in, logits out, one table."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 3, **F64)
        return embed.attend(nn.tanh(embed(tokens)))


class Block(nn.Module):
    """A layer to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        return nn.LayerNorm(force_float32_reductions=False, **F64)(x + nn.tanh(nn.Dense(3, **F64)(x))), None


class Deep(nn.Module):
    """Layers stacked by a scan, each computed twice in reverse mode."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(2, **F64)(layers()(x, None)[0])


# Model, inputs of three examples, blocks by the last two names of their path.
CASES = {
    "dense": (
        nn.Sequential([nn.Dense(4, **F64), nn.relu, nn.Dense(2, **F64)]),
        normal(KEY, 3, 3),
        {"layers_0": (1, 4, 4), "layers_2": (1, 2, 5)},
    ),
    "convolution": (
        nn.Conv(4, (3, 2), strides=(1, 2), feature_group_count=2, **F64),
        normal(KEY, 3, 5, 4, 2),
        {"params": (2, 2, 7)},
    ),
    "attention": (
        nn.MultiHeadDotProductAttention(2, qkv_features=4, **F64),
        normal(KEY, 3, 3, 4),
        {name: (1, 4, 5) for name in ("key", "out", "query", "value")},
    ),
    "tied": (Tied(), jax.random.randint(KEY, (3, 4), 0, 5), {"Embed_0": (1, 3, 5)}),
    "scanned": (Deep(), normal(KEY, 3, 3), None),
}


@pytest.mark.parametrize("name", CASES)
def test_linen(name, key):
    model, inputs, expected = CASES[name]
    params = model.init(KEY, inputs[0])
    layers = agree(model.apply, params, inputs, key)
    assert not layers.fallbacks
    found = shapes(layers)
    if expected is not None:
        assert {path.split("'")[-4]: shape for path, shape in found.items()} == expected
    else:
        stacked = [shape for path, shape in found.items() if "scan" in path.lower()]
        assert sorted(stacked) == [(2, 3, 1), (2, 3, 1), (2, 3, 4)]


def test_nnx(key):
    """A module split in its graph and its parameters."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs, **F64), nnx.tanh, nnx.Linear(4, 2, rngs=rngs, **F64))
    graph, params = nnx.split(model)
    layers = agree(lambda params, x: nnx.merge(graph, params)(x), params, normal(KEY, 3, 3), key)
    assert sorted(shapes(layers).values()) == [(1, 2, 5), (1, 4, 4)] and not layers.fallbacks
    assert all(kind == ["dense"] for kind in kinds(layers).values())
