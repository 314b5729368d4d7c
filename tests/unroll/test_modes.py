"""Every mode and schedule against plain reverse mode through a plain loop of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare, paths
from helpers.sweep import sweep

RULES = {
    "auto": cx.Unrolled(),
    "mixed, two loops": cx.Unrolled("mixed", "sqrt"),
    "mixed, within a budget": cx.Unrolled("mixed", cx.MemoryBudget(2**20)),
    "reverse, tape": cx.Unrolled("reverse"),
    "reverse, two loops": cx.Unrolled("reverse", "sqrt"),
    "forward": cx.Unrolled("forward"),
}


def check_leaves(found, wanted, tolerance):
    """Each leaf on its own: the rates would hide the weights."""
    for name in wanted:
        assert compare.relative_error(found[name], wanted[name]) <= tolerance, name


@pytest.mark.parametrize("name", sweep(RULES, always=[n for n in RULES if "budget" not in n]))
def test_modes_agree(name):
    hg = paths.hypergradient(RULES[name])
    value, grad = paths.truth(paths.adam)
    assert hg.result == cx.RESULTS.successful
    assert float(hg.value) == pytest.approx(float(value), rel=1e-13)
    check_leaves(hg.grad, grad, 1e-11)


@pytest.mark.parametrize("optimizer", [paths.momentum, paths.rmsprop, paths.adamw], ids=lambda f: f.__name__)
def test_optimisers_in_mixed_mode(optimizer):
    check_leaves(paths.hypergradient(cx.Unrolled("mixed"), optimizer).grad, paths.truth(optimizer)[1], 1e-11)


def test_what_is_chosen_is_said():
    """18 hyperparameters and more: mixed; a single one: forward; a custom_vjp: reverse."""
    path = paths.hypergradient(cx.Unrolled()).stats.path
    assert path.mode == "mixed" and path.lengths == (paths.STEPS,) and "fastest" in path.reason
    assert paths.hypergradient(RULES["reverse, tape"]).stats.path.lengths is None
    assert paths.hypergradient(RULES["mixed, two loops"]).stats.path.lengths == (3, 2)
    assert "1048576 bytes" in paths.hypergradient(RULES["mixed, within a budget"]).stats.path.reason


def test_few_hyperparameters_go_forward():
    """One learning rate; more tangents than one chunk holds are tested by `test_modes_agree`."""
    phi, theta = paths.start()
    fixed = {k: v for k, v in phi.items() if k != "rates"}

    def problem(rate):
        return {**fixed, "rates": jnp.full(paths.STEPS, rate)}

    bilevel = cx.Bilevel(
        inner=lambda t, p, b: paths.inner(t, problem(p), b), outer=lambda t, p, b: paths.outer(t, fixed, b)
    )
    batch = paths.data()
    hg = cx.hypergradient(
        bilevel,
        jnp.asarray(0.05),
        theta,
        inner_solver=cx.Steps(lambda p: optax.adam(p, eps=1e-4), paths.STEPS),
        rule=cx.Unrolled(),
        inner_data=batch,
        outer_data=batch,
    )
    assert hg.stats.path.mode == "forward"

    def loss(rate):
        theta_end = paths.plain(lambda p, i: optax.adam(rate, eps=1e-4), problem(rate), theta, batch)
        return paths.outer(theta_end, fixed, batch)

    difference = (loss(0.05 + 1e-6) - loss(0.05 - 1e-6)) / 2e-6
    assert float(hg.grad) == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_single_precision(mode):
    hg = paths.hypergradient(cx.Unrolled(mode), dtype=np.float32)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((hg.grad, hg.theta, hg.value)))
    check_leaves(hg.grad, paths.truth(paths.adam)[1], 2e-4)


@pytest.mark.parametrize("mode", sweep(["mixed", "reverse", "forward"], always=["mixed", "forward"]))
def test_dead_parameters_under_plain_adam(mode):
    """Inputs that are always zero: finite, and right by finite differences of the plain loop, eps_root = 0."""
    hg = paths.hypergradient(cx.Unrolled(mode), dead=True)
    phi, theta = paths.start()
    batch = paths.data(dead=True)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), phi)

    @jax.jit
    def loss(scale):
        moved = jax.tree.map(lambda p, d: p + scale * d, phi, direction)
        return paths.outer(paths.plain(paths.adam, moved, theta, batch), moved, batch)

    difference = (8 * (loss(1e-4) - loss(-1e-4)) - (loss(2e-4) - loss(-2e-4))) / 12e-4
    found = compare.flat(hg.grad) @ compare.flat(direction)
    assert found == pytest.approx(float(difference), rel=1e-8)


def test_tasks_under_vmap():
    """Different hyperparameters and starts at once, data shared: each as on its own."""
    phi, theta = paths.start()
    batch = paths.data()
    scales = jnp.asarray([1.0, 0.5, -0.3])

    def one(scale):
        at = {**phi, "weights": scale * phi["weights"]}
        return cx.hypergradient(
            paths.PROBLEM,
            at,
            {**theta, "out": scale * theta["out"]},
            inner_solver=paths.solver(paths.adam),
            rule=cx.Unrolled("mixed", "sqrt"),
            inner_data=batch,
            outer_data=batch,
        ).grad

    batched = jax.vmap(one)(scales)
    for i, scale in enumerate(scales):
        alone = one(scale)
        check_leaves(jax.tree.map(lambda leaf, i=i: leaf[i], batched), alone, 1e-11)


@pytest.mark.parametrize(
    "rule", [cx.Unrolled("mixed", "sqrt"), cx.Unrolled("forward")], ids=["mixed", "forward"]
)
def test_every_step_draws_its_own_batch(rule):
    """Along a direction, against differences of the value under the same key; five steps of 4 in 12 examples."""
    phi, theta = paths.start()
    inputs, targets = paths.data()
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), phi)

    def drawn(key):
        rows = jax.random.choice(key, 12, (4,), replace=False)
        return inputs[rows], targets[rows], rows

    def inner(theta, phi, batch):
        weights = {**phi, "weights": phi["weights"][batch[2]]}
        return paths.inner(theta, weights, batch[:2])

    problem, solver = cx.Bilevel(inner=inner, outer=paths.outer), cx.Steps(paths.momentum, 5)

    def at(scale, key=0):
        return cx.hypergradient(
            problem,
            jax.tree.map(lambda p, d: p + scale * d, phi, direction),
            theta,
            inner_solver=solver,
            rule=rule,
            inner_data=drawn,
            outer_data=paths.data(),
            key=jax.random.key(key),
        )

    difference = (float(at(1e-5).value) - float(at(-1e-5).value)) / 2e-5
    found = compare.flat(at(0.0).grad) @ compare.flat(direction)
    assert found == pytest.approx(difference, rel=1e-7)
    assert abs(float(at(0.0).value) - float(at(0.0, key=1).value)) > 1e-6


def test_the_second_call_compiles_nothing():
    """Another φ, the same program; the user's loss is traced once in all."""
    calls = []

    def counted(theta, phi, batch):
        calls.append(1)
        return paths.inner(theta, phi, batch)

    problem = cx.Bilevel(inner=counted, outer=paths.outer)
    phi, theta = paths.start()
    batch = paths.data()
    arguments = {
        "inner_solver": paths.solver(paths.momentum),
        "rule": cx.Unrolled("mixed", "sqrt"),
        "inner_data": batch,
        "outer_data": batch,
    }
    cx.hypergradient(problem, phi, theta, **arguments)
    assert len(calls) == 1
    cx.hypergradient(problem, {**phi, "decay": jnp.asarray(0.5)}, theta, **arguments)
    assert len(calls) == 1


