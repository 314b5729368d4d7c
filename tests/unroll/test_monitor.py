"""What is said of a path: adjoint norms, clipping, explosion, chaos."""

import functools
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare, paths, problems
from helpers.problem import as_numpy

CASE = problems.MINIMA["condition 1e1"]()
DATA, OUTER = as_numpy(CASE.inner_data), as_numpy(CASE.outer_data)
PROBLEM = cx.Bilevel(inner=CASE.inner, outer=CASE.outer)


@functools.cache
def descent(rate, steps):
    return cx.Steps(optax.sgd(rate), steps)


def on_case(rule, rate, steps, **kwargs):
    return cx.hypergradient(
        PROBLEM,
        CASE.phi,
        CASE.theta0 + 0.5,
        inner_solver=descent(rate, steps),
        rule=rule,
        inner_data=CASE.inner_data,
        outer_data=CASE.outer_data,
        **kwargs,
    )


def adjoints(theta, rate, steps, clip=lambda v: v):
    """λ_n, λ_(n−1), …, λ_0 of gradient descent and what they give, by NumPy; `clip` before each step."""
    adjoint = OUTER["M"] @ (theta - OUTER["t"]) + OUTER["c"]
    norms, grad = [np.linalg.norm(adjoint)], OUTER["rho"] * np.asarray(CASE.phi)
    for _ in range(steps):
        grad = grad + rate * DATA["B"].T @ adjoint
        adjoint = adjoint - rate * DATA["H"] @ adjoint
        norms.append(np.linalg.norm(adjoint))
        adjoint = clip(adjoint)
    return norms[::-1], grad


@pytest.mark.parametrize(
    "rule", [cx.Unrolled("mixed", "sqrt"), cx.Unrolled("reverse")], ids=["mixed", "reverse"]
)
def test_norms_along_the_path(rule):
    """‖λ_i‖ and ‖∇g(θ_i)‖ by recursion; 7 steps do not fill their loops."""
    hg = on_case(rule, 0.3, 7)
    path = hg.stats.path
    norms, grad = adjoints(np.asarray(hg.theta), 0.3, 7)
    np.testing.assert_allclose(np.asarray(path.derivative_norms), norms, rtol=1e-12)
    assert compare.relative_error(hg.grad, grad) <= 1e-12
    theta, slopes = np.full(12, 0.5), []
    for _ in range(7):
        slope = DATA["H"] @ theta - DATA["B"] @ np.asarray(CASE.phi) - DATA["b"]
        slopes.append(np.linalg.norm(slope))
        theta = theta - 0.3 * slope
    np.testing.assert_allclose(np.asarray(path.gradient_norms), slopes, rtol=1e-12)
    assert int(path.num_steps) == int(hg.stats.num_inner_steps) == 7
    assert float(path.growth) == pytest.approx(max(norms) / norms[-1])
    assert "at θ_7" in path.describe()


def test_rate_is_the_spectral_radius_of_the_step_map():
    """max |1 − ηλ| of gradient descent, below and above 1."""
    values = np.linalg.eigvalsh(DATA["H"])
    for rate in (0.5 / values[-1], 2.4 / values[-1]):
        radius = np.max(np.abs(1 - rate * values))
        path = on_case(cx.Unrolled("mixed"), rate, 60, throw=False).stats.path
        assert float(path.rate) == pytest.approx(radius, rel=5e-3)


def test_norms_in_forward_mode():
    """‖dθ_i/dφ‖ by recursion."""
    path = on_case(cx.Unrolled("forward"), 0.3, 5).stats.path
    slope, norms = np.zeros_like(DATA["B"]), [0.0]
    for _ in range(5):
        slope = slope - 0.3 * DATA["H"] @ slope + 0.3 * DATA["B"]
        norms.append(np.linalg.norm(slope))
    np.testing.assert_allclose(np.asarray(path.derivative_norms), norms, rtol=1e-12)
    assert path.num_stored == 0 and "Sensitivity" in path.describe()


@pytest.mark.parametrize("kind", ["norm", "elements"])
def test_clipping(kind):
    """The clipped recursion by NumPy; how often it acted; nothing where the bound is out of reach."""
    norms, _ = adjoints(np.asarray(on_case(cx.Unrolled("mixed"), 0.3, 7).theta), 0.3, 7)
    if kind == "norm":
        bound = 0.6 * norms[-1]
        clip = optax.clip_by_global_norm(bound)
        by_numpy = lambda v: v * min(1.0, bound / np.linalg.norm(v))  # noqa: E731
    else:
        bound = 0.1 * norms[-1]
        clip = optax.clip(bound)
        by_numpy = lambda v: np.clip(v, -bound, bound)  # noqa: E731
    hg = on_case(cx.Unrolled("mixed", clip=clip), 0.3, 7)
    _, expected = adjoints(np.asarray(hg.theta), 0.3, 7, by_numpy)
    assert compare.relative_error(hg.grad, expected) <= 1e-12
    assert 0 < int(hg.stats.path.num_clipped) <= 7
    free = on_case(cx.Unrolled("mixed", clip=optax.clip_by_global_norm(1e6)), 0.3, 7)
    assert int(free.stats.path.num_clipped) == 0
    assert compare.relative_error(free.grad, adjoints(np.asarray(hg.theta), 0.3, 7)[1]) <= 1e-12


def test_adaptive_clipping_sees_the_parameters():
    """`optax.adaptive_grad_clip` compares with ‖θ‖: it acts, and the hypergradient becomes another."""
    plain = paths.hypergradient(cx.Unrolled("mixed"))
    hg = paths.hypergradient(cx.Unrolled("mixed", clip=optax.adaptive_grad_clip(0.01)))
    assert int(hg.stats.path.num_clipped) > 0
    assert compare.relative_error(hg.grad, plain.grad) > 1e-3


