"""Equinox models: every parameter has a site, and every gradient of every example comes out of the sites."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from helpers.captured import agree, kinds, normal, shapes
from helpers.sweep import sweep

KEY = jax.random.key(0)
F64 = {"dtype": jnp.float64, "key": KEY}


def _scanned(cell, state):
    return lambda x: jax.lax.scan(lambda h, x_t: (cell(x_t, h), None), state, x)[0]


class Block(eqx.Module):
    """Normalisations around a product."""

    before: eqx.nn.LayerNorm
    linear: eqx.nn.Linear
    after: eqx.nn.RMSNorm
    slope: eqx.nn.PReLU

    def __call__(self, x):
        return self.after(self.slope(self.linear(self.before(x))))


# Model, function of it, inputs of three examples, kinds of sites, blocks; what is None is not checked.
CASES = {
    "mlp": (
        eqx.nn.MLP(3, 2, 4, 1, **F64),
        lambda m, x: m(x),
        (3,),
        {".layers[0].weight": ["dense"], ".layers[1].weight": ["dense"]},
        {".layers[0].weight": (1, 4, 4), ".layers[1].weight": (1, 2, 5)},
    ),
    "conv1d": (
        eqx.nn.Conv1d(2, 3, 3, dilation=2, **F64),
        lambda m, x: m(x),
        (2, 8),
        {".weight": ["convolution"]},
        {".weight": (1, 3, 7)},
    ),
    "conv2d": (
        eqx.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2, **F64),
        lambda m, x: m(x),
        (4, 5, 4),
        {".weight": ["convolution"]},
        {".weight": (2, 3, 13)},
    ),
    "conv3d": (
        eqx.nn.Conv3d(2, 2, 2, use_bias=False, **F64),
        lambda m, x: m(x),
        (2, 3, 4, 3),
        {".weight": ["convolution"]},
        {".weight": (1, 2, 16)},
    ),
    "depthwise": (
        eqx.nn.Conv2d(3, 3, 3, padding="SAME", groups=3, **F64),
        lambda m, x: m(x),
        (3, 4, 4),
        {".weight": ["convolution"]},
        {".weight": (3, 1, 10)},
    ),
    "transposed convolution": (
        eqx.nn.ConvTranspose1d(2, 3, 3, stride=2, **F64),
        lambda m, x: m(x),
        (2, 4),
        {".weight": ["convolution"]},
        {".weight": (1, 3, 7)},
    ),
    "attention": (
        eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, use_output_bias=True, **F64),
        lambda m, x: m(x, x, x),
        (5, 4),
        None,
        {
            ".query_proj.weight": (1, 4, 5),
            ".key_proj.weight": (1, 4, 4),
            ".value_proj.weight": (1, 4, 4),
            ".output_proj.weight": (1, 4, 5),
        },
    ),
    "gru": (
        eqx.nn.GRUCell(3, 2, **F64),
        lambda m, x: _scanned(m, jnp.zeros(2))(x),
        (4, 3),
        {".weight_ih": ["dense"], ".weight_hh": ["dense"], ".bias_n": ["bias"]},
        {".weight_ih": (1, 6, 4), ".weight_hh": (1, 6, 2), ".bias_n": (1, 2, 1)},
    ),
    "lstm": (
        eqx.nn.LSTMCell(3, 2, **F64),
        lambda m, x: _scanned(m, (jnp.zeros(2), jnp.zeros(2)))(x)[0],
        (4, 3),
        {".weight_ih": ["dense"], ".weight_hh": ["dense"], ".bias": ["bias"]},
        None,
    ),
    "normalisations": (
        Block(
            eqx.nn.LayerNorm(3, dtype=jnp.float64),
            eqx.nn.Linear(3, 4, **F64),
            eqx.nn.RMSNorm(4, dtype=jnp.float64),
            eqx.nn.PReLU(jnp.asarray(0.2)),
        ),
        lambda m, x: m(x),
        (3,),
        {
            ".before.weight": ["scale"],
            ".before.bias": ["bias"],
            ".linear.weight": ["dense"],
            ".after.weight": ["scale"],
            ".after.bias": ["bias"],
            ".slope.negative_slope": ["scale"],
        },
        None,
    ),
    "group norm": (
        eqx.nn.GroupNorm(2, 4, dtype=jnp.float64),
        lambda m, x: m(x),
        (4, 3),
        {".weight": ["scale"], ".bias": ["bias"]},
        None,
    ),
}


RARELY = ("lstm", "group norm", "transposed convolution")


@pytest.mark.parametrize("name", sweep(CASES, always=[name for name in CASES if name not in RARELY]))
def test_every_gradient_of_every_example(name, key):
    model, function, shape, expected_kinds, expected_shapes = CASES[name]
    layers = agree(function, model, normal(KEY, 3, *shape), key)
    assert not layers.fallbacks
    if expected_kinds is not None:
        assert kinds(layers) == expected_kinds
    if expected_shapes is not None:
        assert shapes(layers) == expected_shapes


EMBEDDINGS = {
    "tokens": (lambda m, x: jax.vmap(m)(x), (3, 4), ["embedding"]),
    "one token": (lambda m, x: m(x), (3,), ["embedding"]),
    "one-hot": (
        lambda m, x: jax.nn.one_hot(x, 5, dtype=jnp.float64) @ m.weight,
        (3, 4),
        ["embedding"],
    ),
    "tied": (lambda m, x: jnp.tanh(jax.vmap(m)(x)) @ m.weight.T, (3, 4), ["embedding", "dense"]),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name, key):
    function, shape, expected = EMBEDDINGS[name]
    layers = agree(function, eqx.nn.Embedding(5, 3, **F64), jax.random.randint(key, shape, 0, 5), key)
    (group,) = layers.groups
    assert [site.kind for site in group.sites] == expected and not group.fallback
    assert (group.block.row_factor, group.block.column_factor) == ("dense", "diagonal")
    assert group.block.shape == (1, 3, 5)
    if name == "tied":
        assert [site.transposed for site in group.sites] == [False, True]
        assert [site.cotangent_factor for site in group.sites] == ["dense", "diagonal"]


def test_keys_are_part_of_the_example(key):
    """Dropout: the mask of an example is drawn from its key."""
    model = eqx.nn.Sequential([eqx.nn.Linear(3, 8, **F64), eqx.nn.Dropout(0.5), eqx.nn.Linear(8, 2, **F64)])
    inputs = (normal(KEY, 3, 3), jax.random.split(key, 3))
    cotangents = normal(key, 3, 2)
    layers = agree(lambda m, x: m(x[0], key=x[1]), model, inputs, key)
    assert not layers.fallbacks
    import curvax as cx

    # The same with keys that are split by the library.
    statistic = cx.capture.SecondMoments()
    called = lambda m, x, key: m(x, key=key)
    alone = cx.capture.statistics(called, model, inputs[0], cotangents, statistic, key=key)
    found = cx.capture.statistics(lambda m, x: m(x[0], key=x[1]), model, inputs, cotangents, statistic)
    assert jax.tree.all(jax.tree.map(jnp.allclose, alone, found))
