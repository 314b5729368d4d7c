"""The contract with this version of JAX: how programs are written down, and that they are run as they stand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.capture import _jaxprs

X = jnp.arange(3.0)


def _equations(function, *args):
    program, _ = _jaxprs.trace(function, *args)
    return program.jaxpr.eqns


def _only(function, *args):
    (equation,) = _equations(function, *args)
    return equation


def test_programs_and_their_constants():
    constant = jnp.array([1.0, 2.0, 4.0])
    program, like = _jaxprs.trace(lambda x: {"y": x + constant}, X)
    assert like["y"].shape == (3,) and len(program.constants) == 1
    np.testing.assert_array_equal(program.constants[0], constant)
    assert len(program.jaxpr.constvars) == 1 and len(program.jaxpr.invars) == 1
    assert _jaxprs.as_program(program.jaxpr).constants == ()


def test_numbers_in_a_program():
    equation = _only(lambda x: x * 2.0, X)
    assert [_jaxprs.literal(atom) for atom in equation.invars] == [False, True]
    assert float(equation.invars[1].val) == 2.0


def test_calls():
    equation = _only(jax.jit(lambda x: jnp.sin(x)), X)
    assert _jaxprs.kind(equation) == "call"
    assert [e.primitive.name for e in _jaxprs.call(equation).jaxpr.eqns] == ["sin"]


def test_checkpoints():
    policy = jax.checkpoint_policies.dots_saveable
    equation = _only(jax.checkpoint(lambda x: jnp.sin(x), policy=policy, prevent_cse=False), X)
    assert _jaxprs.kind(equation) == "checkpoint"
    parts = _jaxprs.checkpoint(equation)
    assert parts.policy is policy and not parts.prevent_cse
    assert [e.primitive.name for e in parts.body.jaxpr.eqns] == ["sin"]


def test_checkpoints_that_are_wrapped():
    """As later versions may write them: one primitive that holds another one."""
    inner = _only(jax.checkpoint(lambda x: jnp.sin(x)), X)
    wrapped = SimpleNamespace(
        primitive=SimpleNamespace(name="call_hi_primitive"),
        params={"_prim": SimpleNamespace(params=inner.params)},
    )
    assert _jaxprs.kind(wrapped) == "checkpoint"
    assert _jaxprs.checkpoint(wrapped) == _jaxprs.checkpoint(inner)
    other = SimpleNamespace(primitive=SimpleNamespace(name="call_hi_primitive"), params={"_prim": object()})
    assert _jaxprs.kind(other) == "other"


def test_scans():
    def function(x, y):
        return jax.lax.scan(lambda c, s: (c * x + s, c), jnp.zeros(()), y, reverse=True, unroll=2)

    equation = _only(function, jnp.ones(()), X)
    assert _jaxprs.kind(equation) == "scan"
    parts = _jaxprs.scan(equation)
    assert parts[1:] == (1, 1, 3, True, 2)
    assert len(parts.body.jaxpr.invars) == 3 and len(parts.body.jaxpr.outvars) == 2


def test_scans_without_counts():
    """As JAX 0.11 writes them down."""
    equation = _only(lambda y: jax.lax.scan(lambda c, s: (c + s, c), jnp.zeros(()), y), X)
    params = {k: v for k, v in equation.params.items() if k not in ("num_consts", "num_carry")}
    groups = SimpleNamespace(unpack=lambda: ((), ("carry",), ("xs",)))
    later = SimpleNamespace(primitive=equation.primitive, params=params | {"ft_in": groups})
    assert _jaxprs.scan(later)[1:] == (0, 1, 3, False, 1)


def test_branches_and_loops():
    equations = _equations(lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), X)
    (equation,) = [e for e in equations if _jaxprs.kind(e) == "cond"]
    names = [[e.primitive.name for e in branch.jaxpr.eqns] for branch in _jaxprs.branches(equation)]
    assert names == [["cos"], ["sin"]]
    assert (
        _jaxprs.kind(_only(lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x + 1, x), X))
        == "while"
    )


@jax.custom_jvp
def _doubled_slope(x):
    return jnp.sin(x)


_doubled_slope.defjvp(lambda p, t: (jnp.sin(p[0]), 2 * jnp.cos(p[0]) * t[0]))


@jax.custom_vjp
def _tripled_slope(x):
    return jnp.sin(x)


_tripled_slope.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * jnp.cos(x) * g,))


@pytest.mark.parametrize(
    ("function", "factor"),
    [(_doubled_slope, 2), (_tripled_slope, 3), (jax.checkpoint(jnp.sin), 1), (jax.jit(jnp.sin), 1)],
)
def test_equations_do_what_they_did(function, factor):
    """Bound again, with their own derivatives and under `vmap`."""
    equation = _only(function, X)
    again = lambda x: _jaxprs.bind(equation, [x])[0]
    np.testing.assert_array_equal(again(X), jnp.sin(X))
    np.testing.assert_allclose(jax.grad(lambda x: again(x).sum())(X), factor * jnp.cos(X), rtol=1e-14)
    many = jax.vmap(jax.grad(lambda x: jax.jit(again)(x).sum()))(jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(many[1], factor * jnp.cos(2 * X), rtol=1e-14)


def test_lines_of_the_model():
    equation = _only(lambda x: jnp.tanh(x), X)
    name, line = _jaxprs.source(equation).split(":")
    assert name == "test_jaxprs.py" and int(line) > 100
    assert _jaxprs.source(SimpleNamespace(source_info=SimpleNamespace(traceback=None))) == ""
