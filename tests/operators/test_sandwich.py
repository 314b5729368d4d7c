"""The sandwich against closed forms of least squares, and simulated data."""

import jax
import jax.numpy as jnp
import numpy as np

import curvax.operators as ops
from helpers.quick import quick

line = lambda w, x: x @ w


def test_least_squares_is_whites_formula(rng):
    """(XᵀX)⁻¹ Xᵀdiag(r²)X (XᵀX)⁻¹, with errors of unequal variance."""
    x = rng.normal(size=(200, 3))
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=200) * np.exp(x[:, 0])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    found = quick(lambda w, x, y: ops.sandwich(line, ops.SquaredError(), w, x, y))(
        jnp.asarray(w), jnp.asarray(x), jnp.asarray(y)
    )
    gram = np.linalg.inv(x.T @ x)
    truth = gram @ (x.T * (y - x @ w) ** 2) @ x @ gram
    np.testing.assert_allclose(found.covariance, truth, rtol=1e-10)
    np.testing.assert_allclose(found.standard_errors, np.sqrt(np.diag(truth)), rtol=1e-10)
    outer = (x.T * (y - x @ w) ** 2) @ x
    np.testing.assert_allclose(found.model_based, np.linalg.inv(outer), rtol=1e-10)
    hessian = x.T @ x
    np.testing.assert_allclose(
        found.misspecification, np.linalg.norm(hessian - outer) / np.linalg.norm(hessian), rtol=1e-10
    )
    assert found.misspecification > 0.5 and int(found.unidentified) == 0


def test_of_the_right_model_both_are_one(key):
    """Bartlett: for logistic regression on its own data H ≈ F, so the sandwich is near the Cramér–Rao bound."""
    x = jax.random.normal(key, (20000, 2))
    w = jnp.array([1.0, -0.5])
    y = jax.random.bernoulli(jax.random.fold_in(key, 1), jax.nn.sigmoid(x @ w)).astype(jnp.int64)
    found = quick(lambda w: ops.sandwich(line, ops.BinaryCrossEntropy(), w, x, y))(w)
    assert found.misspecification < 0.05
    np.testing.assert_allclose(found.standard_errors, found.model_standard_errors, rtol=0.05)


def test_unidentified_directions_are_infinite(rng):
    """Two coefficients of the same column, and one of another: what is known of the sum is no help for each."""
    x = rng.normal(size=(50, 2))
    x = jnp.asarray(np.stack([x[:, 0], x[:, 0], x[:, 1]], axis=1))
    y = jnp.asarray(rng.normal(size=50))
    w = jnp.asarray(np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0])
    found = quick(lambda w: ops.sandwich(line, ops.SquaredError(), w, x, y))(w)
    assert int(found.unidentified) == 1
    assert np.isinf(found.standard_errors[:2]).all() and np.isfinite(found.standard_errors[2])
    nan = quick(lambda w: ops.sandwich(line, ops.SquaredError(), w, x, y))(w.at[0].set(jnp.nan))
    assert np.isnan(nan.standard_errors).all()
