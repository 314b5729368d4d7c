"""Losses of a likelihood: their Hessian's root against `jax.hessian`, their draws against the distribution."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax.operators as ops
from helpers.quick import quick

LABELS = jnp.array([[2, -1], [0, 1]])
SOFT = jnp.array([[[0.2, 0.3, 0.5], [0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]])
# Loss, shape of the output, target.
CASES = {
    "squared": (ops.SquaredError(), (2, 3), jnp.arange(6.0).reshape(2, 3)),
    "squared, scalar": (ops.SquaredError(), (), jnp.array(2)),
    "softmax": (ops.SoftmaxCrossEntropy(), (3,), jnp.array(1)),
    "softmax, tokens, padding": (ops.SoftmaxCrossEntropy(), (2, 2, 3), LABELS),
    "softmax, probabilities": (ops.SoftmaxCrossEntropy(), (2, 2, 3), SOFT),
    "binary": (ops.BinaryCrossEntropy(), (2, 2), jnp.array([[0, 1], [1, 1]])),
    "poisson": (ops.PoissonLoss(), (3,), jnp.array([0, 2, 5])),
}
every_loss = pytest.mark.parametrize("name", CASES)


def _output(shape, key, dtype=jnp.float64):
    return 0.5 * jax.random.normal(key, shape, dtype)


@every_loss
def test_root_and_draws_have_the_hessian_as_second_moment(name, key):
    """The root to rounding; 20 000 draws within five standard errors, their mean (Bartlett) too; float32 as well."""
    loss, shape, target = CASES[name]
    output = _output(shape, key)
    keys = jax.random.split(jax.random.fold_in(key, 1), 20_000)

    @quick
    def both(output, narrow, keys):
        drawn = jax.vmap(lambda key: loss.sample(output, target, key))(keys)
        in_float32 = loss.hessian_root(narrow, target), loss(narrow, target)
        return loss.hessian_root(output, target), jax.hessian(loss)(output, target), drawn, in_float32

    root, hessian, draws, (narrow_root, narrow) = both(output, output.astype(jnp.float32), keys)
    assert root.shape[1:] == shape and root.dtype == jnp.float64
    assert narrow_root.dtype == jnp.float32 and narrow.dtype == jnp.float32
    root, truth = (
        np.asarray(root).reshape(len(root), -1),
        np.asarray(hessian).reshape(output.size, output.size),
    )
    np.testing.assert_allclose(root.T @ root, truth, atol=1e-14)
    np.testing.assert_allclose(np.asarray(narrow_root).reshape(root.shape), root, atol=1e-6)
    draws = np.asarray(draws).reshape(len(keys), -1)
    products = draws[:, :, None] * draws[:, None, :]
    error = products.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(products.mean(0) - truth) <= 5 * error + 1e-12)
    assert np.all(np.abs(draws.mean(0)) <= 5 * draws.std(0) / np.sqrt(len(keys)) + 1e-12)


def test_draws_are_gradients_at_targets(key):
    """Of the loss itself: each draw is its gradient at a label, a bit, a count."""
    output = _output((3,), key)
    at = {
        ops.SoftmaxCrossEntropy(): [jnp.array(c) for c in range(3)],
        ops.BinaryCrossEntropy(): [jnp.array([a, b, c]) for a in (0, 1) for b in (0, 1) for c in (0, 1)],
    }
    for loss, targets in at.items():
        gradients = np.stack([jax.grad(loss)(output, target) for target in targets])
        draw = loss.sample(output, targets[0], key)
        assert np.min(np.max(np.abs(gradients - draw), axis=1)) < 1e-14
    count = jnp.exp(output) - ops.PoissonLoss().sample(output, jnp.zeros(3), key)
    np.testing.assert_allclose(count, np.round(count), atol=1e-12)


def test_draws_of_many_classes(key):
    """In two stages, of classes that fill no whole number of blocks: frequencies, and none of probability zero."""
    loss, classes, number = ops.SoftmaxCrossEntropy(), 75, 20_000
    logits = _output((classes,), key).at[::4].set(-jnp.inf)
    p = np.asarray(jax.nn.softmax(logits))
    keys = jax.random.split(jax.random.fold_in(key, 1), number)
    draws = quick(jax.vmap(lambda key: loss.sample(logits, jnp.array(1), key)))(keys)
    drawn = np.round(p - np.asarray(draws))
    assert np.all(drawn.sum(1) == 1) and np.all(drawn[:, p == 0] == 0)
    assert np.all(np.abs(drawn.mean(0) - p) <= 5 * np.sqrt(p / number))


def test_extreme_logits():
    """Far out nothing is NaN, and a small Hessian is not rounded to zero."""
    loss, logits = ops.BinaryCrossEntropy(), jnp.array([80.0, -80.0])
    root = loss.hessian_root(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(jnp.diagonal(root) ** 2, np.exp([-80.0, -80.0]), rtol=1e-12)
    assert float(loss(logits, jnp.array([1, 0]))) < 1e-30
    far = jnp.array([1000.0, 0.0])
    assert np.all(np.isfinite(ops.SoftmaxCrossEntropy().hessian_root(far, jnp.array(0))))


def test_labels_out_of_range_are_not_plausible():
    loss, logits = ops.SoftmaxCrossEntropy(), jnp.zeros(3)
    assert np.isnan(loss(logits, jnp.array(3)))
    assert float(loss(logits, jnp.array(-1))) == 0.0


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (ops.SquaredError(), jnp.zeros(2)),
        (ops.BinaryCrossEntropy(), jnp.zeros((3, 1))),
        (ops.PoissonLoss(), jnp.zeros(())),
        (ops.SoftmaxCrossEntropy(), jnp.zeros(2)),
        (ops.SoftmaxCrossEntropy(), jnp.zeros(3, int)),
    ],
)
def test_targets_of_another_shape_are_refused(loss, target):
    with pytest.raises(ValueError, match="shape"):
        loss(jnp.zeros(3), target)


def test_a_loss_of_your_own(key):
    """The three methods are enough for every operator."""

    class Scaled(ops.AbstractLoss):
        precision: float

        def __call__(self, output, target):
            return 0.5 * self.precision * jnp.sum((output - target) ** 2)

        def hessian_root(self, output, target):
            return jnp.sqrt(self.precision) * jnp.eye(output.size, dtype=output.dtype)

        def sample(self, output, target, key):
            return jnp.sqrt(self.precision) * jax.random.normal(key, output.shape, output.dtype)

    w, x, y = _output((2, 3), key), _output((4, 3), key), jnp.zeros((4, 2))
    model_fn = lambda w, x: w @ x
    matrix = quick(lambda w: ops.kfac(model_fn, Scaled(3.0), w, x, y).as_matrix())(w)
    exact = 3.0 * np.kron(np.eye(2), np.asarray(x.T @ x) / 4)
    np.testing.assert_allclose(matrix, exact, atol=1e-12)
    assert isinstance(Scaled(1.0), eqx.Module)
