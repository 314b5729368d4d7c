"""Solutions of inner problems that are known in closed form: how many, of which kind, with which curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from curvax.diagnostics import check_solution
from helpers.dense import rotated

BFGS, NEWTON = optx.BFGS(1e-9, 1e-9), optx.Newton(1e-10, 1e-10)
total = lambda theta, phi, batch: jnp.sum(theta)  # noqa: E731


def look(inner, phi, theta0, solver, **options):
    found = check_solution(
        cx.Bilevel(inner=inner, outer=options.pop("outer", total)),
        phi,
        theta0,
        inner_solver=solver,
        printed=False,
        **{"key": jax.random.key(0), **options},
    )
    assert ("NOT OK: " in str(found)) != found.ok
    return found


def column(found, name):
    return [getattr(row, name) for row in found.rows]


def well(w, lam, _):
    return jnp.sum((w**2 - 1) ** 2) + lam * jnp.sum(w**2)


def test_two_minima_and_the_maximum_between_them(capsys):
    """(w² − 1)² + w²/2 has minima at ±√¾ of curvature 6, and a maximum at 0 of curvature −3."""
    found = look(well, jnp.array(0.5), jnp.array([0.3]), BFGS)
    assert not found.ok and found.num_failed == 0 and sum(column(found, "count")) == 8
    assert sorted(column(found, "from_theta0")) == [False, True]
    np.testing.assert_allclose(sorted(column(found, "outer_loss")), [-(0.75**0.5), 0.75**0.5])
    np.testing.assert_allclose(column(found, "inner_loss"), 7 / 16)
    np.testing.assert_allclose([found.rows[0].smallest, found.rows[0].largest], 6)
    assert column(found, "kind") == ["strict minimum"] * 2 and found.monotonicity < 0
    assert "2 distinct solutions" in found.summary[0] and any("not convex" in line for line in found.summary)
    assert not capsys.readouterr().out
    stuck = look(well, jnp.array(0.5), jnp.array([0.0]), BFGS, num_starts=1)
    assert column(stuck, "kind") == ["no minimum"] and not stuck.ok
    np.testing.assert_allclose([stuck.rows[0].smallest, stuck.rows[0].outer_loss], [-3, 0])
    assert stuck.summary[0] == "the start leads to one solution." and "indefinite" in stuck.summary[1]


def shifted(theta, phi, data):
    v = jnp.concatenate([theta["a"].ravel(), theta["b"]]) - phi * data[1]
    return v @ data[0] @ v / 2


@pytest.mark.parametrize("dense_size", [512, 0])
def test_strictly_convex_and_a_saddle(rng, dense_size):
    """Gradient descent contracts by (λmax − λmin)/(λmax + λmin); every pair is between the two curvatures."""
    values, target = np.linspace(1.0, 10.0, 13), jnp.asarray(rng.standard_normal(13))
    theta0 = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(1), "none": None, "name": "text"}
    rest = {"outer": lambda theta, phi, _: theta["b"][0], "dense_size": dense_size}

    def run(phi, matrix, starts):
        data = jnp.asarray(matrix), target
        return look(shifted, jnp.array(phi), theta0, BFGS, inner_data=data, num_starts=starts, **rest)

    found = run(2.0, rotated(values, rng), 3)
    assert found.ok and column(found, "kind") == ["strict minimum"] and column(found, "count") == [3]
    row = found.rows[0]
    np.testing.assert_allclose([row.smallest, row.largest, row.contraction], [1, 10, 9 / 11], rtol=1e-9)
    np.testing.assert_allclose(row.theta["b"][0], 2 * target[-1], rtol=1e-6)
    assert row.theta["name"] == "text" and row.theta["none"] is None
    assert row.followed is (True if dense_size else None)
    assert 1 <= found.monotonicity <= 10 and 0 < found.lipschitz <= 9 / 11 * (1 + 1e-9)
    assert any("strictly convex" in line for line in found.summary)
    # Nowhere to go from θ = 0, which is no minimum.
    saddle = run(0.0, rotated(values - 2, rng), 1)
    assert column(saddle, "kind") == ["no minimum"] and saddle.rows[0].smallest == pytest.approx(-1)


def test_a_family_of_minima(rng):
    """Fewer equations than unknowns: all residuals are zero, and the outer loss is anything."""
    matrix, traces = jnp.asarray(rng.standard_normal((3, 5))), []

    def inner(t, p, _):
        traces.append(None)
        return jnp.sum((matrix @ t - p) ** 2) / 2

    found = look(inner, jnp.ones(3), jnp.zeros(5), BFGS, num_starts=4)
    assert (
        not found.ok and column(found, "kind") == ["singular"] * 4 and column(found, "followed") == [True] * 4
    )
    sizes = np.linalg.svd(np.asarray(matrix))[1]
    np.testing.assert_allclose(column(found, "largest"), sizes[0] ** 2)
    np.testing.assert_allclose(column(found, "smallest"), 0, atol=1e-13)
    first = next(row for row in found.rows if row.from_theta0)
    np.testing.assert_allclose(first.theta, np.linalg.pinv(matrix) @ np.ones(3), rtol=1e-6)
    assert np.ptp(column(found, "outer_loss")) > 0.1 and "family" in found.summary[0]
    assert "TruncatedSpectrum" in found.summary[1] and found.monotonicity == 0
    seen = len(traces)
    look(inner, 2 * jnp.ones(3), jnp.ones(5), BFGS, num_starts=2)
    assert len(traces) == seen


def test_a_minimum_that_cannot_be_followed():
    """θ = φ^{1/3} at φ = 0, where its derivative is infinite; at φ = 1 all is well."""
    inner = lambda t, p, _: jnp.sum(t**4) / 4 - p * jnp.sum(t)  # noqa: E731
    found = look(inner, jnp.array(0.0), jnp.array([0.0]), BFGS, num_starts=1)
    assert column(found, "kind") == ["singular"] and column(found, "followed") == [False]
    assert "cannot be followed" in found.summary[1]
    well_defined = look(inner, jnp.array(1.0), jnp.array([0.5]), BFGS, num_starts=2)
    assert well_defined.ok and well_defined.rows[0].smallest == pytest.approx(3)


AFFINE = cx.FixedPoint(lambda t, p, w: w @ t + p)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_affine_map(dtype):
    """θ ← Wθ + φ, far from normal: it converges at the rate of W's eigenvalues, and contracts by its norm."""
    matrix = np.array([[0.5, 0.9, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, -0.7]])
    run = lambda phi, matrix, starts: look(  # noqa: E731
        AFFINE, jnp.asarray(phi, dtype), jnp.zeros(3, dtype), optx.Newton(1e-5, 1e-5),
        inner_data=jnp.asarray(matrix, dtype), num_starts=starts,
    )  # fmt: skip
    found, tolerance = run(1.0, matrix, 6), 1e-9 if dtype == np.float64 else 1e-4
    assert found.ok and column(found, "kind") == ["attracting"] and np.isnan(found.rows[0].inner_loss)
    np.testing.assert_allclose(found.rows[0].contraction, 0.7, rtol=tolerance)
    np.testing.assert_allclose(
        found.rows[0].theta, np.linalg.solve(np.eye(3) - matrix, np.ones(3)), rtol=1e-5
    )
    sizes = np.linalg.svd(np.eye(3) - matrix)[1]
    np.testing.assert_allclose([found.rows[0].smallest, found.rows[0].largest], sizes[[2, 0]], rtol=tolerance)
    assert 0.7 < found.lipschitz <= np.linalg.norm(matrix, 2) * (1 + tolerance)
    # θ ← 2θ − 3 has the fixed point 3, and moves away from it.
    found = run(-3.0, 2 * np.eye(3), 3)
    assert found.ok and column(found, "kind") == ["repelling"]
    row = found.rows[0]
    figures = [row.contraction, found.lipschitz, found.monotonicity, row.smallest, row.outer_loss]
    np.testing.assert_allclose(figures, [2, 2, -1, -1, 9], rtol=tolerance)
    assert any("repelling" in line for line in found.summary)
    assert any("no contraction" in line for line in found.summary)


