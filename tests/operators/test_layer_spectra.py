"""Bounded spectra, averages and new eigenvalues of K-FAC's blocks, against dense matrices, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax.operators as ops
from helpers.quick import quick

N = 6
SOFTMAX = ops.SoftmaxCrossEntropy()


def _model(p, x):
    return p["v"] @ jnp.tanh(p["w"] @ x + p["b"])


def _case(key):
    shapes = {"b": (4,), "v": (3, 4), "w": (4, 3)}
    params = {n: jax.random.normal(jax.random.fold_in(key, i), s) for i, (n, s) in enumerate(shapes.items())}
    params["idle"] = jnp.ones(2)  # a block of zeros
    return params, jax.random.normal(key, (N, 3)), jnp.arange(N) % 3


def _spectrum_changed(matrix, change):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * change(values)) @ vectors.T


@pytest.mark.parametrize("make", [ops.kfac, ops.ekfac], ids=["kfac", "ekfac"])
def test_bounded_spectra(make, key):
    params, x, y = _case(key)

    @quick
    def everything(params):
        curvature = make(_model, SOFTMAX, params, x, y)
        found = ops.truncated(curvature, 0.05), ops.conditioned(curvature, 50.0)
        return curvature.as_matrix(), [f.as_matrix() for f in found], found[0].inverse().as_matrix(), found[1]

    matrix, (truncated, conditioned), inverse, operator = everything(params)
    truth = _spectrum_changed(np.asarray(matrix), lambda values: np.maximum(values, 0.05))
    np.testing.assert_allclose(truncated, truth, atol=1e-12)
    np.testing.assert_allclose(inverse, np.linalg.inv(truth), atol=1e-9)
    added = np.diag(np.asarray(conditioned) - np.asarray(matrix))
    for name, block in operator.coordinates:
        values = np.asarray(operator.blocks[name].operator.values)
        if "idle" in name:
            assert not np.any(values)
            continue
        assert values.max() / values.min() < 50 * (1 + 1e-9) and block.size == values.size
    assert np.unique(np.round(added, 12)).size == 3  # one damping a block, and none where it is zero
    assert np.count_nonzero(np.abs(added) < 1e-13) == 2
    well = quick(lambda p: ops.conditioned(ops.kfac(_model, SOFTMAX, p, x, y).damped(1e3), 50.0).as_matrix())(
        params
    )
    plain = quick(lambda p: ops.kfac(_model, SOFTMAX, p, x, y).damped(1e3).as_matrix())(params)
    np.testing.assert_allclose(well, plain, atol=1e-9)


def test_moving_average_of_factors(key):
    """Factors are averaged, each with weights (1 − d)dᵗ⁻ˢ over their sum; carried by a scan."""
    params, x, y = _case(key)
    batches = jnp.stack([x, 2 * x, -x + 1])

    @quick
    def everything(params):
        make = lambda x: ops.kfac(_model, SOFTMAX, params, x, y)
        add = lambda average, x: (average.add(make(x)), None)
        average, _ = jax.lax.scan(add, ops.MovingAverage(make(x), 0.8), batches)
        return (
            average.operator,
            [make(x) for x in batches],
            ops.MovingAverage(make(x), 0.8).add(make(x)).operator,
            make(x),
        )

    average, each, once, first = everything(params)
    weights = 0.2 * 0.8 ** np.arange(2, -1, -1)
    weights /= weights.sum()
    factor = lambda c: np.asarray(c.blocks["['w']"].operator.right.matrix)
    np.testing.assert_allclose(
        factor(average), sum(w * factor(c) for w, c in zip(weights, each, strict=True)), rtol=1e-12
    )
    np.testing.assert_allclose(once.trace(), first.trace(), rtol=1e-12)
    assert average.tags == first.tags


def test_new_eigenvalues_in_old_bases(key):
    """Those of EKFAC on the same batch; on another one the diagonal of its blocks in these bases."""
    params, x, y = _case(key)
    other = jnp.flip(2 * x, axis=0)

    @quick
    def everything(params):
        model = _model, SOFTMAX, params
        factored, corrected = ops.kfac(*model, x, y), ops.ekfac(*model, x, y)
        again = ops.eigenvalue_correction(factored, *model, x, y)
        moved = ops.eigenvalue_correction(corrected, *model, other, y)
        blocks = ops.layer_blocks(*model, other, y)
        return again.as_matrix(), corrected, corrected.as_matrix(), moved, blocks

    again, corrected, matrix, moved, blocks = everything(params)
    np.testing.assert_allclose(again, matrix, atol=1e-12)
    for name in ("['w']", "['v']"):
        eigen, old = moved.blocks[name].operator, corrected.blocks[name].operator
        np.testing.assert_array_equal(eigen.left, old.left)
        basis = np.kron(np.asarray(eigen.left[0]), np.asarray(eigen.right[0]))
        dense = np.asarray(blocks.blocks[name].operator.matrix.matrix[0])
        np.testing.assert_allclose(
            np.diag(basis.T @ dense @ basis), np.asarray(eigen.values).ravel(), atol=1e-12
        )


def test_bad_arguments(key):
    params, x, y = _case(key)
    curvature = ops.kfac(_model, SOFTMAX, params, x, y)
    for call in (lambda: ops.truncated(curvature, 0.0), lambda: ops.conditioned(curvature, 1.0)):
        with pytest.raises(ValueError, match="must be above"):
            call()
    with pytest.raises(ValueError, match="known eigenvectors"):
        ops.truncated(ops.layer_blocks(_model, SOFTMAX, params, x, y), 0.1)
    with pytest.raises(ValueError, match="same model"):
        ops.eigenvalue_correction(curvature, _model, SOFTMAX, params | {"w": jnp.ones((4, 2))}, x[:, :2], y)
    with pytest.raises(ValueError, match="decay"):
        ops.MovingAverage(curvature, 1.0)
    with pytest.raises(ValueError, match="like those before"):
        ops.MovingAverage(curvature, 0.5).add(curvature.damped(0.1))
