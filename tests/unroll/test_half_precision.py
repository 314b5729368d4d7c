"""Half precision of inner gradients and of stored states: how far it leads off, and that overflow does no harm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare
from helpers.sweep import sweep

STEPS = 12
BF16, FP16 = cx.HalfPrecision(jnp.bfloat16), cx.HalfPrecision(jnp.float16)


def error(weights, data):
    inputs, targets = data
    outputs = jnp.tanh(inputs @ weights["in"]) @ weights["out"]
    return (outputs - targets) ** 2


@functools.cache
def problem(size=1.0):
    """Weighted squares, the inner loss times `size`; as strict promotion wants it, φ is cast where it meets θ."""

    def inner(weights, phi, data):
        found = error(weights, data)
        # In two factors: in float16 one would be infinite or zero itself.
        root = size**0.5
        return root * (root * jnp.mean(jax.nn.sigmoid(phi["weights"]).astype(found.dtype) * found))

    return cx.Bilevel(inner=inner, outer=lambda weights, phi, data: jnp.mean(error(weights, data)))


def start():
    rng = np.random.default_rng(3)
    inputs = jnp.asarray(rng.standard_normal((24, 4)), jnp.float32)
    theta = {"in": 0.5 * rng.standard_normal((4, 6)), "out": 0.5 * rng.standard_normal(6)}
    phi = {"weights": np.zeros(16), "rate": np.asarray(0.03)}
    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return cast(phi), cast(theta), (inputs, jnp.sin(inputs @ jnp.arange(4.0, dtype=jnp.float32)))


@functools.cache
def solver(half=None, **kwargs):
    return cx.Steps(lambda phi: optax.adam(phi["rate"], eps=1e-12), STEPS, half=half, **kwargs)


def run(rule, half=None, size=1.0, **kwargs):
    phi, theta, (inputs, targets) = start()
    return cx.hypergradient(
        problem(size),
        phi,
        theta,
        inner_solver=kwargs.pop("inner_solver", None) or solver(half),
        rule=rule,
        inner_data=(inputs[:16], targets[:16]),
        outer_data=(inputs[16:], targets[16:]),
        **kwargs,
    )


@functools.cache
def full(size=1.0):
    return run(cx.Unrolled("mixed"), size=size)


def off(hg, size=1.0):
    return compare.relative_error(hg.grad, full(size).grad)


CASES = {
    "bfloat16": (BF16, cx.Unrolled("mixed", measure_error=True), 0.1),
    "bfloat16, reverse": (BF16, cx.Unrolled("reverse", measure_error=True), 0.1),
    "float16": (FP16, cx.Unrolled("mixed", measure_error=True), 0.02),
    "float16, two loops": (FP16, cx.Unrolled("mixed", "sqrt", measure_error=True), 0.02),
    "float16, forward": (FP16, cx.Unrolled("forward", measure_error=True), 0.02),
}


@pytest.mark.parametrize("name", sweep(CASES, always=["bfloat16", "float16, two loops", "float16, forward"]))
def test_the_measured_error_is_the_error(name):
    """Near the hypergradient in float32, as near as it says itself, and not equal to it."""
    half, rule, most = CASES[name]
    hg = run(rule, half)
    found = off(hg)
    assert hg.result == cx.RESULTS.successful and 1e-6 < found < most
    assert float(hg.stats.relative_error) == pytest.approx(found, rel=0.05)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((hg.grad, hg.theta)))
    assert int(hg.stats.path.num_repeated) == 0


@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_overflow_is_repeated_and_harms_nothing(mode):
    """A loss 1e6 times as large overflows at first; without the guard all would be NaN."""
    hg = run(cx.Unrolled(mode), FP16, 1e6)
    assert hg.result == cx.RESULTS.successful
    assert 0 < int(hg.stats.path.num_repeated) <= STEPS and off(hg, 1e6) < 0.02


def test_the_scale_grows_until_it_overflows():
    hg = run(cx.Unrolled("mixed"), cx.HalfPrecision(jnp.float16, loss_scale=2.0**18, growth_interval=1))
    assert 0 < int(hg.stats.path.num_repeated) < STEPS and off(hg) < 0.02


def test_the_scale_saves_small_gradients():
    """Of a loss 1e-7 times as large nothing is left in float16 where it is not scaled; measuring shows it."""
    assert off(run(cx.Unrolled("mixed"), FP16, 1e-7), 1e-7) < 0.02
    unscaled = run(
        cx.Unrolled("mixed", measure_error=True), cx.HalfPrecision(jnp.float16, loss_scale=1.0), 1e-7
    )
    assert off(unscaled, 1e-7) > 0.1 and float(unscaled.stats.relative_error) > 0.1


def test_every_derivative_of_a_solution_map():
    """In bfloat16: jvp, and forward over reverse as well as reverse over reverse, near those in float32."""
    phi, theta, data = start()
    inputs = (data[0][:16], data[1][:16])

    def of(half):
        theta_star = cx.solution_map(problem(), cx.Steps(optax.sgd(0.1), 2, half=half), cx.Unrolled("mixed"))
        loss = lambda w: jnp.sum(theta_star({**phi, "weights": w}, theta, inputs)["out"] ** 2)  # noqa: E731
        along = jnp.sin(jnp.arange(16, dtype=jnp.float32))
        forward = lambda f: lambda w: jax.jvp(f, (w,), (along,))[1]  # noqa: E731
        pull = lambda w: jnp.vdot(jax.grad(loss)(w), along)  # noqa: E731
        return jax.jit(lambda w: (forward(loss)(w), forward(jax.grad(loss))(w), jax.grad(pull)(w)))(
            phi["weights"]
        )

    for found, wanted in zip(of(BF16), of(None), strict=True):
        assert compare.relative_error(found, wanted) < 0.05


def test_steps_that_draw_and_stop_and_other_rules():
    """Drawn batches are cast; a tolerance stops; one step and implicit rules take such steps."""
    phi, theta, (inputs, targets) = start()

    def draw(key):
        rows = jax.random.choice(key, 16, (16,), replace=False)  # all, in another order
        return inputs[rows], targets[rows]

    rule = cx.Unrolled("mixed")
    uniform = cx.Bilevel(
        inner=lambda w, p, b: jnp.mean(error(w, b)), outer=lambda w, p, b: jnp.sum(w["out"] ** 2)
    )
    rate = {"rate": phi["rate"]}
    hg = cx.hypergradient(
        uniform, rate, theta, inner_solver=solver(FP16), rule=rule, inner_data=draw, key=jax.random.key(0)
    )
    plain = cx.hypergradient(
        uniform, rate, theta, inner_solver=solver(), rule=rule, inner_data=(inputs[:16], targets[:16])
    )
    assert compare.relative_error(hg.grad, plain.grad) < 0.02
    stopping = cx.Steps(lambda phi: optax.sgd(phi["rate"]), STEPS, 1e6, half=FP16)
    assert int(run(rule, inner_solver=stopping).stats.path.num_steps) == 1
    assert np.all(np.isfinite(compare.flat(run(cx.OneStep(), FP16).grad)))


ROUNDED = {
    "bfloat16": (cx.Unrolled("mixed", checkpoint_dtype=jnp.bfloat16, measure_error=True), 0.05),
    "float16, two loops": (
        cx.Unrolled("mixed", "sqrt", checkpoint_dtype=jnp.float16, measure_error=True),
        0.01,
    ),
    "float16, reverse": (cx.Unrolled("reverse", checkpoint_dtype=jnp.float16, measure_error=True), 0.01),
    "both": (cx.Unrolled("mixed", checkpoint_dtype=jnp.bfloat16, measure_error=True), 0.1),
}


@pytest.mark.parametrize("name", sweep(ROUNDED, always=["bfloat16", "float16, two loops"]))
def test_rounded_checkpoints(name):
    """The path is the same to the last digit, its derivative off by what is measured."""
    rule, most = ROUNDED[name]
    half = BF16 if name == "both" else None
    hg = run(rule, half)
    if half is None:
        assert float(hg.value) == float(full().value)
        assert compare.absolute_error(hg.theta, full().theta) == 0
    assert 1e-7 < off(hg) < most
    assert float(hg.stats.relative_error) == pytest.approx(off(hg), rel=0.05)


def test_rounded_checkpoints_take_less():
    """Half of the stored states, no gradients beside them; a budget too small for full states is kept."""
    inner = lambda t, p, _: jnp.sum(jnp.cos(t) * p)  # noqa: E731
    large = cx.Bilevel(inner=inner, outer=lambda t, p, _: jnp.sum(t**2))
    steps = cx.Steps(optax.adam(0.1), 64)
    arguments = (jnp.ones(4096, jnp.float32), jnp.ones(4096, jnp.float32))

    def taken(rule):
        def run(phi, theta):
            return cx.hypergradient(large, phi, theta, inner_solver=steps, rule=rule, throw=False).grad

        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    whole, rounded = taken(cx.Unrolled("mixed")), taken(cx.Unrolled("mixed", checkpoint_dtype=jnp.bfloat16))
    assert rounded < 0.5 * whole
    budget = cx.MemoryBudget(int(1.3 * rounded))
    hg = cx.hypergradient(
        large,
        *arguments,
        inner_solver=steps,
        rule=cx.Unrolled("mixed", budget, checkpoint_dtype=jnp.bfloat16),
    )
    assert hg.stats.path.lengths == (64,)
    assert taken(cx.Unrolled("mixed", budget, checkpoint_dtype=jnp.bfloat16)) <= budget.num_bytes


def test_rounded_checkpoints_of_a_path_that_stops():
    """Twelve steps of which five are taken."""
    rule = cx.Unrolled("mixed", "sqrt", checkpoint_dtype=jnp.float16)
    long = run(cx.Unrolled("mixed"), inner_solver=cx.Steps(lambda phi: optax.sgd(phi["rate"]), STEPS))
    norms = np.asarray(long.stats.path.gradient_norms)
    tolerance = float(norms[4] + 1e-6 * norms[4])
    assert norms[3] > tolerance
    hg = run(rule, inner_solver=cx.Steps(lambda phi: optax.sgd(phi["rate"]), STEPS, tolerance))
    short = run(cx.Unrolled("mixed"), inner_solver=cx.Steps(lambda phi: optax.sgd(phi["rate"]), 5))
    assert int(hg.stats.path.num_steps) == 5
    weights = [found.grad["weights"] for found in (hg, short)]
    assert compare.relative_error(*weights) < 0.01


def test_where_nothing_was_stored_nothing_was_rounded():
    """`auto` takes forward mode for a single hyperparameter."""
    hg = cx.hypergradient(
        cx.Bilevel(inner=lambda t, p, _: 0.5 * jnp.sum((t - p) ** 2), outer=lambda t, p, _: jnp.sum(t**2)),
        jnp.asarray(1.0),
        jnp.zeros(3),
        inner_solver=cx.Steps(optax.sgd(0.1), 4),
        rule=cx.Unrolled(checkpoint_dtype=jnp.bfloat16, measure_error=True),
    )
    assert hg.stats.path.mode == "forward" and float(hg.stats.error_estimate) == 0


USE = {
    "dtype": (lambda: cx.HalfPrecision(jnp.float32), ValueError, "`dtype`"),
    "scale": (lambda: cx.HalfPrecision(loss_scale=2.0), ValueError, "float16"),
    "negative": (lambda: cx.HalfPrecision(jnp.float16, loss_scale=-1.0), ValueError, "`loss_scale`"),
    "no power of two": (lambda: cx.HalfPrecision(jnp.float16, loss_scale=3.0), ValueError, "power of two"),
    "interval": (lambda: cx.HalfPrecision(jnp.float16, growth_interval=0), ValueError, "`growth_interval`"),
    "a dtype alone": (lambda: cx.Steps(optax.sgd(0.1), 2, half=jnp.bfloat16), TypeError, "`half`"),
    "reverse": (lambda: run(cx.Unrolled("reverse"), FP16), ValueError, 'mode="mixed"'),
    "difference": (lambda: run(cx.FiniteDifference(), BF16), ValueError, "OneStep"),
    "nothing rounded": (lambda: run(cx.Unrolled(measure_error=True)), ValueError, "`measure_error=True`"),
    "not a flag": (lambda: cx.Unrolled(measure_error=1), TypeError, "`measure_error`"),
    "stored": (lambda: cx.Unrolled(checkpoint_dtype=jnp.float64), ValueError, "`checkpoint_dtype`"),
    "forward": (
        lambda: cx.Unrolled("forward", checkpoint_dtype=jnp.bfloat16),
        ValueError,
        "`checkpoint_dtype`",
    ),
    "second derivatives": (
        lambda: cx.solution_map(problem(), solver(FP16), cx.Unrolled("mixed")),
        ValueError,
        "every order",
    ),
    "solution map": (
        lambda: cx.solution_map(problem(), solver(), cx.Unrolled(checkpoint_dtype=jnp.bfloat16))(
            *start()[:2], start()[2]
        ),
        ValueError,
        "`checkpoint_dtype`",
    ),
}


@pytest.mark.parametrize("name", USE)
def test_wrong_use_says_what_to_do(name):
    call, kind, message = USE[name]
    with pytest.raises(kind, match=message):
        call()