@jax.custom_vjp
def straight_through(x):
    return jnp.round(4 * x) / 4


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, c: (c,))


def test_a_custom_vjp_is_not_taken_for_symmetric():
    """Its mixed derivatives do not commute: mixed mode refuses, auto goes in reverse and agrees with plain JAX."""

    def inner(theta, phi, batch):
        return jnp.sum((straight_through(theta) * phi - 1.0) ** 2)

    def outer(theta, phi, batch):
        return jnp.sum(theta**2)

    problem, phi, theta = (
        cx.Bilevel(inner=inner, outer=outer),
        jnp.asarray([0.7, 1.3]),
        jnp.asarray([0.3, -0.4]),
    )

    def run(rule):
        return cx.hypergradient(problem, phi, theta, inner_solver=cx.Steps(optax.sgd(0.1), 3), rule=rule)

    with pytest.raises(ValueError, match="custom_vjp"):
        run(cx.Unrolled("mixed"))

    def loss(phi):
        point = theta
        for _ in range(3):
            point = point - 0.1 * jax.grad(inner)(point, phi, None)
        return outer(point, phi, None)

    hg = run(cx.Unrolled())
    assert hg.stats.path.mode == "reverse"
    assert compare.relative_error(hg.grad, jax.grad(loss)(phi)) <= 1e-12


def test_the_models_own_checkpoints_survive():
    """Blocks under `jax.checkpoint` keep the memory of a step: 16 of them take less than half of what they would."""
    width, blocks = 64, 16
    stack = jax.random.normal(jax.random.key(0), (blocks, width, width)) / width
    inputs = jax.random.normal(jax.random.key(1), (width, width))

    def problem(remat):
        block = lambda x, w: x + jnp.tanh(jnp.tanh(x @ w) @ w.T)  # noqa: E731
        body = jax.checkpoint(block, prevent_cse=False) if remat else block

        def inner(theta, phi, batch):
            outputs, _ = jax.lax.scan(lambda x, w: (body(x, w), None), batch, theta)
            return jnp.mean((outputs * phi) ** 2)

        return cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t**2))

    def memory(remat, mode):
        def run(phi, theta, batch):
            steps = cx.Steps(optax.sgd(0.1), 2)
            return cx.hypergradient(
                problem(remat),
                phi,
                theta,
                inner_solver=steps,
                rule=cx.Unrolled(mode, "none"),
                inner_data=batch,
            ).grad

        program = jax.jit(run).lower(jnp.ones(width), stack, inputs).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(True, "mixed") < 0.6 * memory(False, "mixed")
    assert memory(True, "mixed") < 0.8 * memory(True, "reverse")


WRONG = {
    "mode": (lambda: cx.Unrolled("backward"), ValueError, "mode.*mixed"),
    "schedule": (lambda: cx.Unrolled(checkpoint="log"), ValueError, "checkpoint.*sqrt"),
    "budget": (lambda: cx.MemoryBudget(0), ValueError, "num_bytes.*positive"),
    "truncation": (lambda: cx.Unrolled(truncate=0), ValueError, "truncate"),
    "forward and stored": (lambda: cx.Unrolled("forward", "sqrt"), ValueError, "stores nothing"),
    "clipping forward": (lambda: cx.Unrolled("forward", clip=optax.clip(1.0)), ValueError, "adjoint"),
    "clipping by a number": (lambda: cx.Unrolled(clip=1.0), TypeError, "GradientTransformation"),
    "too small a budget": (
        lambda: paths.hypergradient(cx.Unrolled("mixed", cx.MemoryBudget(100))),
        ValueError,
        "too small.*about [0-9]+ bytes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_says_what_to_do(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()
