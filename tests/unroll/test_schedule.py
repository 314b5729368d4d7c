"""Schedules, memory budgets that are kept, and predicted costs."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import curvax as cx
from curvax.unroll._schedule import MOST_LEVELS, balanced, candidates, named
from helpers import paths


@given(num_steps=st.integers(1, 200_000), levels=st.integers(1, MOST_LEVELS))
def test_loops_cover_the_steps_with_few_states(num_steps, levels):
    """Enough turns, hardly more than needed, and a sum within a quarter of the least possible one, k·T^(1/k)."""
    lengths = balanced(num_steps, levels)
    assert len(lengths) == levels and all(length >= 1 for length in lengths)
    assert math.prod(lengths) >= num_steps
    ideal = levels * num_steps ** (1 / levels)
    assert sum(lengths) <= 1.25 * ideal + levels
    if num_steps >= 10_000:
        assert math.prod(lengths) <= 2 * num_steps


@given(num_steps=st.integers(1, 200_000))
def test_every_further_level_stores_less(num_steps):
    sums = [sum(lengths) for lengths in candidates(num_steps)]
    assert sums[0] == num_steps and all(b < a for a, b in zip(sums, sums[1:], strict=False))
    assert sum(named("binomial", num_steps)) <= 1.25 * sums[-1]
    assert named("none", num_steps) == (num_steps,)


def test_known_schedules():
    """By hand: 100 × 100; 10⁴ in four loops of ten, which store 40 states."""
    assert named("sqrt", 10_000) == (100, 100)
    assert named("binomial", 10_000) == (10, 10, 10, 10)
    assert balanced(97, 2) == (10, 10)
    assert named("sqrt", 1) == (1,)


def temporary(rule, steps, width, tolerance=None, rows=32):
    """Bytes that the compiled hypergradient takes beside arguments and results, and what its path says."""
    said = []

    def inner(theta, phi, batch):
        return jnp.mean((jnp.tanh(batch @ theta["a"]) @ theta["b"] - phi["targets"]) ** 2)

    problem = cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t["a"] ** 2) + jnp.sum(t["b"] ** 2))
    solver = cx.Steps(lambda p: optax.adam(p["rate"], eps=1e-3), steps, tolerance)

    def run(phi, theta, batch):
        hg = cx.hypergradient(
            problem, phi, theta, inner_solver=solver, rule=rule, inner_data=batch, throw=False
        )
        said.append(hg.stats.path)
        return hg.value, hg.grad

    phi = {"targets": jnp.ones(rows), "rate": jnp.asarray(0.01)}
    theta = {"a": jnp.ones((8, width)), "b": jnp.ones(width)}
    program = jax.jit(run).lower(phi, theta, jnp.ones((rows, 8))).compile()
    return program.memory_analysis().temp_size_in_bytes, said[0]


@pytest.mark.parametrize(("megabytes", "levels"), [(8.0, 1), (1.5, 2), (0.25, 3)])
def test_a_memory_budget_is_kept(megabytes, levels):
    """Measured by the compiler; and used: the next faster schedule would not have fitted."""
    budget = round(megabytes * 2**20)
    taken, path = temporary(cx.Unrolled("mixed", cx.MemoryBudget(budget)), 300, 32)
    assert taken <= budget
    assert len(path.lengths) == levels
    if levels > 1:
        states = path.num_stored
        faster = sum(candidates(300)[levels - 2])
        assert taken * faster / states > budget


@pytest.mark.parametrize(("mode", "megabytes"), [("mixed", 4.0), ("reverse", 3.5)])
def test_a_budget_is_kept_where_the_path_may_stop(mode, megabytes):
    """Skipped blocks have copies of the data, which are larger than all states here."""
    budget = round(megabytes * 2**20)
    rule = cx.Unrolled(mode, cx.MemoryBudget(budget))
    taken, path = temporary(rule, 300, 8, tolerance=1e-3, rows=4000)
    assert taken <= budget and path.lengths is not None


@pytest.mark.thorough
def test_a_budget_may_lead_to_forward_mode():
    """Two hyperparameters, and less memory than any stored path needs."""
    _, theta = paths.start()
    costs = cx.unroll.cost(
        SMALL,
        jnp.asarray([0.05, -3.0]),
        theta,
        inner_solver=SOLVER,
        inner_data=paths.data(),
        outer_data=paths.data(),
    )
    (forward,) = [row for row in costs.rows if row.mode == "forward"]
    assert forward.gradients < min(r.gradients for r in costs.rows if r.lengths and len(r.lengths) > 1)
    hg = cx.hypergradient(
        SMALL,
        jnp.asarray([0.05, -3.0]),
        theta,
        inner_solver=SOLVER,
        rule=cx.Unrolled(checkpoint=cx.MemoryBudget(forward.num_bytes)),
        inner_data=paths.data(),
        outer_data=paths.data(),
    )
    assert hg.stats.path.mode == "forward" and hg.stats.path.lengths == ()


def small_inner(theta, phi, batch):
    return paths.inner(theta, {"weights": jnp.zeros(12), "log l2": phi[1]}, batch)


SMALL = cx.Bilevel(inner=small_inner, outer=lambda t, p, b: paths.outer(t, {"weights": jnp.zeros(12)}, b))
SOLVER = cx.Steps(lambda p: optax.adam(p[0], eps=1e-3), 400)


def test_predicted_costs():
    """Rows from the fastest on, best() within a budget, and a table; memory falls from level to level."""
    phi, theta = paths.start(steps=200)
    costs = cx.unroll.cost(
        paths.PROBLEM,
        phi,
        theta,
        inner_solver=cx.Steps(paths.adam, 200),
        inner_data=paths.data(),
        outer_data=paths.data(),
    )
    times = [row.gradients for row in costs.rows]
    assert times == sorted(times) and costs.num_steps == 200 and costs.num_phi == 214
    mixed = [row for row in costs.rows if row.mode == "mixed"]
    assert mixed[0].checkpoint == "none" and costs.best() in (mixed[0], costs.rows[0])
    assert all(b.num_bytes < a.num_bytes for a, b in zip(mixed, mixed[1:], strict=False))
    (tape,) = [row for row in costs.rows if row.lengths is None]
    assert tape.num_bytes == max(row.num_bytes for row in costs.rows)
    assert costs.best(mixed[1].num_bytes).num_bytes <= mixed[1].num_bytes and mixed[1].checkpoint == "sqrt"
    with pytest.raises(ValueError, match="too little"):
        costs.best(10)
    table = str(costs)
    assert "200 steps, 214 hyperparameters" in table and "tape" in table and "forward" in table


def test_predictions_beside_measurements():
    """Memory to a factor of two where stored states dominate; the cost of more loops is seen in the measured times."""

    def inner(theta, phi, batch):
        return jnp.mean((jnp.tanh(batch @ theta) - phi) ** 2)

    problem = cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t**2))
    costs = cx.unroll.cost(
        problem,
        jnp.zeros(64),
        jnp.ones((96, 64)) / 96,
        inner_solver=cx.Steps(optax.sgd(0.1), 100),
        inner_data=jnp.ones((64, 96)),
        measure=True,
    )
    for row in costs.rows:
        assert row.measured_gradients > 0 and row.measured_bytes > 0
        if row.mode == "mixed" and row.checkpoint == "none":
            assert 0.5 <= row.num_bytes / row.measured_bytes <= 2
    (forward,) = [row for row in costs.rows if row.mode == "forward"]
    assert forward.measured_gradients > 2 * costs.rows[0].measured_gradients
    assert str(costs).splitlines()[1].count("measured") == 2


def test_costs_of_what_has_no_steps():
    import optimistix as optx

    with pytest.raises(ValueError, match="inner_solver.*Steps"):
        cx.unroll.cost(paths.PROBLEM, *paths.start(), inner_solver=optx.BFGS(1e-6, 1e-6))
    problem = cx.Bilevel(inner=cx.Root(lambda x, p, _: x - p), outer=lambda x, p, _: x)
    with pytest.raises(ValueError, match="problem.*loss"):
        cx.unroll.cost(problem, jnp.ones(()), jnp.ones(()), inner_solver=SOLVER)


@pytest.mark.parametrize("kind", ["contractions", "elementwise"])
def test_the_best_by_cost_is_what_auto_takes(kind):
    """Reverse mode may be predicted to be faster: `auto` takes it only where nothing is contracted."""
    matrix = jnp.eye(3) + 0.1

    def inner(theta, phi, _):
        shifted = matrix @ theta - phi if kind == "contractions" else theta - phi
        return jnp.sum(jnp.tanh(shifted) ** 2 + 0.1 * shifted**2)

    problem = cx.Bilevel(inner=inner, outer=lambda theta, phi, _: jnp.sum(theta**2))
    phi, theta, solver = jnp.ones(3), jnp.zeros(3), cx.Steps(optax.sgd(0.1), 12)
    phi = jnp.ones((40, 3)) if kind == "elementwise" else phi
    best = cx.unroll.cost(problem, phi, theta, inner_solver=solver).best()
    path = cx.hypergradient(problem, phi, theta, inner_solver=solver, rule=cx.Unrolled()).stats.path
    assert (best.mode, best.lengths) == (path.mode, path.lengths)
    assert best.mode in ({"mixed", "forward"} if kind == "contractions" else {"reverse"})
