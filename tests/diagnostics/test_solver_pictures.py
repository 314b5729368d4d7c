"""Histories of linear solvers: true residuals and true counts; their picture, and that of a pattern."""

import io

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse

from curvax.diagnostics._solver_histories import SolverHistory, _Counted, _Counter, solver_histories
from curvax.diagnostics._solver_picture import plot_solvers
from curvax.diagnostics._sparsity_picture import plot_sparsity
from curvax.linear import CG, Neumann
from curvax.operators import hessian
from helpers.dense import rotated

PSD = lx.positive_semidefinite_tag
N = 40
MATRIX = rotated(np.geomspace(0.02, 1.0, N), np.random.default_rng(0))
VECTOR = np.random.default_rng(1).standard_normal(N)
OPERATOR = lx.MatrixLinearOperator(jnp.asarray(MATRIX), PSD)


def png(figure):
    """The figure as bytes, which runs the whole renderer (warnings are errors)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def reference_cg(steps):
    """Relative residual norms of textbook conjugate gradients in NumPy."""
    x, r = np.zeros(N), VECTOR.copy()
    p, norms = r.copy(), [1.0]
    for _ in range(steps):
        image = MATRIX @ p
        alpha = (r @ r) / (p @ image)
        x, new = x + alpha * p, r - alpha * image
        p, r = new + (new @ new) / (r @ r) * p, new
        norms.append(np.linalg.norm(VECTOR - MATRIX @ x) / np.linalg.norm(VECTOR))
    return np.array(norms)


def test_cg_has_the_residuals_of_the_textbook():
    """Step k of conjugate gradients, by number of products; one of Lineax's is spent on the start."""
    found = solver_histories(
        OPERATOR,
        jnp.asarray(VECTOR),
        {"cx": CG(1e-6), "lx": lx.CG(rtol=1e-6, atol=0.0, stabilise_every=None)},
    )
    truth = reference_cg(60)
    for name, ahead in (("cx", 0), ("lx", 1)):
        history = found[name]
        assert history.converged and history.message == "" and history.products[0] == 0
        assert np.all(np.diff(history.products) > 0) and history.residuals[-1] < 1e-5
        early = (history.products > ahead) & (history.products <= 20)
        np.testing.assert_allclose(
            history.residuals[early], truth[history.products[early] - ahead], rtol=1e-6
        )


class Unrolled(lx.AbstractLinearSolver):
    """Richardson's iteration in a Python loop: it must know its budget while it is traced."""

    max_steps: int = 100

    def init(self, operator, options):
        return operator

    def compute(self, state, vector, options):
        x = jnp.zeros_like(vector)
        for _ in range(self.max_steps):
            x = x + (vector - state.mv(x))
        small = jnp.linalg.norm(vector - state.mv(x)) < 1e-1
        return x, lx.RESULTS.where(small, lx.RESULTS.successful, lx.RESULTS.max_steps_reached), {}

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True


def test_all_products_count():
    """A transpose, the choice of a step, a matrix written out, and a budget that is known while tracing."""
    solvers = {
        "normal": lx.Normal(lx.CG(rtol=1e-3, atol=0.0)),
        "neumann": Neumann(1e-9),
        "lu": lx.LU(),
        "unrolled": Unrolled(),
    }
    found = solver_histories(OPERATOR, jnp.asarray(VECTOR), solvers, max_products=60)
    assert found["normal"].products[1] >= 4
    assert found["neumann"].products[1] > 20 and not found["neumann"].converged
    assert "maximum number" in found["neumann"].message
    assert found["lu"].products.tolist() == [N] and found["lu"].residuals[0] < 1e-12
    history = found["unrolled"]
    assert history.products.tolist() == [0, 2, 3, 5, 9, 17, 33, 65]
    values, vectors = np.linalg.eigh(MATRIX)
    for steps, residual in zip([0, 1, 2, 4, 8, 16, 32, 64], history.residuals, strict=True):
        expected = np.linalg.norm((1 - values) ** steps * (vectors.T @ VECTOR)) / np.linalg.norm(VECTOR)
        assert residual == pytest.approx(expected, rel=1e-8)


def test_vectors_side_by_side_are_counted_one_by_one():
    counter = _Counter()
    counted = _Counted(OPERATOR, counter)
    block = jax.jit(jax.vmap(jax.vmap(counted.mv)))(jnp.ones((3, 2, N)))
    block.block_until_ready()
    jax.effects_barrier()
    assert counter.count == 6
    np.testing.assert_allclose(counted.transpose().mv(jnp.ones(N)), MATRIX.T @ np.ones(N))


