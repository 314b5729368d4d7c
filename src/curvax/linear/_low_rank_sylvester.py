"""Sylvester equations with a right-hand side of low rank: Galerkin projection on (extended) block Krylov spaces."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, Scalar

from curvax.linear._bartels_stewart import check_schur, factorise, product, solve
from curvax.operators._structured import is_symmetric

MatVec = Callable[[Array], Array]

_FAILED = (
    "`{name}`: the low-rank iteration did not reach `rtol`. Allow more `max_steps`, pass operators for the inverses, "
    "check that the symmetric parts of the matrices are definite with one sign and that all arguments are finite, or "
    "loosen `rtol`. `throw=False` returns what was found, with its `result` and `residual_norm`."
)


class LowRankSolution(eqx.Module):
    """X = left @ right.T of a Sylvester equation, and how good it is.

    Attributes:
        left: Array (n, K) for K = steps allowed × columns a step. The columns come in falling order of their
            contribution to X; those from `rank` on are zero.
        right: Array (m, K), likewise.
        rank: Number of columns that are not zero.
        residual_norm: ‖AX + XB − C‖/‖C‖ in the Frobenius norm, computed from the factors of the result.
        error_estimate: An estimate of ‖X − X*‖/‖X‖: the residual divided by the smallest (λ + μ) of the symmetric
            parts of A and B as far as the Krylov spaces know them. A bound if they do; infinite where that is not
            positive (or negative for all).
        num_steps: Steps taken.
        result: `lineax.RESULTS.successful`, `max_steps_reached`, `breakdown` (the spaces cannot grow, or rounding
            keeps the residual above `rtol`), or `nonfinite_input`.
    """

    left: Float[Array, "n K"]
    right: Float[Array, "m K"]
    rank: Int[Array, ""]
    residual_norm: Float[Array, ""]
    error_estimate: Float[Array, ""]
    num_steps: Int[Array, ""]
    result: lx.RESULTS


class _Space(eqx.Module):
    """An orthonormal basis V, with zero columns where nothing is (yet), A V and VᵀAV."""

    basis: Float[Array, "n K"]
    images: Float[Array, "n K"]
    projected: Float[Array, "K K"]


class _Side(eqx.Module):
    """One of the two sides: products with A (or Bᵀ), with the inverse, and the factor of C."""

    product: lx.AbstractLinearOperator
    inverse: lx.AbstractLinearOperator | None
    factor: Float[Array, "n r"]

    @property
    def width(self) -> int:
        """Columns that a step adds."""
        return self.factor.shape[1] * (1 if self.inverse is None else 2)


def solve_low_rank(
    name: str,
    A: lx.AbstractLinearOperator,
    B: lx.AbstractLinearOperator | None,
    left: Float[Array, "n r"],
    right: Float[Array, "m r"],
    inverses: tuple[lx.AbstractLinearOperator, lx.AbstractLinearOperator] | None,
    rtol: float | None,
    max_steps: int | None,
    throw: bool,
) -> LowRankSolution:
    """A X + X B = `left` `right`ᵀ; B of None is Aᵀ, and `right` then `left`."""
    if left.shape[1] == 0 or min(left.shape[0], right.shape[0]) == 0:
        raise ValueError(
            f"The right-hand side of `{name}` has no column or no row, found factors of shapes {left.shape} and "
            f"{right.shape}. Its solution is zero."
        )
    if rtol is None:
        rtol = 1e-8 if left.dtype == jnp.float64 else 1e-4
    if not 0 < rtol < 1:
        raise ValueError(f"`rtol` of `{name}` must lie in (0, 1), found {rtol}.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` of `{name}` must be at least 1, found {max_steps}.")
    if inverses is not None and len(inverses) != 2:
        raise ValueError(f"`inverses` of `{name}` must be a pair of operators, found {len(inverses)}.")
    for operator, inverse in zip((A, B), inverses or (), strict=False):
        if operator is not None and inverse.in_structure() != operator.in_structure():
            raise ValueError(
                f"The inverses of `{name}` must be operators between the same vectors as A and B, found "
                f"{inverse.in_structure()} for {operator.in_structure()}."
            )
    for label, operator in (("A", A), ("B", B)):
        if operator is not None and not is_symmetric(operator):
            check_schur(name, label, left)
    sides = [_Side(A, None if inverses is None else inverses[0], left)]
    if B is not None:
        inverse = None if inverses is None else inverses[1].transpose()
        sides.append(_Side(B.transpose(), inverse, right))
    symmetric = tuple(is_symmetric(side.product) for side in sides)
    steps = max(-(-side.factor.shape[0] // side.width) for side in sides)
    steps = min(50 if max_steps is None else max_steps, steps)
    solution = _solve(tuple(sides), symmetric, rtol, steps)
    if not throw:
        return solution
    one = jnp.ones((), left.dtype)
    one = eqx.error_if(one, solution.result != lx.RESULTS.successful, _FAILED.format(name=name))
    return eqx.tree_at(lambda s: s.left, solution, solution.left * one)


@eqx.filter_custom_jvp
@eqx.filter_jit
def _solve(
    sides: tuple[_Side, ...], symmetric: tuple[bool, ...], rtol: float, max_steps: int
) -> LowRankSolution:
    norm = _product_norm(sides[0].factor, sides[-1].factor)

    def unfinished(carry: Any) -> Bool[Array, ""]:
        step, _, _, residual, growing = carry
        return (step < max_steps) & ~(residual <= rtol / 2 * norm) & growing

    def advance(carry: Any) -> Any:
        # The small equation costs more than a step does: it is solved after every fifth of the steps so far.
        step, spaces, *_ = carry
        goal = jnp.minimum(jnp.maximum(step + 1, step + step // 5), max_steps)

        def grow(k: Array, spaces: tuple[_Space, ...]) -> tuple[_Space, ...]:
            return tuple(_grown(side, space, k) for side, space in zip(sides, spaces, strict=True))

        return state(goal, jax.lax.fori_loop(step, goal, grow, spaces))

    def state(step: Array, spaces: tuple[_Space, ...]) -> Any:
        small = _galerkin(sides, spaces, symmetric)
        growing = jnp.any(
            jnp.stack(
                [jnp.any(_block(s.basis, d, step - 1) != 0) for s, d in zip(spaces, sides, strict=True)]
            )
        )
        return step, spaces, small, _residual(sides, spaces, small, step), growing

    first = tuple(_grown(side, _empty(side, max_steps), jnp.asarray(0)) for side in sides)
    step, spaces, small, _, growing = jax.lax.while_loop(unfinished, advance, state(jnp.asarray(1), first))
    left, right, weights = _split(spaces, small, rtol / 10 * norm)
    residual = _true_residual(sides, spaces, left, right)
    gap = _gap(spaces)
    found = jnp.sqrt(jnp.sum(weights**2))
    estimate = jnp.where(gap > 0, residual / (gap * found), jnp.inf)
    relative = jnp.where(norm > 0, residual / jnp.where(norm > 0, norm, 1), residual)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(side.factor)) for side in sides]))
    spent = (step >= max_steps) & growing
    result = lx.RESULTS.where(spent, lx.RESULTS.max_steps_reached, lx.RESULTS.breakdown)
    result = lx.RESULTS.where(relative <= rtol, lx.RESULTS.successful, result)
    result = lx.RESULTS.where(finite, result, lx.RESULTS.nonfinite_input)
    return LowRankSolution(
        left=product(spaces[0].basis, left),
        right=product(spaces[-1].basis, right),
        rank=jnp.sum(weights > 0),
        residual_norm=relative,
        error_estimate=jnp.where(found > 0, estimate, 0),
        num_steps=step,
        result=result,
    )


@_solve.def_jvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "A low-rank solution of a Sylvester or Lyapunov equation has no derivative. For one, pass the right-hand "
        "side as an array; or apply `jax.lax.stop_gradient` to the arguments."
    )


def _empty(side: _Side, max_steps: int) -> _Space:
    size, dtype = max_steps * side.width, side.factor.dtype
    tall = jnp.zeros((side.factor.shape[0], size), dtype)
    return _Space(tall, tall, jnp.zeros((size, size), dtype))


def _block(matrix: Float[Array, "n K"], side: _Side, step: Array) -> Float[Array, "n s"]:
    return jax.lax.dynamic_slice_in_dim(matrix, step * side.width, side.width, 1)


def _grown(side: _Side, space: _Space, step: Array) -> _Space:
    """One more block: A times the first half of the last one, A⁻¹ times the second; at first the factor of C.

    The halves are made orthonormal one after the other, so that A V stays within the space after one more step.
    """
    r = side.factor.shape[1]
    last = jnp.maximum(step - 1, 0)
    candidates = [jnp.where(step == 0, side.factor, _block(space.images, side, last)[:, :r])]
    if side.inverse is not None:
        before = jnp.where(step == 0, side.factor, _block(space.basis, side, last)[:, r:])
        candidates.append(_columns(side.inverse.mv, before))
    basis, images = space.basis, space.images
    for half, candidate in enumerate(candidates):
        new = _orthonormal(candidate, basis)
        place = step * side.width + half * r
        basis = jax.lax.dynamic_update_slice_in_dim(basis, new, place, 1)
        images = jax.lax.dynamic_update_slice_in_dim(images, _columns(side.product.mv, new), place, 1)
    place = step * side.width
    tail, tail_images = _block(basis, side, step), _block(images, side, step)
    projected = jax.lax.dynamic_update_slice_in_dim(space.projected, product(basis.T, tail_images), place, 1)
    projected = jax.lax.dynamic_update_slice_in_dim(projected, product(tail.T, images), place, 0)
    return _Space(basis, images, projected)


def _columns(mv: MatVec, matrix: Float[Array, "n s"]) -> Float[Array, "n s"]:
    return jax.vmap(mv, in_axes=1, out_axes=1)(matrix)


def _orthonormal(candidate: Float[Array, "n s"], basis: Float[Array, "n K"]) -> Float[Array, "n s"]:
    """An orthonormal basis of what is new in `candidate`; zero columns where it has less than s dimensions."""
    size = jnp.sqrt(jnp.sum(candidate**2))
    new = candidate / jnp.where(size > 0, size, 1)
    eps = jnp.finfo(new.dtype).eps
    # Twice is enough; the third time for what is left after cancellation and scaled up again.
    for floor in (None, 100 * eps, 0.5):
        new = new - product(basis, product(basis.T, new))
        if floor is not None:
            directions, sizes, _ = jnp.linalg.svd(new, full_matrices=False)
            short = new.shape[1] - sizes.shape[0]  # more columns than rows
            directions = jnp.pad(directions, ((0, 0), (0, short)))
            new = jnp.where(jnp.pad(sizes, (0, short)) > floor, directions, 0)
    # A NaN is larger than no floor: it must not look like the end of the space.
    return jnp.where(jnp.isfinite(size), new, jnp.nan)


def _filled(space: _Space, value: Scalar) -> Float[Array, "K K"]:
    """VᵀAV, with `value` on the diagonal for columns of zeros."""
    nothing = jnp.all(space.basis == 0, axis=0)
    return space.projected + jnp.diag(jnp.where(nothing, value, 0))


def _galerkin(
    sides: tuple[_Side, ...], spaces: tuple[_Space, ...], symmetric: tuple[bool, ...]
) -> Float[Array, "K L"]:
    """Y with H Y + Y Gᵀ = (VᵀU)(WᵀV)ᵀ for H = VᵀAV and G = WᵀBᵀW."""
    large = 2 * jnp.linalg.norm(spaces[0].projected) + 2 * jnp.linalg.norm(spaces[-1].projected) + 1
    factors = []
    for space, is_sym in zip(spaces, symmetric, strict=True):
        matrix = _filled(space, large)
        factors.append(factorise((matrix + matrix.T) / 2 if is_sym else matrix, is_sym))
    inside = [product(space.basis.T, side.factor) for side, space in zip(sides, spaces, strict=True)]
    return solve(factors[0], factors[-1].transpose(), product(inside[0], inside[-1].T))


def _residual(
    sides: tuple[_Side, ...], spaces: tuple[_Space, ...], small: Float[Array, "K L"], step: Array
) -> Scalar:
    """‖A X + X B − C‖ in exact arithmetic: only the last blocks of A V and BᵀW reach out of the spaces."""
    total = jnp.zeros((), small.dtype)
    for i, weights in ((0, small), (-1, small.T)):
        space, side = spaces[i], sides[i]
        images = _block(space.images, side, step - 1)
        outside = images - product(space.basis, product(space.basis.T, images))
        inner = jax.lax.dynamic_slice_in_dim(weights, (step - 1) * side.width, side.width, 0)
        total = total + jnp.sum(product(outside, inner) ** 2)
    return jnp.sqrt(total)


def _split(
    spaces: tuple[_Space, ...], small: Float[Array, "K L"], allowed: Scalar
) -> tuple[Float[Array, "K k"], Float[Array, "L k"], Float[Array, " k"]]:
    """Y = L Rᵀ and the singular values, without those that together change the residual by at most `allowed`."""
    if len(spaces) == 1:
        values, vectors = jnp.linalg.eigh((small + small.T) / 2)
        order = jnp.argsort(-jnp.abs(values))
        values, left = values[order], vectors[:, order]
        sizes, right = jnp.abs(values), left
        left = left * jnp.where(values < 0, -1, 1).astype(values.dtype)
    else:
        left, sizes, transposed = jnp.linalg.svd(small, full_matrices=False)
        right = transposed.T
    scale = jnp.linalg.norm(spaces[0].images) + jnp.linalg.norm(spaces[-1].images)
    floor = allowed / (jnp.where(scale > 0, scale, 1) * math.sqrt(sizes.shape[0]))
    sizes = jnp.where(sizes <= floor, 0, sizes)
    return left * jnp.sqrt(sizes), right * jnp.sqrt(sizes), sizes


def _true_residual(
    sides: tuple[_Side, ...],
    spaces: tuple[_Space, ...],
    left: Float[Array, "K k"],
    right: Float[Array, "L k"],
) -> Scalar:
    """‖[AL, L, U] [R, BᵀR, −V]ᵀ‖ for the X = L Rᵀ that is returned."""
    (a, b), (u, v) = (spaces[0], spaces[-1]), (sides[0].factor, sides[-1].factor)
    first = jnp.concatenate([product(a.images, left), product(a.basis, left), u], axis=1)
    second = jnp.concatenate([product(b.basis, right), product(b.images, right), -v], axis=1)
    return _product_norm(first, second)


def _product_norm(first: Float[Array, "n k"], second: Float[Array, "m k"]) -> Scalar:
    """‖first secondᵀ‖ without the product, and without squares, which would lose half of the digits."""
    triangles = jnp.linalg.qr(first, mode="r"), jnp.linalg.qr(second, mode="r")
    return jnp.linalg.norm(product(triangles[0], triangles[1].T))


def _gap(spaces: tuple[_Space, ...]) -> Scalar:
    """The smallest |λ + μ| for Ritz values λ, μ of the symmetric parts, if all have one sign; else not positive."""

    def smallest(sign: int) -> Scalar:
        total = jnp.zeros((), spaces[0].basis.dtype)
        for i in (0, -1):
            large = 2 * jnp.linalg.norm(spaces[i].projected)
            matrix = _filled(_signed(spaces[i], sign), large)
            total = total + jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        return total

    return jnp.maximum(smallest(1), smallest(-1))


def _signed(space: _Space, sign: int) -> _Space:
    return _Space(space.basis, space.images, sign * space.projected)