def test_clipping_has_no_state():
    with pytest.raises(ValueError, match="clip.*without state"):
        paths.hypergradient(cx.Unrolled("mixed", clip=optax.trace(0.9)))


def test_where_a_path_ceases_to_be_finite():
    """The step is named. Control: the same with a smaller rate."""
    assert on_case(cx.Unrolled("mixed"), 1.0, 30).result == cx.RESULTS.successful
    hg = on_case(cx.Unrolled("mixed"), 1e30, 30, throw=False)
    assert hg.result == cx.RESULTS.nonfinite
    finite = np.isfinite(np.asarray(hg.stats.path.gradient_norms))
    step = int(np.argmin(finite))
    assert 0 < step < 30 and finite[:step].all()
    assert f"not finite at step {step} of 30" in hg.stats.path.describe()
    with pytest.raises(RuntimeError, match=f"(?s)not finite at step {step} of 30.*clip"):
        on_case(cx.Unrolled("mixed"), 1e30, 30)


def test_where_a_derivative_ceases_to_be_finite():
    """A finite path through a point where the gradient has no derivative: √|x| at zero."""

    def inner(theta, phi, batch):
        return jnp.sum(jnp.where(theta > -1, (2 / 3) * jnp.abs(theta) ** 1.5 * phi, theta))

    problem = cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t))
    hg = cx.hypergradient(
        problem, jnp.ones(()), jnp.zeros(1), inner_solver=cx.Steps(optax.sgd(0.1), 4), rule=cx.Unrolled("mixed"),
        throw=False,
    )  # fmt: skip
    assert hg.result == cx.RESULTS.nonfinite
    assert "The path is finite; its derivative ceases to be at θ_3" in hg.stats.path.describe()


def logistic(theta, phi, batch):
    """A step of gradient descent with rate 1 on it is the logistic map θ ↦ φθ(1 − θ)."""
    return 0.5 * theta**2 - phi * (theta**2 / 2 - theta**3 / 3)


LOGISTIC = cx.Bilevel(inner=logistic, outer=lambda theta, phi, batch: theta)


@functools.cache
def logistic_map(rate, steps, mode):
    return cx.hypergradient(
        LOGISTIC,
        jnp.asarray(rate),
        jnp.asarray(0.3),
        inner_solver=descent(1.0, steps),
        rule=cx.Unrolled(mode),
        throw=False,
    )


def logistic_truth(rate, steps):
    """dθ_n/dφ of the same numbers in 200 digits."""
    with localcontext() as context:
        context.prec = 200
        phi, theta, slope = Decimal(rate), Decimal(0.3), Decimal(0)
        for _ in range(steps):
            slope = phi * (1 - 2 * theta) * slope + theta * (1 - theta)
            theta = phi * theta * (1 - theta)
        return float(slope)


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_a_chaotic_path_is_a_failure(mode):
    """r = 4: after 25 steps rounding is harmless and the derivative right, after 60 neither; r = 2.8: never."""
    early, late = logistic_map(4.0, 25, mode), logistic_map(4.0, 60, mode)
    assert early.result == cx.RESULTS.successful
    assert float(early.grad) == pytest.approx(logistic_truth(4.0, 25), rel=1e-5)
    assert late.result == cx.RESULTS.chaotic_path
    assert abs(float(late.grad) / logistic_truth(4.0, 60) - 1) > 1e-2
    assert float(late.stats.path.rounding) > 1e-2
    tame = logistic_map(2.8, 60, mode)
    assert tame.result == cx.RESULTS.successful
    assert float(tame.grad) == pytest.approx(logistic_truth(2.8, 60), rel=1e-10)


def test_no_influence():
    """A leaf that neither the losses nor the optimiser read; behind `stop_gradient`; one that only the rate reads."""

    def inner(theta, phi, batch):
        return 0.5 * jnp.sum((theta - phi["used"] - jax.lax.stop_gradient(phi["stopped"])) ** 2)

    problem = cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t**2))
    phi = {"used": jnp.ones(2), "rate": jnp.asarray(0.1), "unused": jnp.ones(3)}

    def run(phi, optimizer, **kwargs):
        solver = cx.Steps(optimizer, 3)
        return cx.hypergradient(
            problem, phi, jnp.zeros(2), inner_solver=solver, rule=cx.Unrolled("mixed"), **kwargs
        )

    stopped = {**phi, "stopped": jnp.ones(2)}
    with pytest.raises(RuntimeError, match=r"(?s)no influence.*\['stopped'\], \['unused'\]"):
        run(stopped, lambda p: optax.sgd(p["rate"]))

    def injected(p):
        return optax.chain(
            optax.inject_hyperparams(optax.sgd)(learning_rate=p["rate"]), optax.scale(p["unused"][0])
        )

    good = run({**phi, "stopped": 1}, injected)
    assert good.result == cx.RESULTS.successful
    assert float(good.grad["rate"]) != 0.0


def test_no_influence_without_a_step_that_reads_it():
    """Started at the optimum a rate has no influence, legitimately: no failure."""
    problem = cx.Bilevel(inner=lambda t, p, b: 0.5 * jnp.sum(t**2), outer=lambda t, p, b: jnp.sum(t))
    hg = cx.hypergradient(
        problem,
        jnp.asarray(0.1),
        jnp.zeros(2),
        inner_solver=cx.Steps(lambda p: optax.sgd(p), 3),
        rule=cx.Unrolled("mixed"),
    )
    assert hg.result == cx.RESULTS.successful and float(hg.grad) == 0.0