def test_preconditioner_and_start():
    """Options are passed on; a history starts at the residual of the start."""
    inverse = lx.MatrixLinearOperator(jnp.asarray(np.linalg.inv(MATRIX)), PSD)
    start = jnp.asarray(np.linalg.solve(MATRIX, VECTOR) + 0.1)
    solver = CG(1e-8)
    found = solver_histories(
        OPERATOR,
        jnp.asarray(VECTOR),
        {"exact": (solver, {"preconditioner": inverse}), "start": (solver, {"y0": start})},
    )
    assert found["exact"].products[-1] <= 3
    residual = np.linalg.norm(VECTOR - MATRIX @ np.asarray(start)) / np.linalg.norm(VECTOR)
    assert found["start"].residuals[0] == pytest.approx(residual)


def test_wrong_arguments():
    vector = jnp.asarray(VECTOR)
    with pytest.raises(ValueError, match="empty"):
        solver_histories(OPERATOR, vector, {})
    with pytest.raises(ValueError, match="max_products"):
        solver_histories(OPERATOR, vector, {"CG": CG(1e-6)}, max_products=0)
    with pytest.raises(ValueError, match="like the output"):
        solver_histories(OPERATOR, vector[:-1], {"CG": CG(1e-6)})
    for bad in (0 * vector, jnp.nan * vector):
        with pytest.raises(ValueError, match="zero or not finite"):
            solver_histories(OPERATOR, bad, {"CG": CG(1e-6)})
    with pytest.raises(TypeError, match="either an operator"):
        plot_solvers(OPERATOR, vector)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_solvers({})


def test_picture_of_solvers():
    """Labels tell success and number of products; what a log axis cannot show is marked."""
    histories = {
        "good": SolverHistory(np.array([0, 3, 9]), np.array([1.0, 1e-3, 1e-8]), True, ""),
        "bad": SolverHistory(np.array([0, 5, 8]), np.array([1.0, np.nan, 0.5]), False, "diverged"),
        "direct": SolverHistory(np.array([7]), np.array([0.0]), True, ""),
    }
    figure = plot_solvers(histories, tolerance=1e-6, title="Solvers")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "products with A"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [
        "good: 9 products",
        "bad: gave up after 8 products",
        "direct: 7 products",
        "tolerance 1e-06",
    ]
    markers = [line.get_marker() for line in axes.lines]
    assert "X" in markers and "x" in markers and "v" in markers
    assert png(figure).startswith(b"\x89PNG")
    drawn = plot_solvers(OPERATOR, jnp.asarray(VECTOR), {"LU": lx.LU()})
    assert "LU: 40 products" in drawn.axes[0].get_legend().get_texts()[0].get_text()


def cells(figure):
    return np.asarray(figure.axes[0].images[0].get_array()) > 0


def test_pattern_of_an_operator():
    """The Hessian of a chain and a separate leaf: tridiagonal and diagonal blocks, leaves named."""

    def loss(theta):
        return jnp.sum(jnp.diff(theta["path"]) ** 4) + jnp.sum(theta["offset"] ** 2)

    theta = {"path": jnp.arange(6.0) ** 2, "offset": jnp.ones(3)}
    figure = plot_sparsity(hessian(loss, theta), title="Hessian")
    expected = np.zeros((9, 9), bool)
    expected[:3, :3] = np.eye(3)
    i = np.arange(6)
    expected[3:, 3:] = np.abs(i[:, None] - i) <= 1
    np.testing.assert_array_equal(cells(figure), expected)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["offset\n(3)", "path\n(6)"]
    assert axes.get_title() == "9 × 9, 19 entries (23.5 %)"
    assert png(figure).startswith(b"\x89PNG")


def test_pattern_of_matrices():
    """Arrays with noise and NaN, wide ones, and large sparse ones, of which no entry gets lost."""
    noisy = np.array([[1.0, 1e-9, 0.0], [np.nan, 0.0, 2.0]])
    figure = plot_sparsity(noisy, threshold=1e-6)
    np.testing.assert_array_equal(cells(figure), [[True, False, False], [True, False, True]])
    assert "1 of them not finite" in figure.axes[0].get_title()
    assert cells(plot_sparsity(noisy)).sum() == 4
    n = 50_000
    large = scipy.sparse.coo_array((np.ones(3), ([0, 25_000, n - 1], [n - 1, 0, 1])), shape=(n, n))
    seen = cells(plot_sparsity(large))
    assert seen.shape == (596, 596) and seen.sum() == 3  # cells of 84 × 84 entries
    assert seen[0, -1] and seen[25_000 // 84, 0] and seen[-1, 0]
    png(plot_sparsity(np.ones((2, 200))))


def test_patterns_refused():
    with pytest.raises(ValueError, match="max_size"):
        plot_sparsity(OPERATOR, max_size=10)
    with pytest.raises(ValueError, match="threshold"):
        plot_sparsity(OPERATOR, threshold=-1.0)
    with pytest.raises(TypeError, match="two dimensions"):
        plot_sparsity(np.ones(3))
    with pytest.raises(TypeError, match="list"):
        plot_sparsity([[1.0]])
    with pytest.raises(ValueError, match="no entries"):
        plot_sparsity(np.ones((0, 3)))
