"""A hyperparameter that has no influence is named; one that happens to have none now is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, problems, run
from helpers.sweep import sweep

RULE = cx.Implicit(rtol=1e-4, max_sweeps=5)


def influence_inner(theta, phi, batch):
    fit = 0.5 * jnp.mean((batch["x"] @ theta - batch["y"]) ** 2)
    return fit + 0.5 * jnp.sum(jnp.exp(phi["l2"]) * theta**2) + 0.0 * jnp.sum(phi.get("zero", jnp.zeros(())))


def influence_outer(theta, phi, batch):
    return 0.5 * jnp.mean((batch["x"] @ theta - batch["y"]) ** 2)


INFLUENCE = cx.Bilevel(inner=influence_inner, outer=influence_outer)


def _influence(phi, case, throw=False, **kwargs):
    return cx.hypergradient(
        INFLUENCE,
        phi,
        case.theta0,
        inner_solver=run.inner_solver("minimum"),
        rule=RULE,
        inner_data=case.inner_data,
        outer_data=case.outer_data,
        throw=throw,
        **kwargs,
    )


def test_unused_hyperparameter():
    """A leaf that no function reads. Control: the same without it."""
    case = problems.ridge("features")
    hg = _influence({"l2": case.phi, "rate": jnp.asarray(0.1)}, case)
    assert hg.result == cx.RESULTS.no_influence
    hg = _influence({"l2": case.phi}, case)
    assert hg.result == cx.RESULTS.successful
    assert compare.relative_error(hg.grad["l2"], case.truth.grad) <= 1e-4


def test_multiplied_by_zero():
    """Read, but without effect on the derivative in θ."""
    case = problems.ridge("features")
    hg = _influence({"l2": case.phi, "zero": jnp.ones(3)}, case)
    assert hg.result == cx.RESULTS.no_influence


def seen_inner(w, p, _):
    return jnp.sum((w - p["seen"]) ** 2)


def hidden_outer(w, p, _):
    return jnp.sum(w**2) + p.get("outer", 0.0) ** 2


OUTER_LEAF = cx.Bilevel(inner=seen_inner, outer=hidden_outer)


@pytest.mark.parametrize("rtol", sweep([1e-6, None], always=[1e-6]))
@pytest.mark.parametrize("hide", [jax.lax.stop_gradient, jnp.round, lambda x: x.astype(int).astype(x.dtype)])
def test_hidden_from_the_derivative(hide, rtol):
    """The inner loss depends on the leaf, its derivative does not. Control: a leaf for the outer loss."""
    problem = cx.Bilevel(
        inner=lambda w, p, _: seen_inner(w, p, _) + jnp.sum((jax.jit(hide)(p["other"]) * w) ** 2),
        outer=hidden_outer,
    )
    phi = {"seen": jnp.ones(3), "other": jnp.full(3, 1.3)}
    method = {"inner_solver": optx.BFGS(1e-8, 1e-8), "rule": cx.Implicit(rtol=rtol), "throw": False}
    hg = jax.jit(lambda p: cx.hypergradient(problem, p, jnp.zeros(3), **method))(phi)
    assert hg.result == cx.RESULTS.no_influence
    hg = cx.hypergradient(
        OUTER_LEAF, {"seen": jnp.ones(3), "outer": jnp.asarray(2.0)}, jnp.zeros(3), **method
    )
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(hg.grad["outer"], 4.0)


def test_derivative_that_happens_to_be_zero():
    """A mask that hides the leaf in this call: the derivative is zero, and that is the answer."""
    problem = cx.Bilevel(
        inner=lambda w, p, mask: jnp.sum((w - p["seen"] - mask * p["masked"]) ** 2),
        outer=lambda w, p, _: jnp.sum(w**2),
    )
    phi = {"seen": jnp.ones(3), "masked": jnp.ones(3)}
    hg = cx.hypergradient(
        problem,
        phi,
        jnp.zeros(3),
        inner_solver=optx.BFGS(1e-8, 1e-8),
        rule=cx.Implicit(rtol=1e-6),
        inner_data=jnp.zeros(3),
    )
    np.testing.assert_array_equal(hg.grad["masked"], 0.0)


def test_no_influence_names_the_leaf():
    """The text says which hyperparameter, and what to do."""
    case = problems.ridge("features")
    with pytest.raises(Exception, match="(?s)rate.*Unrolled|Unrolled.*rate"):
        _influence({"l2": case.phi, "rate": jnp.asarray(0.1)}, case, throw=True)


def test_always_zero_pixel_is_legitimate():
    """A penalty on a feature that is zero everywhere has no influence, element-wise; that is no failure."""
    case = problems.ridge("features")
    zeroed = {
        name: {**data, "x": data["x"].at[:, 3].set(0.0)}
        for name, data in {"inner": case.inner_data, "outer": case.outer_data}.items()
    }
    hg = cx.hypergradient(
        INFLUENCE,
        {"l2": case.phi},
        case.theta0,
        inner_solver=run.inner_solver("minimum"),
        rule=RULE,
        inner_data=zeroed["inner"],
        outer_data=zeroed["outer"],
        throw=False,
    )
    assert hg.result == cx.RESULTS.successful, hg.result
    assert abs(float(hg.grad["l2"][3])) <= 1e-30
    keep = np.arange(8) != 3
    x, y = (np.asarray(zeroed["inner"][k]) for k in "xy")
    xv, yv = (np.asarray(zeroed["outer"][k]) for k in "xy")
    matrix = x.T @ x / len(x) + np.diag(np.exp(np.asarray(case.phi)))
    theta = np.linalg.solve(matrix, x.T @ y / len(x))
    adjoint = np.linalg.solve(matrix, xv.T @ (xv @ theta - yv) / len(xv))
    expected = -np.exp(np.asarray(case.phi)) * theta * adjoint
    assert compare.relative_error(hg.grad["l2"][keep], expected[keep]) <= 1e-4


def test_only_through_the_start():
    """φ is the start of the inner solver: the implicit derivative is zero and that must be explained."""
    case = problems.definite()
    problem = cx.Bilevel(
        inner=lambda theta, phi, batch: case.inner(theta, jnp.zeros_like(theta), batch),
        outer=lambda theta, phi, batch: case.outer(theta, jnp.zeros_like(theta), batch),
    )
    start = jnp.ones_like(case.theta0)
    with pytest.raises(Exception, match="Unrolled"):
        cx.hypergradient(
            problem,
            start,
            start,
            inner_solver=run.inner_solver("minimum"),
            rule=RULE,
            inner_data=case.inner_data,
            outer_data=case.outer_data,
        )


def test_only_through_the_learning_rate():
    """φ is the learning rate of `Steps`: refused by the implicit rule, right under `Unrolled`."""
    case = problems.definite()
    problem = cx.Bilevel(
        inner=lambda theta, phi, batch: case.inner(theta, jnp.ones_like(theta), batch),
        outer=lambda theta, phi, batch: case.outer(theta, jnp.ones_like(theta), batch),
    )
    steps = cx.Steps(lambda phi: optax.sgd(phi), 5)
    arguments = {"inner_solver": steps, "inner_data": case.inner_data, "outer_data": case.outer_data}
    with pytest.raises(Exception, match="Unrolled"):
        cx.hypergradient(problem, jnp.asarray(0.1), case.theta0, rule=RULE, **arguments)
    hg = cx.hypergradient(problem, jnp.asarray(0.1), case.theta0, rule=cx.Unrolled(), **arguments)

    def value(rate):
        h, b = np.asarray(case.inner_data["H"]), np.asarray(case.inner_data["B"]) @ np.ones(8)
        theta = np.zeros(8)
        for _ in range(5):
            theta = theta - rate * (h @ theta - b - np.asarray(case.inner_data["b"]))
        return float(case.outer(jnp.asarray(theta), jnp.ones(8), case.outer_data))

    difference = (value(0.1 + 1e-5) - value(0.1 - 1e-5)) / 2e-5
    assert float(hg.grad) == pytest.approx(difference, rel=1e-6)
