"""Monitors against dense eigenvalues."""

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from curvax.diagnostics._spectrum import condition_number, spectral_radius
from curvax.diagnostics._stationarity import direction_quality, second_order_stationarity

SPD = lx.positive_semidefinite_tag


def spd(n, condition, seed=0, dtype=np.float64):
    """A dense symmetric matrix with eigenvalues from 1 to `condition`, rotated."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return jnp.asarray((q * np.geomspace(1.0, condition, n)) @ q.T, dtype)


def with_spectrum(blocks, seed=0):
    """A dense non-symmetric matrix with the given complex pairs (r, angle), through a random basis."""
    rng = np.random.default_rng(seed)
    n = 2 * len(blocks)
    matrix = np.zeros((n, n))
    for i, (r, angle) in enumerate(blocks):
        c, s = r * np.cos(angle), r * np.sin(angle)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    basis = rng.standard_normal((n, n)) + 2 * np.eye(n)
    return jnp.asarray(basis @ matrix @ np.linalg.inv(basis))


@pytest.mark.parametrize("seed", range(3))
def test_radius_of_complex_pair(seed):
    """A complex dominant pair, for which ratios of power iteration never settle."""
    rng = np.random.default_rng(seed)
    pairs = [(0.9, 1.1)] + [
        (r, a) for r, a in zip(rng.uniform(0, 0.8, 29), rng.uniform(0, 3, 29), strict=True)
    ]
    matrix = with_spectrum(pairs, seed)
    assert np.max(np.abs(np.linalg.eigvals(matrix))) == pytest.approx(0.9)
    found = spectral_radius(lambda th: matrix @ th, jnp.zeros(60))
    assert found.value == pytest.approx(0.9, abs=2e-2)
    assert found.num_matvecs == 40
    full = spectral_radius(lambda th: matrix @ th, jnp.zeros(60), num_steps=60)
    assert full.value == pytest.approx(0.9, rel=1e-6)


def test_radius_small_cases():
    rotation = jnp.array([[0.0, -0.9], [0.9, 0.0]])
    assert spectral_radius(lx.MatrixLinearOperator(rotation)).value == pytest.approx(0.9, rel=1e-9)
    opposite = lx.DiagonalLinearOperator(jnp.array([0.7, -0.7, 0.1]))
    found = spectral_radius(opposite)
    assert found.value == pytest.approx(0.7, rel=1e-9) and found.change == 0
    nilpotent = lx.MatrixLinearOperator(jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    assert spectral_radius(nilpotent).value < 1e-7
    assert spectral_radius(lx.DiagonalLinearOperator(jnp.zeros(3))).value == 0


def test_radius_of_a_nonlinear_map_over_a_pytree():
    theta = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.5), "none": jnp.zeros((0,))}
    fn = lambda th: {"a": jnp.tanh(2 * th["a"]), "b": jnp.sin(th["b"]) + th["a"][0], "none": th["none"]}
    truth = max(2 / np.cosh(0.6) ** 2, 2 / np.cosh(0.4) ** 2, np.cos(0.5))
    assert spectral_radius(fn, theta).value == pytest.approx(truth, rel=1e-6)


def test_radius_runs_in_jit_vmap_and_float32():
    matrices = jnp.stack([with_spectrum([(r, 0.7), (0.2, 0.3)], 1) for r in (0.5, 0.9, 1.3)])
    radius = jax.jit(jax.vmap(lambda m: spectral_radius(lx.MatrixLinearOperator(m)).value))
    np.testing.assert_allclose(radius(matrices), [0.5, 0.9, 1.3], rtol=1e-7)
    found = radius(matrices.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [0.5, 0.9, 1.3], rtol=1e-4)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
def test_condition_number_exact_when_space_is_exhausted(condition):
    op = lx.MatrixLinearOperator(spd(20, condition), SPD)
    found = condition_number(op, num_steps=20)
    assert found.after is None and bool(found.before.converged)
    assert found.before.condition == pytest.approx(condition, rel=1e-8 * condition)


def test_condition_number_is_a_lower_bound_and_says_so():
    op = lx.MatrixLinearOperator(spd(200, 1e6), SPD)
    found = condition_number(op, num_steps=15).before
    assert found.condition < 1e6 and not bool(found.converged)
    assert bool(condition_number(op, num_steps=200).before.converged)


def test_preconditioning_is_seen():
    a = spd(30, 1e2)
    scale = jnp.geomspace(1.0, 1e3, 30)
    badly = lx.MatrixLinearOperator(scale[:, None] * a * scale[None, :], SPD)
    found = condition_number(badly, lx.DiagonalLinearOperator(1 / scale**2), num_steps=30)
    dense = np.linalg.eigvals(np.diag(1 / scale**2) @ np.asarray(badly.as_matrix())).real
    assert found.after.condition == pytest.approx(dense.max() / dense.min(), rel=1e-6)
    assert found.before.condition > 100 * found.after.condition
    perfect = lx.MatrixLinearOperator(jnp.linalg.inv(a), SPD)
    found = condition_number(lx.MatrixLinearOperator(a, SPD), perfect).after
    assert found.condition == pytest.approx(1.0, abs=1e-6)


def test_condition_number_of_bad_operators():
    singular = condition_number(lx.DiagonalLinearOperator(jnp.array([0.0, 1.0, 2.0])))
    assert np.isinf(singular.before.condition)
    indefinite = condition_number(lx.DiagonalLinearOperator(jnp.array([-1.0, 1.0, 2.0])))
    assert np.isnan(indefinite.before.condition) and indefinite.before.smallest == pytest.approx(-1.0)
    good = lx.DiagonalLinearOperator(jnp.array([1.0, 2.0]))
    bad = condition_number(good, lx.DiagonalLinearOperator(jnp.array([1.0, -5.0]))).after
    assert np.isnan(bad.condition) and not bool(bad.converged)
    assert not bool(condition_number(lx.DiagonalLinearOperator(jnp.array([jnp.nan, 1.0]))).before.converged)
    skewed = condition_number(lx.MatrixLinearOperator(jnp.array([[1.0, 5.0], [0.0, 2.0]]))).before
    assert np.isnan(skewed.condition) and not bool(skewed.converged)
    # benign control: the identity
    identity = condition_number(good, lx.IdentityLinearOperator(good.in_structure()))
    assert identity.after.condition == pytest.approx(2.0)


def test_condition_number_float32_and_jit():
    op = lx.MatrixLinearOperator(spd(20, 1e2, dtype=np.float32), SPD)
    found = jax.jit(lambda: condition_number(op, num_steps=20).before.condition)()
    assert found.dtype == jnp.float32 and found == pytest.approx(1e2, rel=1e-3)


def quadratic(theta, matrix):
    return 0.5 * theta["x"] @ matrix @ theta["x"]


@pytest.mark.parametrize("smallest", [-0.5, 0.3])
def test_stationarity_tells_saddle_from_minimum(smallest):
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    spectrum = np.concatenate([[smallest], np.linspace(1, 5, 11)])
    matrix = jnp.asarray((q * spectrum) @ q.T)
    theta = {"x": jnp.asarray(rng.standard_normal(12)), "label": "not an array"}
    found = second_order_stationarity(quadratic, theta, matrix)
    assert found.gradient_norm == pytest.approx(np.linalg.norm(matrix @ theta["x"]))
    assert found.curvature_min == pytest.approx(smallest, abs=1e-8)
    assert found.curvature_max == pytest.approx(5.0, abs=1e-8)
    assert bool(found.negative_curvature) == (smallest < 0)
    d = found.direction["x"]
    assert d @ matrix @ d == pytest.approx(smallest, abs=1e-6)


def test_positive_newton_decrement_does_not_hide_a_saddle():
    """diag(1, -1) with g = e_1: gᵀH⁻¹g = 1 > 0, and yet a saddle."""
    matrix = jnp.diag(jnp.array([1.0, -1.0]))
    theta = {"x": jnp.array([1.0, 0.0])}
    assert bool(second_order_stationarity(quadratic, theta, matrix).negative_curvature)
    assert not bool(second_order_stationarity(quadratic, theta, jnp.abs(matrix)).negative_curvature)


def test_direction_quality():
    a = spd(8, 10.0)
    g = jnp.arange(1.0, 9.0)
    op = lx.MatrixLinearOperator(a)
    assert direction_quality(op, jnp.linalg.solve(a, g), g) < 1e-13
    assert direction_quality(op, jnp.zeros(8), g) == 1.0
    assert direction_quality(op, 2 * jnp.linalg.solve(a, g), g) == pytest.approx(1.0)


def test_wrong_use():
    op = lx.DiagonalLinearOperator(jnp.ones(2))
    for bad in [lambda: spectral_radius(op, jnp.ones(2)), lambda: spectral_radius(lambda x: x)]:
        with pytest.raises(TypeError, match="either a Lineax operator"):
            bad()
    with pytest.raises(TypeError, match="Lineax operator"):
        condition_number(jnp.eye(2))
    with pytest.raises(ValueError, match="square"):
        condition_number(lx.MatrixLinearOperator(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match="size 3"):
        condition_number(op, lx.DiagonalLinearOperator(jnp.ones(3)))
    with pytest.raises(ValueError, match="num_steps"):
        condition_number(op, num_steps=0)
    with pytest.raises(ValueError, match="like `theta`"):
        spectral_radius(lambda x: x[:1], jnp.ones(2))
    with pytest.raises(ValueError, match="no elements"):
        spectral_radius(lambda x: x, {})
    with pytest.raises(ValueError, match="no arrays"):
        second_order_stationarity(lambda x: jnp.zeros(()), {"name": "x"})


def test_random_start_is_the_callers():
    op = lx.MatrixLinearOperator(spd(50, 1e4), SPD)
    one, two = (condition_number(op, num_steps=5, key=jr.key(k)).before.condition for k in (1, 2))
    assert one != two
