"""Measures, hyperparameters and models against NumPy, SciPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score, roc_auc_score, root_mean_squared_error

from curvax.cli import _hyperparameters as hyper
from curvax.cli import _model
from curvax.cli._measures import auc, compare, measure
from curvax.cli._text import number, printable


def test_auc_with_ties_is_that_of_scikit_learn(rng):
    scores, positive = rng.integers(0, 8, 200).astype(float), rng.random(200) < 0.3
    assert np.isclose(auc(scores, positive), roc_auc_score(positive, scores))
    assert auc(np.arange(4.0), np.array([False, False, True, True])) == 1.0
    assert auc(np.zeros(4), np.ones(4, bool)) is None


def test_measures(rng):
    outputs, y = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    found = measure(outputs, y, 1.0)
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    assert found["accuracy"] == np.mean(shares.argmax(1) == y)
    assert np.isclose(found["log_loss"], log_loss(y, shares))
    values = rng.normal(size=50)
    found = measure(outputs[:, :1], values, 7.0)
    assert np.isclose(found["rmse"], 7 * root_mean_squared_error(values, outputs[:, 0]))
    assert np.isclose(found["r2"], r2_score(values, outputs[:, 0]))


def test_standard_error_of_the_rmse_is_that_of_many_draws(rng):
    draws = np.sqrt(np.mean(rng.normal(size=(4000, 200)) ** 2, axis=1))
    estimate = measure(rng.normal(size=(200, 1)), np.zeros(200), 1.0)["standard_error"]
    assert 0.7 < estimate / draws.std() < 1.4


def test_compare_counts_what_one_alone_has_right():
    y = np.array([0, 0, 1, 1])
    first, second = np.eye(2)[[0, 0, 1, 0]], np.eye(2)[[1, 0, 0, 1]]
    assert compare(first, second, y) == {"better": 2, "worse": 1}


def test_weights_have_mean_one(rng):
    logits, labels = jnp.asarray(rng.normal(size=20)), jnp.asarray(rng.integers(0, 3, 20))
    offsets = jnp.asarray(rng.normal(size=3))
    weights = hyper.example_weights({"sample-weights": logits, "class-weights": offsets}, labels, 20)
    expected = np.exp(np.asarray(offsets)[labels]) / (1 + np.exp(-np.asarray(logits)))
    assert np.allclose(weights, expected / expected.mean())


def test_penalties_multiply(rng):
    theta = _model.init((4, 3, 2), 0)
    phi = hyper.start(("l2", "l2-per-feature", "l2-per-layer", "l2-per-weight"), 5, 2, theta)
    assert hyper.count(phi) == {"l2": 1, "l2-per-feature": 4, "l2-per-layer": 2, "l2-per-weight": 18}
    first, second = hyper.penalties(phi, theta)
    assert np.allclose(first, hyper.START_PENALTY, rtol=1e-2)
    phi = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi)
    first, second = hyper.penalties(phi, theta)
    log = np.log(hyper.START_PENALTY) + phi["l2"] + phi["l2-per-layer"][0]
    log = log + phi["l2-per-feature"][:, None] + phi["l2-per-weight"][0]
    assert np.allclose(first, np.exp(log) + hyper.FLOOR_PENALTY)
    log = np.log(hyper.START_PENALTY) + phi["l2"] + phi["l2-per-layer"][1] + phi["l2-per-weight"][1]
    assert np.allclose(second, np.exp(log) + hyper.FLOOR_PENALTY)


def test_adam_of_one_scale_is_its_formula(rng):
    optimiser = hyper.adam_of_one_scale(0.3)
    state = optimiser.init({"w": jnp.zeros(5)})
    mean, square = np.zeros(5), 0.0
    for t in range(1, 6):
        g = rng.normal(size=5)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * np.mean(g**2)
        expected = -0.3 * (mean / (1 - 0.9**t)) / np.sqrt(square / (1 - 0.999**t))
        step, state = optimiser.update({"w": jnp.asarray(g)}, state)
        assert np.allclose(step["w"], expected)
    zero, _ = optimiser.update({"w": jnp.zeros(5)}, optimiser.init({"w": jnp.zeros(5)}))
    assert np.all(np.asarray(zero["w"]) == 0), "no gradient, no step, no NaN"


def train(batch, sizes, penalty):
    """The trained model at one L2 penalty."""
    phi = {"l2": jnp.log(jnp.asarray(penalty) / hyper.START_PENALTY)}
    return optx.minimise(
        lambda theta, _: _model.inner(theta, phi, batch),
        optx.BFGS(rtol=1e-10, atol=1e-10),
        _model.init(sizes, 0),
        max_steps=2000,
    ).value


def batch_of(x, y, weights):
    """A training batch; the mean of the weights must be 1."""
    return {"x": jnp.asarray(x), "y": jnp.asarray(y), "mask": jnp.asarray(weights), "start": []}


@pytest.mark.parametrize("penalty", [0.3, 0.01])
def test_models_are_those_of_scikit_learn(rng, penalty, monkeypatch):
    # Its intercept is free of penalty, and so is ours in the limit.
    monkeypatch.setattr(_model, "BIAS_PENALTY", 1e-9)
    n, total = 60, penalty + hyper.FLOOR_PENALTY
    x, mask = rng.normal(size=(n, 3)), rng.integers(0, 2, n).astype(float)
    y = rng.integers(0, 3, n)
    theta = train(batch_of(x, y, mask), (3, 3), penalty)
    reference = LogisticRegression(C=1 / (mask.sum() * total), tol=1e-10, max_iter=5000).fit(x, y, mask)
    assert np.allclose(theta[0]["weight"].T, reference.coef_, atol=2e-5)
    values = x @ np.array([1.0, -2.0, 0.5]) + rng.normal(size=n)
    theta = train(batch_of(x, values, mask), (3, 1), penalty)
    reference = Ridge(alpha=mask.sum() * total, tol=1e-12).fit(x, values, mask)
    assert np.allclose(theta[0]["weight"][:, 0], reference.coef_, atol=1e-6)


def test_text_for_people():
    assert [number(x) for x in (92760.4, 1234567.8, 0.0123456, 57.7391, 0.0, 1e12, 3e-9)] == [
        "92,760", "1,235,000", "0.01235", "57.74", "0", "1e+12", "3e-09",
    ]  # fmt: skip
    assert printable("a\x1b[31m\nb") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b"
    assert len(printable("x" * 100)) == 60