POLYNOMIAL = cx.Root(lambda t, c, data: data[0] * t**3 + data[1] * t**2 + data[2] * t - c)
CUBIC, SQUARE = (jnp.array(data) for data in ([1.0, 0.0, -1.0], [0.0, 1.0, 0.0]))


def roots(level, start, data, **options):
    return look(POLYNOMIAL, jnp.array(level), jnp.array([start]), NEWTON, inner_data=data, **options)


def test_three_roots_and_where_two_of_them_meet():
    """t³ − t − c: the slopes at −1, 0, 1 are 2, −1, 2; at c = 2/√27 two roots meet at −1/√3."""
    found = roots(0.0, 0.2, CUBIC, num_starts=12, spread=3.0)
    assert not found.ok and column(found, "kind") == ["regular"] * 3
    slopes = {round(row.outer_loss): row.smallest for row in found.rows}
    assert slopes == pytest.approx({-1: 2.0, 0: -1.0, 1: 2.0})
    assert np.isnan(found.lipschitz) and np.isnan(found.rows[0].contraction)
    for level, start, data, where in ((2 / 27**0.5, -0.5, CUBIC, -(3**-0.5)), (0.0, 1.0, SQUARE, 0.0)):
        meeting = roots(level, start, data, num_starts=1)
        assert column(meeting, "kind") == ["degenerate"] and not meeting.ok
        assert meeting.rows[0].outer_loss == pytest.approx(where, abs=1e-6)
        assert "several solutions meet" in meeting.summary[1]


def test_no_root_and_a_solver_that_stops_early():
    """t² + 1 has no zero, not even where its slope is zero; a lazy solver is not believed."""
    for start in (0.0, 0.7):
        none = roots(-1.0, start, SQUARE, num_starts=2)
        assert not none.ok and none.rows == () and none.num_failed == 2
        assert "no solution was reached from any of 2 starts" in str(none)
    lazy = optx.GradientDescent(1e-3, rtol=0.1, atol=0.1)
    assert look(well, jnp.array(0.5), jnp.array([0.3]), lazy, num_starts=1).num_failed == 1


def test_wrong_arguments():
    problem = cx.Bilevel(inner=well, outer=total)
    rest = {"inner_solver": BFGS, "key": jax.random.key(0)}
    args = problem, jnp.array(0.5), jnp.ones(1)
    with pytest.raises(TypeError, match="`problem` must be a `cx.Bilevel`, got function"):
        check_solution(well, *args[1:], **rest)
    with pytest.raises(ValueError, match="`num_starts` must be an integer of at least 1, found 0"):
        check_solution(*args, **rest, num_starts=0)
    with pytest.raises(ValueError, match="`spread` must be at least 0, found -1"):
        check_solution(*args, **rest, spread=-1.0)
    with pytest.raises(TypeError, match="`inner_solver` must be an Optimistix minimiser"):
        check_solution(*args, inner_solver=NEWTON, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`theta0` holds NaN"):
        check_solution(*args[:2], jnp.array([jnp.nan]), **rest)
