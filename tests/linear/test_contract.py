"""One contract for every public solver of `curvax.linear`, found by introspection."""

import functools
import inspect

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.linear as linear
from helpers.matrices import definite, indefinite, rotation_and_decay
from helpers.sweep import sweep

N = 6
STRUCTURE = {"a": (2, 2), "b": (), "empty": (0, 3), "none": None, "c": (1,)}

# Name of a case: class, matrix and its tags, accurate solver, solver that cannot finish.
CASES = {
    "CG": (linear.CG, definite(N, 20.0), lx.positive_semidefinite_tag, {}, {"max_steps": 1}),
    "CG negative": (linear.CG, -definite(N, 20.0), lx.negative_semidefinite_tag, {}, {"max_steps": 1}),
    "MINRES": (linear.MINRES, indefinite(N, 20.0), lx.symmetric_tag, {}, {"max_steps": 1}),
    "Neumann": (linear.Neumann, rotation_and_decay(N), (), {}, {"max_terms": 1}),
    "FGMRES": (linear.FGMRES, rotation_and_decay(N), (), {"restart": 4}, {"max_steps": 1}),
    "Refined": (
        functools.partial(linear.Refined, linear.Auto(rtol=0.1, dense_size=0, fallback_size=0, restart=4)),
        rotation_and_decay(N),
        (),
        {},
        {"max_steps": 1},
    ),
    "Auto Cholesky": (linear.Auto, definite(N, 20.0), lx.positive_semidefinite_tag, {}, {"rtol": 1e-30}),
    "Auto LU": (linear.Auto, rotation_and_decay(N), (), {}, {"rtol": 1e-30}),
    "Auto CG": (
        linear.Auto,
        definite(N, 20.0),
        lx.positive_semidefinite_tag,
        {"dense_size": 0, "fallback_size": 0},
        {"max_steps": 1},
    ),
    "Auto MINRES": (
        linear.Auto,
        indefinite(N, 20.0),
        lx.symmetric_tag,
        {"dense_size": 0, "fallback_size": 0},
        {"max_steps": 1},
    ),
    "Auto GMRES": (
        linear.Auto,
        rotation_and_decay(N),
        (),
        {"dense_size": 0, "fallback_size": 0, "restart": 4},
        {"max_steps": 1},
    ),
}
ITERATIVE = [name for name in CASES if name not in ("Auto Cholesky", "Auto LU", "Auto MINRES")]
# Lineax's primitive nests the same way for all: one case a class keeps the compilations few.
DISTINCT = [name for name in CASES if name not in ("CG negative", "Auto MINRES")]
# Made of the others: their own paths only.
SIMPLE = [name for name in DISTINCT if name not in ("Refined", "Auto CG", "Auto GMRES")]
ONE_A_CLASS = ["CG", "MINRES", "Neumann", "Auto LU"]
every_case = pytest.mark.parametrize("name", CASES)


def _solver(name, *, failing=False, rtol=1e-11):
    cls, _, _, options, failing_options = CASES[name]
    return cls(**({"rtol": rtol} | options | (failing_options if failing else {})))


def _tree(vector):
    """A vector of N entries as the tree of STRUCTURE."""
    return {
        "a": vector[:4].reshape(2, 2),
        "b": vector[4],
        "empty": jnp.zeros((0, 3), vector.dtype),
        "none": None,
        "c": vector[5:],
    }


def _flat(tree):
    return jnp.concatenate([tree["a"].reshape(-1), tree["b"].reshape(1), tree["c"]])


def _operator(matrix, tags):
    structure = jax.eval_shape(lambda: _tree(matrix[0]))
    return lx.FunctionLinearOperator(lambda v: _tree(matrix @ _flat(v)), structure, tags)


def _symmetric(name, matrix):
    """What depends on the matrix must keep its tag true: differentiate through the symmetric part."""
    return (matrix + matrix.T) / 2 if CASES[name][2] != () else matrix


