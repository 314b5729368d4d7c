"""Forward mode along random directions: unbiased, and its spread is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare, paths, problems

CASE = problems.MINIMA["condition 1e1"]()
PROBLEM = cx.Bilevel(inner=CASE.inner, outer=CASE.outer)
DESCENT = cx.Steps(optax.sgd(0.3), 5)


def run(rule, key=None, **kwargs):
    return cx.hypergradient(
        PROBLEM,
        CASE.phi,
        CASE.theta0 + 0.5,
        inner_solver=DESCENT,
        rule=rule,
        inner_data=CASE.inner_data,
        outer_data=CASE.outer_data,
        key=key,
        **kwargs,
    )


def test_many_directions_approach_the_derivative():
    """√(11 / 4000) = 5 % is the standard error of this many, in more than one chunk."""
    exact = run(cx.Unrolled("mixed"))
    hg = run(cx.Unrolled("forward", directions=4000), jax.random.key(0))
    error = compare.absolute_error(hg.grad, exact.grad)
    assert 0.4 <= float(hg.stats.error_estimate) / error <= 2.5
    assert float(hg.value) == pytest.approx(float(exact.value), rel=1e-13)
    assert hg.stats.path.mode == "forward" and "4000 random directions" in hg.stats.path.reason
    sensitivities = run(cx.Unrolled("forward")).stats.path.derivative_norms
    np.testing.assert_allclose(hg.stats.path.derivative_norms, sensitivities, rtol=0.1)


def test_the_estimate_is_unbiased_and_knows_its_variance():
    """Means over 2000 keys, two directions each: of the derivative, and of the square of what it says of its error."""
    exact = compare.flat(run(cx.Unrolled("mixed")).grad)
    rule = cx.Unrolled("forward", directions=2)

    def one(key):
        hg = run(rule, key, throw=False)
        return hg.grad, hg.stats.error_estimate

    grads, said = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2000))
    errors = np.asarray(grads) - exact
    spread = np.sqrt(np.mean(np.sum(errors**2, axis=1)))
    assert np.linalg.norm(errors.mean(axis=0)) <= 3 * spread / np.sqrt(2000)
    assert np.sqrt(np.mean(np.asarray(said) ** 2)) == pytest.approx(spread, rel=0.05)


def test_trees_and_leaves_without_influence():
    """A tree of φ in float32; what nothing reads gets no noise, and is reported."""
    hg = paths.hypergradient(
        cx.Unrolled("forward", directions=300), paths.momentum, dtype=np.float32, key=jax.random.key(2)
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(hg.grad))
    exact = paths.hypergradient(cx.Unrolled("mixed"), paths.momentum)
    assert compare.absolute_error(hg.grad, exact.grad) <= 3 * float(hg.stats.error_estimate)
    phi, _ = paths.start()
    arguments = {"phi": {**phi, "unread": jnp.ones(3)}, "key": jax.random.key(3), "throw": False}
    blind = paths.hypergradient(cx.Unrolled("forward", directions=2), paths.momentum, **arguments)
    assert blind.result == cx.RESULTS.no_influence
    assert float(jnp.sum(jnp.abs(blind.grad["unread"]))) == 0.0


WRONG = {
    "without a key": (lambda: run(cx.Unrolled("forward", directions=2)), "directions.*key"),
    "none": (lambda: cx.Unrolled("forward", directions=0), "directions.*at least 1"),
    "in another mode": (lambda: cx.Unrolled("mixed", directions=2), "directions.*forward"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_says_what_to_do(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
