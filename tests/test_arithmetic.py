"""Inner products of pytrees and maps in chunks: what every solver is made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax._control import map_in_chunks, one_kernel
from curvax._pytree import _RUNNING_SUM_SIZE, _STACKED_SIZE, tree_gram, tree_products


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 5, _STACKED_SIZE + 2, *(n + 1 for n in _RUNNING_SUM_SIZE.values())])
def test_gram_matrix_of_trees(size, dtype, rng):
    vectors = rng.standard_normal((3, size + 5)).astype(dtype)

    def tree(v):
        return {"a": v[:size], "b": v[size : size + 4].reshape(2, 2), "c": v[size + 4], "none": None}

    trees = [tree(jnp.asarray(v)) for v in vectors]
    truth = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    scale = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
    found = np.asarray(jax.jit(tree_gram)(*trees), np.float64)
    assert jax.jit(tree_gram)(*trees).dtype == dtype

    assert np.max(np.abs(found - truth) / scale) < tolerance
    wanted = [(0, 0), (1, 2)]
    some = np.asarray(tree_gram(*trees, wanted=wanted), np.float64)
    kept = np.zeros((3, 3), bool)
    for i, j in wanted:
        kept[i, j] = kept[j, i] = True
    assert np.max(np.abs(some - truth)[kept] / scale[kept]) < tolerance
    for terms, (i, j) in zip(tree_products(trees, wanted), wanted, strict=True):
        assert abs(float(sum(terms)) - truth[i, j]) < tolerance * scale[i, j]
    many = jax.vmap(lambda s: tree_gram(jax.tree.map(lambda x: s.astype(dtype) * x, trees[0]), trees[1]))(
        jnp.arange(1.0, 3.0)
    )
    assert abs(float(many[1, 0, 1]) - 2 * truth[0, 1]) < 2 * tolerance * scale[0, 1]


def test_running_sums_lose_no_digits(rng):
    """At the largest sizes at which they are used: within ten roundings."""
    for itemsize, size in _RUNNING_SUM_SIZE.items():
        vector = jnp.asarray(rng.uniform(0.5, 1.5, size), {4: jnp.float32, 8: jnp.float64}[itemsize])
        truth = math.fsum(float(x) ** 2 for x in vector)
        error = abs(float(jax.jit(tree_gram)(vector)[0, 0]) - truth) / truth
        assert error <= (3e-7 if itemsize == 4 else 3e-15)


def test_gram_matrix_of_mixed_precision():
    low, high = jnp.arange(3, dtype=jnp.bfloat16), jnp.arange(3, dtype=jnp.float32)
    np.testing.assert_array_equal(tree_gram((low, high), (low, high)), [[10.0, 10.0], [10.0, 10.0]])


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 13])
def test_map_in_chunks(count):
    traces = []

    xs = {"x": jnp.arange(2.0 * count).reshape(count, 2)}

    def square(row):
        traces.append(row)
        return {"sum": jnp.sum(row["x"]), "row": row["x"] ** 2}

    found = map_in_chunks(square, xs, 4)
    np.testing.assert_array_equal(found["row"], xs["x"] ** 2)
    np.testing.assert_array_equal(found["sum"], xs["x"].sum(axis=1))
    assert len(traces) == 1


def test_one_kernel_is_traced_once():
    """Also where the arguments are batched; numbers of Python are constants, each with a program of its own."""
    traces = []

    def fn(a, b, power):
        traces.append(power)
        return {"sum": a + b, "power": a**power}

    kernel = one_kernel(fn)
    both = jax.jit(lambda a, b: (kernel(a, b, 2), kernel(b, a, 2), kernel(a, b, 3)))
    first, second, third = both(jnp.asarray(3.0), jnp.asarray(4.0))
    assert [float(out["power"]) for out in (first, second, third)] == [9, 16, 27]
    assert float(first["sum"]) == 7
    assert traces == [2, 3]
    many = jax.vmap(lambda a: kernel(a, jnp.asarray(1.0), 2))(jnp.arange(3.0))
    np.testing.assert_array_equal(many["sum"], [1, 2, 3])