def _solve(name, matrix, vector, *, solver=None, throw=True, **options):
    solver = _solver(name) if solver is None else solver
    operator = _operator(_symmetric(name, matrix), CASES[name][2])
    return lx.linear_solve(operator, _tree(vector), solver, options=options, throw=throw)


@functools.cache
def _compiled(name, failing=False, rtol=1e-11):
    """One program a case, shared by the tests that look at values and failures; and its traces."""
    solver = _solver(name, failing=failing, rtol=rtol)
    traces = []

    @jax.jit
    def solve(matrix, vector):
        traces.append(None)
        solution = _solve(name, matrix, vector, solver=solver, throw=False)
        return solution.value, solution.result, solution.stats["num_steps"], solution.stats["residual_norm"]

    return solve, traces


def _data(name, rng, dtype=np.float64):
    matrix = CASES[name][1].astype(dtype)
    return jnp.asarray(matrix), jnp.asarray(rng.standard_normal(N).astype(dtype))


def test_every_public_solver_has_a_case():
    public = {
        cls
        for _, cls in inspect.getmembers(linear, inspect.isclass)
        if issubclass(cls, lx.AbstractLinearSolver) and not inspect.isabstract(cls)
    }
    public -= {linear.TruncatedSpectrum}  # no tolerance, singular operators: test_truncated.py
    assert public == {getattr(case[0], "func", case[0]) for case in CASES.values()}
    assert all(cls.__module__.startswith("curvax.linear") and cls.__doc__ for cls in public)


@pytest.mark.parametrize(
    ("name", "dtype"),
    sweep(
        [(name, dtype) for name in CASES for dtype in (np.float32, np.float64)],
        always=[(name, dtype) for name in CASES for dtype in (np.float32, np.float64)[name not in SIMPLE :]],
    ),
)
def test_value_on_trees_compiled_once(name, dtype, rng):
    solve, traces = _compiled(name, rtol=1e-11 if dtype == np.float64 else 1e-4)
    already = len(traces)
    matrix, vector = _data(name, rng, dtype)
    for scale in (1.0, 3.0, 0.0):
        rhs = vector * jnp.asarray(scale, dtype)
        value, result, num_steps, _ = solve(matrix, rhs)
        truth = np.linalg.solve(np.asarray(matrix, np.float64), np.asarray(rhs, np.float64))
        assert jax.tree.structure(value) == jax.tree.structure(_tree(vector))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(value))
        bound = 1e-9 if dtype == np.float64 else 4e-3
        np.testing.assert_allclose(_flat(value), truth, atol=bound * max(np.abs(truth).max(), 1e-30))
        assert result == lx.RESULTS.successful
        assert (num_steps == 0) or scale != 0.0
    assert len(traces) - already <= 1


@pytest.mark.parametrize("name", sweep(DISTINCT, always=[*SIMPLE, "Auto CG"]))
def test_derivatives(name, rng):
    """x' = A⁻¹(b' − A'x), b̄ = A⁻ᵀx̄, Ā = −b̄xᵀ, in one program."""
    matrix, vector = _data(name, rng)
    matrix_dot = jnp.asarray(_symmetric(name, rng.standard_normal((N, N))))
    vector_dot, cotangent = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))

    @jax.jit
    def both(matrix, vector, matrix_dot, vector_dot, cotangent):
        def solve(matrix, vector):
            return _flat(_solve(name, matrix, vector).value)

        _, tangent = jax.jvp(solve, (matrix, vector), (matrix_dot, vector_dot))
        _, pullback = jax.vjp(solve, matrix, vector)
        return tangent, pullback(cotangent)

    tangent, (matrix_bar, vector_bar) = both(matrix, vector, matrix_dot, vector_dot, cotangent)
    a = np.asarray(matrix)
    x = np.linalg.solve(a, vector)
    adjoint = np.linalg.solve(a.T, cotangent)
    outer = _symmetric(name, -np.outer(adjoint, x))
    np.testing.assert_allclose(tangent, np.linalg.solve(a, vector_dot - matrix_dot @ x), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(vector_bar, adjoint, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(matrix_bar, outer, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ONE_A_CLASS)
def test_second_derivative(name, rng):
    """d²/dt² of cᵀA(t)⁻¹b(t) along a line, forward over reverse."""
    matrix, vector = _data(name, rng)
    weights, direction = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))

    def value(t, solve):
        return weights @ solve((1 + t**2) * matrix, vector + t * direction)

    ours = jax.jit(
        lambda t: jax.jvp(
            jax.grad(lambda t: value(t, lambda m, v: _flat(_solve(name, m, v).value))), (t,), (1.0,)
        )[1]
    )
    # cᵀA⁻¹(b + t d)/(1 + t²): the second derivative by hand.
    a, b = (weights @ jnp.linalg.solve(matrix, v) for v in (vector, direction))
    t = 0.3
    truth = b * (2 * t**3 - 6 * t) / (1 + t**2) ** 3 + a * (6 * t**2 - 2) / (1 + t**2) ** 3
    np.testing.assert_allclose(ours(t), truth, rtol=1e-6)


