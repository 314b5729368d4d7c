"""What flows into a site, against arrays that are written out and JAX's own convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.capture import second_moment
from curvax.capture._convolution_inputs import ConvolutionInputs, Window
from curvax.capture._inputs import DenseInputs, LookupInputs, NoInputs
from helpers.quick import quick
from helpers.sweep import sweep


@pytest.mark.parametrize("shape", [(5, 3), (4, 128), (7, 129), (3, 300), (2, 515)])
def test_second_moment(shape, rng):
    x = rng.normal(size=shape)
    np.testing.assert_allclose(second_moment(jnp.asarray(x)), x.T @ x, rtol=0, atol=1e-12)


def test_second_moment_of_half_precision_is_summed_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(4096, 2)), jnp.bfloat16)
    moment = second_moment(x)
    assert moment.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(moment, exact.T @ exact, rtol=1e-4, atol=1e-1)


def _agree(inputs, x, g, mask, rng, diagonal):
    """All methods, compiled together, against the array (B, T, in) written out."""
    assert inputs.shape == x.shape
    basis = rng.normal(size=(x.shape[2], 2))

    @quick
    def methods(inputs, g, mask, basis):
        sums = inputs.second_moment(mask), inputs.mean(mask)
        return inputs.array(), *sums, inputs.project(basis), inputs.outer(g)

    array, second, average, projected, gradients = methods(inputs, *map(jnp.asarray, (g, mask, basis)))
    np.testing.assert_allclose(array, x, atol=1e-12)
    moment = np.einsum("bti,btj,bt->ij", x, x, mask)
    moment = np.diag(moment) if diagonal else moment
    np.testing.assert_allclose(second, moment, atol=1e-10)
    mean = np.einsum("bti,bt->bi", x, mask) / np.maximum(mask.sum(1), 1)[:, None]
    np.testing.assert_allclose(average, mean, atol=1e-12)
    np.testing.assert_allclose(projected, x @ basis, atol=1e-12)
    np.testing.assert_allclose(gradients, np.einsum("bto,bti->boi", g, x), atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_dense_inputs(bias, diagonal, rng):
    values, g = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 2))
    mask = rng.random((3, 4)) < 0.6
    mask[0] = False
    x = np.concatenate([values, np.ones((3, 4, 1))], axis=2) if bias else values
    _agree(DenseInputs(jnp.asarray(values), bias, diagonal), x, g, mask, rng, diagonal)


def test_lookup_inputs(rng):
    """One-hot rows; an index outside of the table, on either side, is no row."""
    indices, g = np.array([[0, 3, 3], [5, -1, 2]]), rng.normal(size=(2, 3, 2))
    mask = np.array([[True, True, True], [True, True, False]])
    x = np.eye(7)[indices + 1][:, :, 1:6]
    _agree(LookupInputs(jnp.asarray(indices), 5, jnp.dtype("float64")), x, g, mask, rng, True)


def test_no_inputs(rng):
    g, mask = rng.normal(size=(3, 1, 4)), np.array([[True], [False], [True]])
    _agree(NoInputs(jnp.ones(3)), np.ones((3, 1, 1)), g, mask, rng, False)


# image, taps, strides, padding, spread, dilation, channels
WINDOWS = {
    "same": ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 3),
    "valid": ((7, 6), (3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 4),
    "causal, dilated": ((9,), (3,), (1,), ((4, 0),), (1,), (2,), 5),
    "strided": ((7, 6), (3, 3), (2, 1), ((1, 1), (0, 2)), (1, 1), (1, 1), 2),
    "transposed": ((4, 3), (3, 3), (1, 1), ((2, 2), (1, 2)), (2, 2), (1, 1), 2),
    "cropped": ((8,), (3,), (1,), ((-1, -2),), (1,), (1,), 4),
    "volume": ((3, 4, 3), (2, 3, 2), (1, 1, 1), ((0, 1), (1, 1), (0, 0)), (1, 1, 1), (1, 1, 1), 2),
    "wide": ((5,), (7,), (1,), ((3, 3),), (1,), (1,), 2),
    "one channel": ((5, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
}


def _patches(image, window):
    """Patches by JAX's own convolution with unit kernels: (M, *positions, *taps, C)."""
    whole = (*window.taps, image.shape[-1])
    kernel = np.eye(np.prod(whole)).reshape(*whole, -1)
    axes = range(len(window.taps))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, len(axes) + 1, *(i + 1 for i in axes)),
        (len(axes) + 1, len(axes), *axes),
        (0, len(axes) + 1, *(i + 1 for i in axes)),
    )
    out = jax.lax.conv_general_dilated(
        image, kernel, window.strides, window.padding, window.spread, window.dilation, numbers
    )
    return np.asarray(out).reshape(*out.shape[:-1], *whole)


