"""Layouts and pieces against NumPy's own transpositions, reshapes and slices."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curvax.capture._layout import Layout, rearranged
from curvax.capture._piece import piece


def _factors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def rearrangements(draw):
    """An array, what it becomes by a few operations, and the layout that should say so (None if none can)."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    array = np.arange(np.prod(shape)).reshape(shape)
    layout, result = Layout.of(shape), array
    for _ in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["transpose", "slice", "reshape", "rev"]))
        if what == "transpose":
            order = draw(st.permutations(range(result.ndim)))
            layout, result = layout.transpose(order), result.transpose(order)
        elif what == "rev":
            axis = draw(st.integers(0, result.ndim - 1))
            layout, result = layout.reverse([axis]), np.flip(result, axis)
        elif what == "slice":
            axis = draw(st.integers(0, result.ndim - 1))
            start = draw(st.integers(0, result.shape[axis] - 1))
            end = draw(st.integers(start + 1, result.shape[axis]))
            step = draw(st.integers(1, 2))
            starts, ends, steps = [0] * result.ndim, list(result.shape), [1] * result.ndim
            starts[axis], ends[axis], steps[axis] = start, end, step
            layout = layout.slice(starts, ends, steps)
            result = result[tuple(slice(a, b, c) for a, b, c in zip(starts, ends, steps, strict=True))]
        else:
            first = draw(st.sampled_from(_factors(result.size)))
            second = draw(st.sampled_from(_factors(result.size // first)))
            shape = (first, second, result.size // first // second)
            layout, result = layout.reshape(shape), result.reshape(shape)
        if layout is None:
            break
    return array, result, layout


@settings(max_examples=200)
@given(rearrangements())
def test_layout_says_where_entries_lie(case):
    array, result, layout = case
    if layout is None:
        return
    assert layout.shape == result.shape
    flat = array.ravel()[layout.offset :]
    atoms = layout.atoms
    strides = [8 * stride for _, stride in atoms]
    seen = np.lib.stride_tricks.as_strided(flat, [size for size, _ in atoms], strides)
    np.testing.assert_array_equal(seen.reshape(result.shape), result)
    assert layout.merge().atoms == Layout(0, (layout.atoms,)).merge().atoms or len(layout.axes) > 1


@settings(max_examples=40)
@given(rearrangements())
def test_piece_takes_and_puts(case):
    """What is taken is the rearranged array, and `put` is the transpose of `take`."""
    array, result, layout = case
    cut = None if layout is None else piece(layout, array.size)
    if cut is None:
        return
    np.testing.assert_array_equal(cut.take(jnp.asarray(array)), result)
    expected = np.zeros(array.size, int)
    expected[result.ravel()] = result.ravel() + 1
    back = cut.put(jnp.asarray(result + 1), jax.ShapeDtypeStruct(array.shape, jnp.int64))
    np.testing.assert_array_equal(back, expected.reshape(array.shape))


def test_what_has_no_strides():
    """Rows of a transposed matrix that are cut unevenly; every other entry of an odd number."""
    assert Layout.of((2, 3)).transpose((1, 0)).reshape((2, 3)) is None
    assert Layout.of((2, 3)).transpose((1, 0)).reshape((6,)) is not None
    odd = Layout.of((5,)).slice([0], [5], [2])
    assert odd is not None and piece(odd, 5) is None
    even = Layout.of((6,)).slice([1], [6], [2])
    assert even is not None and piece(even, 6) is not None


def test_broadcasts_are_strides_of_zero():
    layout = Layout.of((3,)).broadcast((2, 3), (1,))
    assert layout.axes == (((2, 0),), ((3, 1),))
    assert layout.without_broadcasts().atoms == ((3, 1),)
    assert piece(layout, 3) is None


def test_what_only_moves_entries():
    """The operations that are views, one by one, as JAX writes them."""
    array = np.arange(24).reshape(2, 3, 4)

    def check(function):
        (equation,) = jax.make_jaxpr(function)(array).jaxpr.eqns
        layouts = rearranged(equation.primitive.name, equation.params, Layout.of(array.shape))
        for layout, result in zip(layouts, jax.tree.leaves(function(array)), strict=True):
            seen = np.lib.stride_tricks.as_strided(
                array.ravel()[layout.offset :],
                [n for n, _ in layout.atoms],
                [array.itemsize * s for _, s in layout.atoms],
            )
            np.testing.assert_array_equal(seen.reshape(result.shape), result)

    check(lambda x: jax.lax.split(x, (1, 3), 2))
    check(lambda x: jax.lax.rev(x, (0, 2)))
    check(lambda x: jax.lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 3)))
    check(lambda x: jax.lax.reshape(x, (4, 6)))
    check(lambda x: jax.lax.transpose(x, (2, 0, 1)))
    check(lambda x: jax.lax.broadcast_in_dim(x, (2, 5, 3, 4), (0, 2, 3)))
    check(lambda x: jax.lax.convert_element_type(x, jnp.int32))
    assert rearranged("sin", {}, Layout.of((2,))) is None
