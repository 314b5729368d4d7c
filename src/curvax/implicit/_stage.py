"""One linear solve with the curvature, as the sweeps of the implicit rule need it."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import (
    tree_add,
    tree_all_finite,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax._results import RESULTS
from curvax.implicit._condition import Linearised
from curvax.implicit._family import accuracy_of, can_be_followed
from curvax.linear._cg import CG
from curvax.linear._cg_core import CGInfo, conjugate_gradient, default_max_steps, no_info
from curvax.linear._cg_scalars import INDEFINITE, NONFINITE, RUNNING, SINGULAR
from curvax.linear._recycle import Recycled, forget_if, still_fits, trial

# Products that are spent on looking for negative curvature where nothing else has excited it.
PROBE_STEPS = 10
# What one solve counts at most as progress.
MOST_DECADES = 20.0
# Up to here a matrix is formed and decomposed: beyond it conjugate gradients win for symmetric ones; for the others
# there is nothing that knows its error, which is worth more than the time of a decomposition.
DENSE_SIZE = 32
DENSE_SIZE_GENERAL = 128


class StageInfo(NamedTuple):
    """What a solve learnt and what went wrong with it; scalars.

    `residual_norm` is that of the undamped system at `reference + x`, ‖b + damping · reference − A x‖, or 0 where the
    stage does not know its error. `ritz_min` is what later solves are told of the smallest eigenvalue.
    `decades` is by how many powers of ten the residual has fallen, where that is known, `tried` whether the
    recycled directions were put to the test.
    """

    num_matvecs: Int[Array, ""]
    ritz_min: Float[Array, ""]
    curvature_min: Float[Array, ""]
    curvature_max: Float[Array, ""]
    solution_norm: Float[Array, ""]
    residual_norm: Float[Array, ""]
    singular: Bool[Array, ""]
    indefinite: Bool[Array, ""]
    exhausted: Bool[Array, ""]
    nonfinite: Bool[Array, ""]
    recycled: Recycled | None
    decades: Float[Array, ""]
    tried: Bool[Array, ""]


class Request(NamedTuple):
    """One solve: A x = b or Aᵀ x = b, plus `damping` on the diagonal, to a forward error `rtol` or `atol`.

    `reference` is what x will be added to when the error is to be relative to the sum, else None or zeros; `recycled`
    has the directions of earlier solves, to be put to the test first where A has `moved`. Where `probing` a few steps
    look for negative curvature. `preconditioner` is that of this θ.
    """

    rhs: PyTree[Array]
    wanted: Bool[Array, ""]
    transposed: Bool[Array, ""]
    correction: Bool[Array, ""]
    probing: Bool[Array, ""]
    amplified: Bool[Array, ""] | bool
    rtol: Scalar
    atol: Scalar | float
    damping: Scalar
    reference: PyTree[Array] | None
    curvature_min: Scalar | None
    recycled: Recycled | None
    moved: Bool[Array, ""]
    preconditioner: lx.AbstractLinearOperator | None

    def undamped(self, x: PyTree[Array], residual: PyTree[Array]) -> PyTree[Array]:
        """The residual of the system without damping at `reference + x`, from that of the damped one."""
        total = x if self.reference is None else tree_add(self.reference, x)
        return tree_axpy(self.damping, total, residual)


class AbstractStage(eqx.Module):
    """A way to do the solves of the sweeps."""

    @property
    @abc.abstractmethod
    def knows_its_error(self) -> bool:
        """Whether `Request.rtol` is honoured as a forward error."""

    @property
    def sees_everything(self) -> bool:
        """Whether indefinite curvature is noticed whatever the right-hand side."""
        return True

    @property
    def recycles(self) -> bool:
        """Whether the directions of one solve help the next."""
        return False

    @property
    def preconditioned_by(self) -> Any:
        """What the user gave as a preconditioner: an operator, a function, an `Upkeep` or None."""
        return None

    @property
    def preconditioned_solvers(self) -> tuple[type, ...]:
        """The solvers that it is for."""
        return ()

    @abc.abstractmethod
    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """Solve, or return anything when not `request.wanted`."""


class ConjugateGradientStage(AbstractStage):
    """Forward-tested conjugate gradients, for minima."""

    preconditioner: Any
    max_steps: int | None

    @property
    def knows_its_error(self) -> bool:
        """True: the loop stops on its forward error."""
        return True

    @property
    def preconditioned_by(self) -> Any:
        """As it was given."""
        return self.preconditioner

    @property
    def preconditioned_solvers(self) -> tuple[type, ...]:
        """Conjugate gradients."""
        return (CG,)

    @property
    def sees_everything(self) -> bool:
        """False: a Krylov space holds only what its right-hand side excites."""
        return False

    @property
    def recycles(self) -> bool:
        """True."""
        return True

    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """One run of the loop; with recycled directions up to three."""
        operator = request.preconditioner
        budget = default_max_steps(tree_size(request.rhs)) if self.max_steps is None else self.max_steps
        steps = jnp.where(request.probing, PROBE_STEPS, budget)

        def run(
            rhs: PyTree[Array], most: Array, recycled: Recycled | None, keeps: Any
        ) -> tuple[PyTree, CGInfo]:
            return conjugate_gradient(
                lambda v: tree_axpy(request.damping, v, at.apply(v)),
                rhs,
                rtol=request.rtol,
                atol=request.atol,
                max_steps=jnp.where(request.wanted, most, 0),
                preconditioner=None if operator is None else operator.mv,
                recycled=recycled,
                keeps=keeps,
                reference=request.reference,
                curvature_min=request.curvature_min,
                amplified=request.amplified,
            )

        wanted, tried = request.wanted, jnp.asarray(False)
        if request.recycled is None:
            x, info = run(request.rhs, steps, None, True)
            products, recycled = info.num_matvecs, None
        else:
            tried = wanted & request.moved
            x, info, recycled, products = _with_directions(run, request, steps, tried)
        # A residual of zero, or none to begin with, says nothing of how hard the solve was.
        telling = wanted & (info.decades > 0)
        decades = jnp.where(telling, jnp.minimum(info.decades, MOST_DECADES), 0)
        # With a preconditioner the Ritz values are those of M⁻¹A.
        plain = operator is None and request.recycled is None
        return x, StageInfo(
            num_matvecs=products,
            ritz_min=info.lowest,
            # A poor bound from below would make the estimate of the error a poor one too.
            curvature_min=info.lowest if operator is None else info.rayleigh,
            curvature_max=info.curvature_max if plain else info.norm,
            solution_norm=info.solution_norm,
            residual_norm=tree_norm(request.undamped(x, info.residual)),
            singular=wanted & (info.status == SINGULAR),
            indefinite=wanted & (info.status == INDEFINITE),
            exhausted=wanted & (info.status == RUNNING),
            nonfinite=wanted & (info.status == NONFINITE),
            recycled=recycled,
            decades=decades,
            tried=tried,
        )


def _with_directions(
    run: Callable[..., tuple[PyTree, CGInfo]], request: Request, steps: Array, tries: Bool[Array, ""]
) -> tuple[PyTree[Array], CGInfo, Any, Int[Array, ""]]:
    """A trial of the directions if A has moved, the solve, and the solve without them if it failed.

    All are turns of one loop, so that the compiler sees conjugate gradients once.
    """
    kept = request.recycled
    assert kept is not None
    init = (
        tries & (kept.count > 0),
        jnp.asarray(True),
        tree_zeros_like(request.rhs),
        no_info(request.rhs, kept),
        jnp.zeros((), jnp.int32),
    )

    def attempt(carry: Any) -> Any:
        trying, _, _, before, products = carry
        held = before.recycled
        info: Any
        rhs = tree_where(trying, trial(held), request.rhs)
        x, info = run(rhs, jnp.where(trying, 1, steps), held, ~trying)
        # Negative curvature has a witness, whatever the directions: it is not looked for again.
        spent = (info.status == RUNNING) & ~request.probing
        failed = (info.status == SINGULAR) | (info.status == NONFINITE) | spent
        again = request.wanted & ~trying & failed & (held.count > 0)
        outlived = trying & ~still_fits(info.decades, info.curvature_min)
        info = info._replace(recycled=forget_if(again | outlived, info.recycled))
        return jnp.zeros_like(trying), trying | again, x, info, products + info.num_matvecs

    _, _, x, info, products = jax.lax.while_loop(lambda carry: carry[1], attempt, init)
    return x, info, info.recycled, products


class DenseStage(AbstractStage):
    """The matrix formed from n products and decomposed, for few unknowns.

    Eigendecomposition when symmetric, singular values otherwise: both tell exactly what is wrong with A.
    """

    symmetric: bool

    @property
    def knows_its_error(self) -> bool:
        """True: exact up to rounding."""
        return True

    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """Form, decompose, solve."""
        rhs, unravel = jax.flatten_util.ravel_pytree(request.rhs)
        dtype, size = rhs.dtype, rhs.size
        columns = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(at.apply(unravel(v)))[0])(
            jnp.eye(size, dtype=dtype)
        )
        matrix = columns.T + request.damping.astype(dtype) * jnp.eye(size, dtype=dtype)
        finite = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(rhs))
        matrix = jnp.where(finite, matrix, jnp.eye(size, dtype=dtype))
        floor = max(size, 4) ** 0.5 * jnp.finfo(dtype).eps
        if self.symmetric:
            values, left = jnp.linalg.eigh(matrix)
            right = left
            indefinite = jnp.min(values) < -floor * jnp.max(jnp.abs(values))
        else:
            left, values, right_t = jnp.linalg.svd(matrix)
            left, right = (
                jnp.where(request.transposed, right_t.T, left),
                jnp.where(request.transposed, left, right_t.T),
            )
            indefinite = jnp.asarray(False)
        magnitudes = jnp.abs(values)
        smallest, largest = jnp.min(magnitudes), jnp.max(magnitudes)
        singular = ~(smallest > floor * largest)
        safe = jnp.where(magnitudes > 0, values, 1)
        exact = jax.lax.Precision.HIGHEST
        x = unravel(jnp.matmul(right, jnp.matmul(left.T, rhs, precision=exact) / safe, precision=exact))
        wanted = request.wanted
        applied = jnp.matmul(
            jnp.where(request.transposed, matrix.T, matrix),
            jax.flatten_util.ravel_pytree(x)[0],
            precision=exact,
        )
        residual = request.undamped(x, tree_sub(request.rhs, unravel(applied)))
        return x, StageInfo(
            num_matvecs=jnp.where(wanted, size, 0),
            ritz_min=smallest,
            curvature_min=jnp.where(indefinite, jnp.min(values), smallest),
            curvature_max=largest,
            solution_norm=tree_norm(x),
            residual_norm=tree_norm(residual),
            singular=wanted & singular & finite,
            indefinite=wanted & indefinite & ~singular & finite,
            exhausted=jnp.asarray(False),
            nonfinite=wanted & ~finite,
            recycled=request.recycled,
            decades=jnp.zeros_like(request.rtol),
            tried=jnp.asarray(False),
        )


class LineaxStage(AbstractStage):
    """Any Lineax solver. Its tolerance is its own, so the sweeps judge it by their contraction."""

    solver: lx.AbstractLinearSolver
    preconditioner: Any
    symmetric: bool

    @property
    def knows_its_error(self) -> bool:
        """False: a residual test says nothing about the forward error."""
        return False

    @property
    def preconditioned_by(self) -> Any:
        """As it was given."""
        return self.preconditioner

    @property
    def preconditioned_solvers(self) -> tuple[type, ...]:
        """The user's."""
        return (type(self.solver),)

    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """One `lineax.linear_solve`, skipped when not wanted."""
        structure = jax.eval_shape(lambda x: x, request.rhs)
        options = {}
        operator = request.preconditioner

        def run(transposed: bool, damping: Scalar) -> tuple[PyTree[Array], Array, Array]:
            apply = (lambda v: at.transposed(v)[0]) if transposed else at.apply
            tags = (
                frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag}) if self.symmetric else frozenset()
            )
            matrix = lx.FunctionLinearOperator(lambda v: tree_axpy(damping, v, apply(v)), structure, tags)
            if operator is not None:
                options["preconditioner"] = operator.transpose() if transposed else operator
            state = self.solver.init(matrix, options)
            solution = lx.linear_solve(
                matrix, request.rhs, self.solver, options=options, state=state, throw=False
            )
            steps = solution.stats.get("num_steps", tree_size(request.rhs))
            singular = solution.result == lx.RESULTS.singular
            if not self.solver.assume_full_rank():
                # Of a system without a solution it returns what passes for one.
                forwards = self.solver.transpose(state, options) if transposed else (state, options)
                singular |= ~self._followed(at, damping, *forwards)
            failed = (solution.result != lx.RESULTS.successful) & ~singular
            return solution.value, jnp.asarray(steps), jnp.stack([singular, failed])

        def either() -> tuple[PyTree[Array], Array, Array]:
            if self.symmetric:
                return run(False, request.damping)
            like = jax.eval_shape(lambda: run(True, request.damping))
            backwards = jax.lax.cond(
                request.transposed, lambda: run(True, request.damping), lambda: tree_zeros_like(like)
            )
            after = _after(backwards[0], request.damping)
            return jax.lax.cond(request.transposed, lambda: backwards, lambda: run(False, after))

        like = jax.eval_shape(either)
        x, steps, flags = run_if(request.wanted, lambda _: either(), tree_zeros_like(like))
        dtype = tree_dtype(request.rhs)
        given = tree_all_finite(request.rhs)
        finite = tree_all_finite(x) & given
        size = tree_norm(x)
        # All that is known of the curvature is how much each solve has magnified its right-hand side.
        stretch = tree_norm(request.rhs) / jnp.where(size > 0, size, 1)
        known = request.wanted & (size > 0)
        return x, StageInfo(
            num_matvecs=steps,
            ritz_min=jnp.asarray(jnp.inf, dtype),
            curvature_min=jnp.where(known, stretch, jnp.inf),
            curvature_max=jnp.where(known, stretch, 0),
            solution_norm=size,
            residual_norm=jnp.zeros((), dtype),
            singular=request.wanted & flags[0] & given,
            # Free, if blind to all directions but one: a positive definite A has xᵀAx > 0.
            indefinite=known & self.symmetric & (tree_dot(x, request.rhs) < 0),
            exhausted=request.wanted & flags[1],
            nonfinite=request.wanted & ~flags[0] & ~finite,
            recycled=request.recycled,
            decades=jnp.zeros_like(request.rtol),
            tried=jnp.asarray(False),
        )

    def _followed(self, at: Linearised, damping: Scalar, state: Any, options: Any) -> Bool[Array, ""]:
        """Whether there is a derivative, where A may be singular."""
        return can_be_followed(
            lambda v: tree_axpy(damping, v, at.apply(v)),
            lambda v: self.solver.compute(state, v, options)[0],
            lambda z: at.transposed(z)[1],
            at.residual,
            accuracy_of(self.solver),
        )