@pytest.mark.parametrize("name", sweep(DISTINCT, always=SIMPLE))
def test_vmap_over_everything(name, rng):
    """Examples that need different numbers of steps, a zero right-hand side among them."""
    matrix, vector = _data(name, rng)
    shift = 0.5 * jnp.eye(N) if CASES[name][2] == () else jnp.zeros((N, N))
    matrices = jnp.stack([matrix, 2 * matrix, matrix + shift])
    vectors = jnp.stack([vector, 0 * vector, -vector])
    solve = jax.jit(jax.vmap(lambda m, v: _flat(_solve(name, m, v).value)))
    truth = np.linalg.solve(np.asarray(matrices), np.asarray(vectors)[..., None])[..., 0]
    np.testing.assert_allclose(solve(matrices, vectors), truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sweep(DISTINCT, always=SIMPLE))
def test_transposed_state_solves_the_transposed_system(name, rng):
    matrix, vector = _data(name, rng)
    solver = _solver(name)
    operator = _operator(matrix, CASES[name][2])

    @jax.jit
    def solve(vector):
        state, options = solver.conj(*solver.transpose(solver.init(operator, {}), {}))
        return lx.linear_solve(operator.T, _tree(vector), solver, state=state, options=options).value

    truth = np.linalg.solve(np.asarray(matrix).T, vector)
    np.testing.assert_allclose(_flat(solve(vector)), truth, rtol=1e-7, atol=1e-8)


@every_case
def test_failure_is_flagged(name, rng):
    matrix, vector = _data(name, rng)
    for failing in (False, True):  # the benign control first
        solve, _ = _compiled(name, failing)
        value, result, _, residual_norm = solve(matrix, vector)
        residual = np.linalg.norm(vector - matrix @ _flat(value))
        assert bool(result == lx.RESULTS.successful) is not failing
        np.testing.assert_allclose(residual_norm, residual, rtol=1e-6, atol=1e-12)
        # An infinite right-hand side, and not-a-number there or in the operator, are never a success.
        assert bool(solve(matrix, vector.at[2].set(jnp.inf))[1] != lx.RESULTS.successful)
        assert solve(matrix, vector.at[2].set(jnp.nan))[1] == lx.RESULTS.nonfinite_input
        assert bool(solve(matrix * jnp.nan, vector)[1] != lx.RESULTS.successful)


@pytest.mark.parametrize("name", ONE_A_CLASS)
def test_failure_raises_by_default(name, rng):
    matrix, vector = _data(name, rng)
    with pytest.raises(Exception, match="linear solve|solver steps|stagnation"):
        _solve(name, matrix, vector, solver=_solver(name, failing=True))


