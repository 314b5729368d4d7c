"""Optimisers that loop until a condition holds: derivatives in forward mode, and what the other modes say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare

RNG = np.random.default_rng(11)
MATRIX = jnp.asarray(np.diag([1.0, 3.0, 9.0]) + 0.2 * np.ones((3, 3)))
START = jnp.asarray(RNG.standard_normal(3))


def inner(theta, phi, batch):
    return 0.5 * theta @ (MATRIX @ theta) + jnp.sum(jnp.exp(phi["penalty"]) * theta**4) - jnp.sum(theta)


PROBLEM = cx.Bilevel(inner=inner, outer=lambda theta, phi, batch: jnp.sum((theta - 0.3) ** 2))
PHI = {"penalty": jnp.asarray([-1.0, 0.5, -0.4]), "rate": jnp.asarray(0.7)}


def backtracking(phi):
    return optax.chain(optax.sgd(phi["rate"]), optax.scale_by_backtracking_linesearch(8))


def lbfgs(phi):
    return optax.chain(optax.scale(phi["rate"] / 0.7), optax.lbfgs(memory_size=2))


@functools.cache
def solver(name):
    return cx.Steps({"backtracking": backtracking, "lbfgs": lbfgs}[name], 3)


def on_path(name, rule, phi=PHI):
    return cx.hypergradient(PROBLEM, phi, START, inner_solver=solver(name), rule=rule)


@functools.cache
def differences(name):
    """Central differences of the outer loss in every number of φ."""
    value = jax.jit(
        lambda phi: (
            cx.hypergradient(
                PROBLEM, phi, START, inner_solver=solver(name), rule=cx.Unrolled("forward")
            ).value
        )
    )
    found = {}
    for leaf in PHI:
        moved = [
            (value({**PHI, leaf: PHI[leaf] + unit}) - value({**PHI, leaf: PHI[leaf] - unit})) / 2e-6
            for unit in 1e-6 * np.eye(PHI[leaf].size).reshape(-1, *PHI[leaf].shape)
        ]
        found[leaf] = np.reshape(moved, PHI[leaf].shape)
    return found


@pytest.mark.parametrize("mode", ["mixed", "auto"])
def test_backtracking(mode):
    """The search holds its rate fixed, so that every mode has it: against finite differences."""
    hg = on_path("backtracking", cx.Unrolled(mode))
    assert hg.result == cx.RESULTS.successful
    for leaf, expected in differences("backtracking").items():
        assert compare.relative_error(hg.grad[leaf], expected) <= 1e-6, leaf


def test_lbfgs_with_its_line_search():
    """The derivative of the search's program, by forward mode through a plain loop."""

    def end(phi):
        optimizer, theta = lbfgs(phi), START
        state, loss = optimizer.init(theta), lambda theta: inner(theta, phi, None)
        for _ in range(3):
            value, slope = jax.value_and_grad(loss)(theta)
            moved, state = optimizer.update(slope, state, theta, value=value, grad=slope, value_fn=loss)
            theta = theta + moved
        return PROBLEM.outer(theta, phi, None)

    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jacfwd(end)(PHI)
    hg = on_path("lbfgs", cx.Unrolled())
    assert hg.result == cx.RESULTS.successful and hg.stats.path.mode == "forward"
    for leaf in PHI:
        assert compare.relative_error(hg.grad[leaf], expected[leaf]) <= 1e-9, leaf


def test_auto_goes_forward_where_there_is_no_reverse_mode():
    """With more hyperparameters than forward mode is the fastest for."""
    problem = cx.Bilevel(
        inner=lambda theta, phi, batch: 0.5 * theta @ (MATRIX @ theta) - phi[:3] @ theta * jnp.mean(phi),
        outer=PROBLEM.outer,
    )
    phi = jnp.linspace(0.5, 1.0, 40)
    with pytest.raises(ValueError, match=r'line search.*Unrolled\("forward"\)'):
        cx.hypergradient(problem, phi, START, inner_solver=solver_of_phi(), rule=cx.Unrolled("mixed"))
    hg = cx.hypergradient(problem, phi, START, inner_solver=solver_of_phi(), rule=cx.Unrolled())
    assert hg.stats.path.mode == "forward" and "loops" in hg.stats.path.reason


@functools.cache
def solver_of_phi():
    return cx.Steps(optax.lbfgs(memory_size=2), 2)


REFUSED = {
    "one step": lambda: on_path("lbfgs", cx.OneStep()),
    "difference": lambda: on_path("lbfgs", cx.FiniteDifference()),
    "budget": lambda: on_path("lbfgs", cx.Unrolled(checkpoint=cx.MemoryBudget(10**6))),
    "cost": lambda: cx.unroll.cost(PROBLEM, PHI, START, inner_solver=solver("lbfgs")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_reverse_mode(name):
    with pytest.raises(ValueError, match=r"loops until a condition holds.*forward"):
        REFUSED[name]()
