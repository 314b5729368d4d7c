"""Derivatives of every kind of an unrolled solution map, against those of plain reverse mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, paths


@functools.cache
def loss_of(optimizer, mode, checkpoint="none"):
    """φ ↦ f at the end of the path, by a solution map."""
    theta_star = cx.solution_map(paths.PROBLEM, paths.solver(optimizer), cx.Unrolled(mode, checkpoint))
    _, theta = paths.start()
    return lambda phi: paths.outer(theta_star(phi, theta, paths.data()), phi, paths.data())


@functools.cache
def plain(optimizer):
    """The same by the plain loop."""
    _, theta = paths.start()
    return lambda phi: paths.outer(paths.plain(optimizer, phi, theta, paths.data()), phi, paths.data())


PHI, _ = paths.start()
RNG = np.random.default_rng(1)
DIRECTION = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape)), PHI)


def dot(tree):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(DIRECTION), strict=True))


def jvp(fn):
    return lambda phi: jax.jvp(fn, (phi,), (DIRECTION,))[1]


KINDS = {
    "grad": lambda f: jax.grad(f)(PHI),
    "jvp": lambda f: jvp(f)(PHI),
    "forward over reverse": lambda f: jvp(jax.grad(f))(PHI),
    "reverse over reverse": lambda f: jax.grad(lambda p: dot(jax.grad(f)(p)))(PHI),
    "reverse over forward": lambda f: jax.grad(jvp(f))(PHI),
    "third order": lambda f: jax.grad(lambda p: dot(jvp(jax.grad(f))(p)))(PHI),
    "vmap of reverse over reverse": lambda f: jax.vmap(
        lambda s: jax.grad(lambda p: dot(jax.grad(f)(p)))(jax.tree.map(lambda x: s * x, PHI))
    )(jnp.asarray([1.0, 0.8])),
}


def evaluated(kind, fn):
    with jax.numpy_dtype_promotion("standard"):  # the plain loop differentiates optax as it is
        return jax.jit(lambda: KINDS[kind](fn))()


@functools.cache
def wanted(kind, optimizer):
    return evaluated(kind, plain(optimizer))


# Adam's programs are long: those of its higher derivatives take a while to compile.
QUICK = [("grad", paths.adam), ("jvp", paths.adam)]
QUICK += [("forward over reverse", paths.momentum), ("reverse over reverse", paths.momentum)]
ALL = [(kind, paths.adam) for kind in KINDS if (kind, paths.adam) not in QUICK]
ALL += [(kind, paths.momentum) for kind in ("reverse over forward", "vmap of reverse over reverse")]
ALL += [("third order", paths.plain_descent)]


@pytest.mark.parametrize(
    ("kind", "optimizer"), [*QUICK, *[pytest.param(*case, marks=pytest.mark.thorough) for case in ALL]]
)
def test_mixed_mode_has_every_derivative(kind, optimizer):
    """To rounding; each leaf of φ is of the size of the others here, so that the norm over all is fair."""
    found = evaluated(kind, loss_of(optimizer, "mixed"))
    assert compare.relative_error(found, wanted(kind, optimizer)) <= 1e-11


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("forward over reverse", paths.momentum),
        pytest.param("reverse over reverse", paths.momentum, marks=pytest.mark.thorough),
    ],
)
def test_nested_loops_have_them_too(kind, optimizer):
    found = evaluated(kind, loss_of(optimizer, "mixed", "sqrt"))
    assert compare.relative_error(found, wanted(kind, optimizer)) <= 1e-11


@pytest.mark.parametrize(
    "nested", ["frr", "vmapped rrr", *[pytest.param(n, marks=pytest.mark.thorough) for n in ("rrr", "rfr")]]
)
def test_third_derivatives_of_a_small_path(nested):
    """Two unknowns, three steps; by plain JAX."""

    def inner(theta, phi, batch):
        return jnp.sum(jnp.cos(theta * phi)) + 0.3 * theta[0] * theta[1] ** 2

    problem = cx.Bilevel(inner=inner, outer=lambda t, p, b: jnp.sum(t))
    theta_star = cx.solution_map(problem, cx.Steps(optax.sgd(0.1), 3), cx.Unrolled("mixed"))

    def ours(phi):
        return jnp.sum(theta_star(phi, jnp.asarray([0.4, -0.9])) ** 2)

    def truth(phi):
        theta = jnp.asarray([0.4, -0.9])
        for _ in range(3):
            theta = theta - 0.1 * jax.grad(inner)(theta, phi, None)
        return jnp.sum(theta**2)

    def third(fn):
        for kind in reversed(nested.removeprefix("vmapped ")):
            fn = jax.jacrev(fn) if kind == "r" else jax.jacfwd(fn)
        return fn

    phi = jnp.asarray([[0.8, 1.3], [-0.2, 0.4]])
    batched = nested.startswith("vmapped")
    kinds = [jax.jit(jax.vmap(third(fn)) if batched else third(fn)) for fn in (ours, truth)]
    found, expected = (kind(phi if batched else phi[0]) for kind in kinds)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-11, atol=1e-13)


def test_reverse_mode_of_lengths_that_do_not_divide():
    """Six steps in 2 × 2 × 2 loops: two turns are skipped. The tolerance is never reached."""
    from curvax.unroll._path import follow
    from curvax.unroll._rollout import Rollout

    _, theta = paths.start()

    def loss(phi):
        nothing = jax.tree.map(lambda _: None, phi)
        rollout = Rollout(paths.solver(paths.adam), paths.inner, theta, nothing, paths.data(), None)
        step, walk = rollout.step(phi)
        end, norms = follow(lambda _: step.in_mixed_mode(), walk, 6, 6, (2, 2, 2), keep_gradient=True)
        return paths.outer(end.theta, phi, paths.data()) + 0.0 * jnp.sum(norms)

    assert compare.relative_error(evaluated("grad", loss), wanted("grad", paths.adam)) <= 1e-11


def test_the_start_and_the_data_have_derivatives():
    """A solution map is differentiable in its other arguments as well."""
    theta_star = cx.solution_map(paths.PROBLEM, paths.solver(paths.momentum), cx.Unrolled())
    phi, theta = paths.start()

    def ours(theta, batch):
        return paths.outer(theta_star(phi, theta, batch), phi, batch)

    def truth(theta, batch):
        return paths.outer(paths.plain(paths.momentum, phi, theta, batch), phi, batch)

    found = jax.jit(jax.grad(ours, argnums=(0, 1)))(theta, paths.data())
    assert (
        compare.relative_error(found, jax.jit(jax.grad(truth, argnums=(0, 1)))(theta, paths.data())) <= 1e-11
    )


def upper(theta_star):
    """An outer training run over the hyperparameter of an inner problem, as the loss of a third level."""

    def inner(phi, psi, batch):
        theta = theta_star(phi, jnp.zeros(2), batch)
        return jnp.sum((theta - psi) ** 2) + 0.1 * jnp.sum(phi**2)

    return inner


def lowest(theta, phi, batch):
    return 0.5 * jnp.sum(jnp.asarray([1.0, 3.0]) * theta**2) - theta @ jnp.tanh(phi) + 0.1 * jnp.sum(theta**4)


LOWEST = cx.Bilevel(inner=lowest, outer=lambda t, p, b: jnp.sum(t))


def solve_lowest(phi, psi):
    """The lowest level by Newton's method, in plain JAX, far enough."""

    def newton(_, theta):
        slope = jax.grad(lowest)(theta, phi, None)
        return theta - jnp.linalg.solve(jax.hessian(lowest)(theta, phi, None), slope)

    return jax.lax.fori_loop(0, 8, newton, jnp.zeros(2))