class CheckedStage(AbstractStage):
    """The user's solver for the adjoint, a solver that knows its error for the corrections that judge it.

    A residual test says nothing about the forward error, and most solvers do not notice that a
    curvature is indefinite.
    """

    first: LineaxStage
    check: AbstractStage

    @property
    def knows_its_error(self) -> bool:
        """True: of the corrections, which is what the estimate is made of."""
        return True

    @property
    def preconditioned_by(self) -> Any:
        """As the user's solver, whose it is; the solver that checks uses it too."""
        return self.first.preconditioner

    @property
    def preconditioned_solvers(self) -> tuple[type, ...]:
        """Both."""
        return self.first.preconditioned_solvers + self.check.preconditioned_solvers

    @property
    def sees_everything(self) -> bool:
        """As the solver that checks."""
        return self.check.sees_everything

    @property
    def recycles(self) -> bool:
        """As the solver that checks."""
        return self.check.recycles

    def solve(self, at: Linearised, request: Request) -> tuple[PyTree[Array], StageInfo]:
        """One of the two, by what is solved for."""
        own = request._replace(wanted=request.wanted & ~request.correction)
        checking = request._replace(wanted=request.wanted & request.correction)
        x_own, info_own = self.first.solve(at, own)
        x, info = self.check.solve(at, checking._replace(damping=_after(x_own, request.damping)))
        # What the user's solver knows of the curvature is less than what the check knows.
        info_own = info_own._replace(
            curvature_min=jnp.full_like(info_own.curvature_min, jnp.inf),
            curvature_max=jnp.zeros_like(info_own.curvature_max),
            recycled=info.recycled,
        )
        matched = jax.tree.map(lambda a, b: a.astype(b.dtype), info_own, info)
        return tree_where(request.correction, x, x_own), tree_where(request.correction, info, matched)


def _after(x: PyTree[Array], damping: Scalar) -> Scalar:
    """`damping` for a solve that is to begin when that of x is done.

    Batched LAPACK calls at the same time may wait for each other for ever (docs/sharp-bits.md). Of two solves one is
    wanted, the other returns zero; by `vmap` both are made, and one is taken: no NaN of x gets into the other's result.
    """
    return jnp.where(tree_all_finite(x), damping, jnp.nan)


def why_failed(info: StageInfo) -> RESULTS:
    """The result of a solve that broke down or spent its budget."""
    budget = RESULTS.where(info.indefinite, RESULTS.indefinite_curvature, RESULTS.adjoint_not_converged)
    return RESULTS.where(
        info.nonfinite, RESULTS.nonfinite, RESULTS.where(info.singular, RESULTS.singular_curvature, budget)
    )
