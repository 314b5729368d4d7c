"""Wrong arguments are refused by name, with the remedy."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import run

RULE = cx.Implicit(rtol=1e-4, max_sweeps=5)


def _call(inner, outer, phi=None, theta0=None, **kwargs):
    arguments = {"inner_solver": run.inner_solver("minimum"), "rule": RULE} | kwargs
    phi = jnp.ones(2) if phi is None else phi
    theta0 = jnp.ones(2) if theta0 is None else theta0
    return cx.hypergradient(cx.Bilevel(inner=inner, outer=outer), phi, theta0, **arguments)


def quadratic(theta, phi, batch):
    return jnp.sum((theta - phi) ** 2)


WRONG = {
    "inner returns a vector": (lambda: _call(lambda t, p, b: (t - p) ** 2, quadratic), "inner"),
    "outer returns a vector": (lambda: _call(quadratic, lambda t, p, b: (t - p) ** 2), "outer"),
    "integer theta": (lambda: _call(quadratic, quadratic, theta0=jnp.ones(2, jnp.int32)), "theta0"),
    "integer phi": (lambda: _call(quadratic, quadratic, phi=jnp.ones(2, jnp.int32)), "phi"),
    "no phi": (lambda: _call(lambda t, p, b: jnp.sum(t**2), lambda t, p, b: jnp.sum(t), phi={}), "phi"),
    "solver of the wrong sort": (
        lambda: _call(quadratic, quadratic, inner_solver=optx.Newton(rtol=1e-6, atol=1e-6)),
        "inner_solver",
    ),
    "rule is a string": (lambda: _call(quadratic, quadratic, rule="implicit"), "rule"),
    "unrolling an Optimistix solver": (lambda: _call(quadratic, quadratic, rule=cx.Unrolled()), "Steps"),
    "map of another shape": (
        lambda: cx.hypergradient(
            cx.Bilevel(inner=cx.FixedPoint(lambda t, p, b: t[:1]), outer=quadratic),
            jnp.ones(2),
            jnp.ones(2),
            inner_solver=optx.FixedPointIteration(rtol=1e-6, atol=1e-6),
            rule=RULE,
        ),
        "(?i)theta|FixedPoint",
    ),
    "negative rtol": (lambda: cx.Implicit(rtol=-1.0), "rtol"),
    "no sweeps": (lambda: cx.Implicit(max_sweeps=0), "max_sweeps"),
    "negative damping": (lambda: cx.Implicit(damping=-1.0), "damping"),
    "no steps": (lambda: cx.Steps(optax.sgd(0.1), -1), "num_steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused(name):
    call, words = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_right_use_is_not():
    hg = _call(quadratic, quadratic)
    np.testing.assert_allclose(np.asarray(hg.theta), 1.0, atol=1e-6)


def test_solver_that_wants_the_default_precision_says_so():
    """Optimistix's LBFGS does not trace float32 where float64 is the default; the remedy is in the message."""
    problem = cx.Bilevel(inner=lambda w, a, _: jnp.sum((w - a) ** 2), outer=lambda w, a, _: jnp.sum(w**2))
    with pytest.raises((TypeError, ValueError)) as caught:
        cx.hypergradient(
            problem,
            jnp.ones(3, jnp.float32),
            jnp.zeros(3, jnp.float32),
            inner_solver=optx.LBFGS(1e-4, 1e-4),
            rule=cx.Implicit(rtol=1e-2),
        )
    assert any("cast `theta0` to float64" in note for note in caught.value.__notes__)


def test_preconditioner_of_another_size():
    problem = cx.Bilevel(inner=quadratic, outer=quadratic)
    rule = cx.Implicit(preconditioner=lx.DiagonalLinearOperator(jnp.ones(59)))
    with pytest.raises(ValueError, match=r"preconditioner.*\(60,\).*\(59,\)"):
        cx.hypergradient(
            problem, jnp.asarray(0.5), jnp.zeros(60), inner_solver=optx.BFGS(1e-8, 1e-8), rule=rule
        )