@pytest.mark.parametrize("order", ["unrolled in unrolled", "implicit in unrolled"])
def test_levels_nest(order):
    """dF/dψ of three levels, the middle one unrolled, against differences of a plain computation."""
    if order == "implicit in unrolled":
        lower = cx.solution_map(LOWEST, optx.BFGS(1e-10, 1e-10), cx.Implicit())
        plain_lower = lambda phi: solve_lowest(phi, None)  # noqa: E731
    else:
        lower = cx.solution_map(LOWEST, cx.Steps(optax.sgd(0.2), 4), cx.Unrolled("mixed"))

        def plain_lower(phi):
            theta = jnp.zeros(2)
            for _ in range(4):
                theta = theta - 0.2 * jax.grad(lowest)(theta, phi, None)
            return theta

    middle = cx.Bilevel(inner=upper(lower), outer=lambda p, s, b: 0.0)
    phi_star = cx.solution_map(middle, cx.Steps(optax.sgd(0.3), 3), cx.Unrolled("mixed"))
    psi = jnp.asarray([0.4, -0.2])

    def value(psi):
        return jnp.sum(phi_star(psi, jnp.asarray([0.1, 0.3])) ** 2)

    def truth(psi):
        phi = jnp.asarray([0.1, 0.3])
        loss = upper(lambda phi, theta0, batch: plain_lower(phi))
        for _ in range(3):
            phi = phi - 0.3 * jax.grad(loss)(phi, psi, None)
        return jnp.sum(phi**2)

    expected = jax.jit(jax.grad(truth))(psi)
    assert compare.relative_error(jax.jit(jax.grad(value))(psi), expected) <= 1e-7


def test_unrolled_in_implicit():
    """The inner loss of an implicit level is itself an unrolled run."""
    lower = cx.solution_map(LOWEST, cx.Steps(optax.sgd(0.2), 4), cx.Unrolled("mixed"))
    middle = cx.Bilevel(inner=upper(lower), outer=lambda p, s, b: 0.0)
    phi_star = cx.solution_map(middle, optx.BFGS(1e-10, 1e-10), cx.Implicit(rtol=1e-6))
    psi = jnp.asarray([0.1, -0.05])

    def plain_lower(phi):
        theta = jnp.zeros(2)
        for _ in range(4):
            theta = theta - 0.2 * jax.grad(lowest)(theta, phi, None)
        return theta

    loss = upper(lambda phi, theta0, batch: plain_lower(phi))

    def truth(psi):
        def newton(_, phi):
            return phi - jnp.linalg.solve(jax.hessian(loss)(phi, psi, None), jax.grad(loss)(phi, psi, None))

        return jnp.sum(jax.lax.fori_loop(0, 12, newton, jnp.asarray([0.1, 0.3])) ** 2)

    found = jax.jit(jax.grad(lambda s: jnp.sum(phi_star(s, jnp.asarray([0.1, 0.3])) ** 2)))(psi)
    assert compare.relative_error(found, jax.jit(jax.grad(truth))(psi)) <= 1e-6


WRONG = {
    "forward": (cx.Unrolled("forward"), "jax.jacfwd"),
    "clipped": (cx.Unrolled(clip=optax.clip(1.0)), "clip"),
    "first order": (cx.FirstOrder(), "gives hypergradients"),
    "finite difference": (cx.FiniteDifference(), "gives hypergradients"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rules_without_a_solution_map(name):
    rule, message = WRONG[name]
    error = TypeError if "hypergradients" in message else ValueError
    phi, theta = paths.start()
    with pytest.raises(error, match=message):
        cx.solution_map(paths.PROBLEM, paths.solver(paths.adam), rule)(phi, theta, paths.data())