@pytest.mark.parametrize("name", sweep(ITERATIVE, always=["CG", "MINRES", "FGMRES", "Neumann", "Auto CG"]))
def test_start_and_preconditioner_are_used(name, rng):
    matrix, vector = _data(name, rng)
    tags = CASES[name][2]
    if tags != ():  # |A|⁻¹: definite, and the spectrum of |A|⁻¹A is ±1
        values, vectors = np.linalg.eigh(matrix)
        inverse, tags = (vectors / np.abs(values)) @ vectors.T, lx.positive_semidefinite_tag
    else:
        inverse = np.linalg.inv(matrix)
    exact = jnp.linalg.solve(matrix, vector)

    @jax.jit
    def steps(matrix, vector, inverse, exact):
        solver = _solver(name)
        warm = _solve(name, matrix, vector, solver=solver, y0=_tree(exact))
        preconditioned = _solve(name, matrix, vector, solver=solver, preconditioner=_operator(inverse, tags))
        return [s.stats["num_steps"] for s in (warm, preconditioned)], preconditioned.value

    _, _, cold, _ = _compiled(name)[0](matrix, vector)
    (warm, preconditioned), value = steps(matrix, vector, jnp.asarray(inverse), exact)
    assert warm <= 2 < cold
    assert preconditioned < cold
    np.testing.assert_allclose(_flat(value), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sweep(DISTINCT, always=[*SIMPLE, "Auto CG"]))
def test_sizes_zero_and_one(name):
    cls, matrix, tags, options, _ = CASES[name]
    sign = -1.0 if tags == lx.negative_semidefinite_tag else 1.0
    one = lx.MatrixLinearOperator(jnp.full((1, 1), sign * 2.0), tags)
    solution = lx.linear_solve(one, jnp.ones(1), cls(rtol=1e-8, **options))
    np.testing.assert_allclose(solution.value, sign * 0.5, rtol=1e-7)
    empty = lx.DiagonalLinearOperator(jnp.zeros((0,)))
    empty = lx.TaggedLinearOperator(empty, tags)
    solution = lx.linear_solve(empty, jnp.zeros((0,)), cls(rtol=1e-8, **options))
    assert solution.value.shape == (0,)


@every_case
def test_wrong_use_fails_while_tracing(name):
    cls, _, tags, options, _ = CASES[name]
    wide = lx.MatrixLinearOperator(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(wide, jnp.ones(2), cls(rtol=1e-6, **options))
    for rtol in (-1.0, 1.0):
        with pytest.raises(ValueError, match="rtol"):
            cls(rtol=rtol, **options)
    complex_operator = lx.TaggedLinearOperator(lx.MatrixLinearOperator(jnp.eye(2, dtype=complex)), tags)
    with pytest.raises(ValueError, match="real floating-point arrays, found complex128"):
        lx.linear_solve(complex_operator, jnp.ones(2, complex), cls(rtol=1e-6, **options))
    if name in ITERATIVE and name != "Refined":
        square = lx.MatrixLinearOperator(jnp.eye(2), tags)
        other = lx.MatrixLinearOperator(jnp.eye(3), lx.positive_semidefinite_tag)
        with pytest.raises(ValueError, match="preconditioner.*3 × 3 for an operator of 2 × 2"):
            lx.linear_solve(square, jnp.ones(2), cls(rtol=1e-6, **options), options={"preconditioner": other})
        with pytest.raises(ValueError, match="no option 'precondition'"):
            lx.linear_solve(square, jnp.ones(2), cls(rtol=1e-6, **options), options={"precondition": square})
        with pytest.raises(ValueError, match="y0.*shapes of the right-hand side"):
            lx.linear_solve(square, jnp.ones(2), cls(rtol=1e-6, **options), options={"y0": jnp.ones(3)})
    if cls in (linear.CG, linear.MINRES):
        untagged = lx.MatrixLinearOperator(jnp.eye(2))
        with pytest.raises(ValueError, match="tag"):
            lx.linear_solve(untagged, jnp.ones(2), cls(rtol=1e-6, **options))