def test_preconditioner_for_other_vectors():
    """Another pytree, another precision, a function of other arguments."""
    like = lambda dtype: jax.ShapeDtypeStruct((60,), dtype)  # noqa: E731
    identity = lambda structure: lx.FunctionLinearOperator(  # noqa: E731
        lambda v: v, structure, lx.positive_semidefinite_tag
    )
    problem = cx.Bilevel(inner=quadratic, outer=quadratic)
    for preconditioner, error, words in (
        (identity({"w": like(jnp.float64)}), ValueError, r"pytrees like theta.*'w'"),
        (identity(like(jnp.float32)), ValueError, r"dtypes, \['float64'\].*\['float32'\]"),
        (lambda theta: identity(like(jnp.float64)), TypeError, r"called as preconditioner\(theta, args\)"),
    ):
        rule = cx.Implicit(preconditioner=preconditioner)
        with pytest.raises(error, match=words):
            cx.hypergradient(
                problem, jnp.asarray(0.5), jnp.zeros(60), inner_solver=optx.BFGS(1e-8, 1e-8), rule=rule
            )


def test_equations_of_another_precision():
    fn = lambda w, a, _: (w**3 - a).astype(jnp.float32)  # noqa: E731
    problem = cx.Bilevel(inner=cx.Root(fn), outer=quadratic)
    with pytest.raises(
        ValueError, match=r"`inner` must return the dtypes of theta, \['float64'\].*\['float32'\]"
    ):
        cx.hypergradient(
            problem,
            jnp.asarray(0.5),
            jnp.ones(3),
            inner_solver=optx.Newton(1e-8, 1e-8),
            rule=cx.Implicit(),
        )


def test_data_that_are_a_path():
    problem = cx.Bilevel(inner=quadratic, outer=quadratic)
    for name in ("inner_data", "outer_data"):
        with pytest.raises(TypeError, match=f"`{name}`.*'train.csv'"):
            cx.hypergradient(
                problem,
                jnp.asarray(0.5),
                jnp.zeros(3),
                inner_solver=optx.BFGS(1e-8, 1e-8),
                rule=cx.Implicit(),
                **{name: "train.csv"},
            )


def test_optimiser_that_was_not_called():
    with pytest.raises(TypeError, match=r"optax\.adam\(1e-2\)"):
        cx.Steps(optax.adam, 10)


def test_a_state_needs_a_rule():
    """A string, and a class in place of its instance."""
    problem = cx.Bilevel(inner=quadratic, outer=quadratic)
    for rule, name in (("implicit", "str"), (cx.Implicit, "the class Implicit")):
        with pytest.raises(TypeError, match=rf"`rule` must be `cx.Implicit\(...\)`.*got {name}"):
            cx.bilevel.initial_state(
                problem, jnp.ones(2), jnp.ones(2), inner_solver=optx.BFGS(1e-6, 1e-6), rule=rule
            )


def test_forgotten_data_are_named():
    """The user's own error goes on, with a note that says which data are None; none where there are data."""
    needs = lambda w, phi, batch: jnp.sum((w - phi) ** 2) * batch[0]  # noqa: E731
    plain = lambda w, phi, batch: jnp.sum((w - phi) ** 2)  # noqa: E731
    bfgs, newton = optx.BFGS(1e-6, 1e-6), optx.Newton(1e-6, 1e-6)
    cases = [
        (needs, plain, bfgs, "`inner` was called with batch=None, since `inner_data` is None"),
        (plain, needs, bfgs, "`outer` was called with batch=None, since `outer_data` is None"),
        (cx.Root(lambda w, phi, batch: w - phi * batch[0]), plain, newton, "`inner_data` is None"),
    ]
    for inner, outer, solver, note in cases:
        problem, args = cx.Bilevel(inner=inner, outer=outer), (jnp.ones(2), jnp.ones(2))
        with pytest.raises(TypeError, match="not subscriptable") as caught:
            cx.hypergradient(problem, *args, inner_solver=solver, rule=RULE)
        assert sum(note in text for text in caught.value.__notes__) == 1
    theta_star = cx.solution_map(cx.Bilevel(inner=needs, outer=plain), bfgs, RULE)
    with pytest.raises(TypeError) as caught:
        theta_star(*args)
    assert any("in a solution map: its `batch`" in text for text in caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        theta_star(*args, batch=1.0)
    assert not any("batch=None" in text for text in getattr(caught.value, "__notes__", []))