@pytest.mark.parametrize(
    "name", sweep(WINDOWS, always=("same", "causal, dilated", "strided", "transposed", "volume"))
)
def test_convolution_inputs(name, rng):
    """Offsets and strips, sums of boxes, projections: against patches that are written out."""
    *window, channels = WINDOWS[name]
    window, channels_first = Window(*window), list(WINDOWS).index(name) % 2 == 1
    images = rng.normal(size=(2, 2, *window.image, channels))
    axes = len(window.taps)
    order = (axes, *range(axes)) if channels_first else tuple(range(axes + 1))
    patches = _patches(images.reshape(-1, *images.shape[2:]), window)
    positions = window.positions
    assert patches.shape[1 : axes + 1] == positions
    patches = patches.reshape(2, 2 * np.prod(positions), *window.taps, channels)
    patches = patches.transpose(0, 1, *(2 + i for i in order)).reshape(*patches.shape[:2], -1)
    bias = not channels_first
    x = np.concatenate([patches, np.ones((*patches.shape[:2], 1))], axis=2) if bias else patches
    g = rng.normal(size=(*x.shape[:2], 2))
    mask = np.ones(x.shape[:2], bool)
    mask[0] = False
    inputs = ConvolutionInputs(jnp.asarray(images), window, order, bias, False)
    np.testing.assert_array_equal(inputs.mask(jnp.asarray(g * mask[..., None])), mask)
    _agree(inputs, x, g, mask, rng, False)
    diagonal = ConvolutionInputs(jnp.asarray(images), window, order, bias, True)
    moment = np.einsum("bti,bti,bt->i", x, x, mask)
    found = quick(lambda inputs, mask: inputs.second_moment(mask))(diagonal, jnp.asarray(mask))
    np.testing.assert_allclose(found, moment, atol=1e-10)
    # By offsets, whatever the estimate of the cost says.
    strips = window.border
    if strips is not None:
        offsets = quick(lambda inputs, flat: inputs._ordered_matrix(inputs._by_offsets(flat, strips)))
        moment = offsets(inputs, jnp.asarray(images[1]))
        plain = np.einsum("ti,tj->ij", patches[1], patches[1])
        np.testing.assert_allclose(moment, plain, atol=1e-10)


@pytest.mark.parametrize("size", [4, 1], ids=["by offsets", "by patches"])
def test_convolution_inputs_a_few_images_at_a_time(size, rng, monkeypatch):
    """Five images, two at a time and the last one alone: the same moment."""
    window = Window((size, size), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    image = jnp.asarray(rng.normal(size=(5, 1, size, size, 4)))
    inputs = ConvolutionInputs(image, window, (0, 1, 2), True, False)
    mask = jnp.ones((5, size**2), bool)
    whole = inputs.second_moment(mask)
    patches = np.asarray(inputs.array()).reshape(-1, 37)
    np.testing.assert_allclose(whole, patches.T @ patches, atol=1e-12)
    copies = 13 if size == 4 else 9
    bytes_of_two = 2 * copies * image[0].size * 8
    monkeypatch.setattr("curvax.capture._convolution_inputs._MOST_BYTES", {"cpu": bytes_of_two})
    program = jax.make_jaxpr(lambda mask: inputs.second_moment(mask))(mask)
    assert [e.params["length"] for e in program.jaxpr.eqns if e.primitive.name == "scan"] == [3]
    np.testing.assert_allclose(inputs.second_moment(mask), whole, atol=1e-12)


def test_offsets_are_taken_where_they_pay():
    """A 3 × 3 kernel on a large image with channels; not one with strides, one channel or a small image."""

    def by_offsets(size, channels, stride=1):
        window = Window((size, size), (3, 3), (stride, stride), ((1, 1), (1, 1)), (1, 1), (1, 1))
        image = jnp.zeros((1, 1, size, size, channels))
        return ConvolutionInputs(image, window, (0, 1, 2), False, False)._strips_worth_it() is not None

    assert by_offsets(32, 32)
    assert not by_offsets(32, 1)
    assert not by_offsets(32, 32, stride=2)
    assert not by_offsets(1, 32)
