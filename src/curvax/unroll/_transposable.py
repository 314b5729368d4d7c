"""A linear map that brings its own transpose, as one primitive that every transformation of JAX passes through.

JAX has no public call for it: `linear_call` cannot be batched, `custom_vjp` has no forward mode, and neither can be
differentiated in reverse twice. The rules below are all that is needed: the derivative of an application is an
application to the tangent plus an ordinary derivative in what the map depends on; the transpose swaps the two maps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree


def transposable(
    apply: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
    transpose: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
    given: PyTree[Array],
    vector: PyTree[Array],
) -> PyTree[Array]:
    """`apply(given, vector)`, whose transpose in `vector` is computed by `transpose`.

    Args:
        apply: (given, v) ↦ A v, linear in v and differentiable in `given`; floating-point arrays out.
        transpose: (given, c) ↦ Aᵀ c, shaped like v.
        given: What the map depends on; arrays of any dtype.
        vector: v; floating-point arrays.

    Neither function may close over traced arrays: hand them over in `given`.
    """
    forward, out = jax.make_jaxpr(apply, return_shape=True)(given, vector)
    backward = jax.make_jaxpr(transpose)(given, out)
    flat = jax.tree.leaves(given)
    leaves = _transposable.bind(
        *flat, *jax.tree.leaves(vector), forward=forward, backward=backward, num_given=len(flat)
    )
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


_transposable = Primitive("transposable")
_transposable.multiple_results = True


@_transposable.def_impl
def _evaluate(*args: Array, forward: ClosedJaxpr, backward: ClosedJaxpr, num_given: int) -> list[Array]:
    del backward, num_given
    return jax.jit(jaxpr_as_fun(forward))(*args)


@_transposable.def_abstract_eval
def _shapes(*args: Any, forward: ClosedJaxpr, backward: ClosedJaxpr, num_given: int) -> list[Any]:
    del args, backward, num_given
    return list(forward.out_avals)


def _lower(*args: Array, forward: ClosedJaxpr, backward: ClosedJaxpr, num_given: int) -> list[Array]:
    del backward, num_given
    return jaxpr_as_fun(forward)(*args)


mlir.register_lowering(_transposable, mlir.lower_fun(_lower, multiple_results=True))


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[list[Array], list[Any]]:
    num_given = params["num_given"]
    out = _transposable.bind(*primals, **params)
    given, vector = primals[:num_given], primals[num_given:]
    moved, moved_vector = tangents[:num_given], tangents[num_given:]
    terms: list[Any] = []
    if not all(isinstance(t, ad.Zero) for t in moved_vector):
        direction = [ad.instantiate_zeros(t) for t in moved_vector]
        terms.append(_transposable.bind(*given, *direction, **params))
    moving = [i for i, t in enumerate(moved) if not isinstance(t, ad.Zero)]
    if moving:

        def in_moving(*values: Array) -> list[Array]:
            full = list(given)
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            return jaxpr_as_fun(params["forward"])(*full, *vector)

        terms.append(jax.jvp(in_moving, [given[i] for i in moving], [moved[i] for i in moving])[1])
    tangent = terms[0] if len(terms) == 1 else [a + b for a, b in zip(*terms, strict=True)]
    return out, tangent


ad.primitive_jvps[_transposable] = _jvp


def _transpose(cotangents: Any, *args: Any, forward: Any, backward: Any, num_given: int) -> list[Any]:
    if all(isinstance(c, ad.Zero) for c in cotangents):
        return [None] * len(args)
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    out = _transposable.bind(
        *args[:num_given], *cotangents, forward=backward, backward=forward, num_given=num_given
    )
    # A part of the vector that is known here is a zero that was written out: it takes no cotangent.
    wanted = [ad.is_undefined_primal(v) for v in args[num_given:]]
    return [None] * num_given + [c if is_wanted else None for c, is_wanted in zip(out, wanted, strict=True)]


ad.primitive_transposes[_transposable] = _transpose


def _batch(
    args: Any, axes: Any, *, forward: Any, backward: Any, num_given: int
) -> tuple[list[Array], list[int]]:
    """What the map depends on keeps its axes, so that shared data are not copied; vectors get one in front."""
    (size,) = {a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None}
    given, given_axes = args[:num_given], axes[:num_given]
    vector = [
        jnp.broadcast_to(v, (size, *v.shape)) if axis is None else jnp.moveaxis(v, axis, 0)
        for v, axis in zip(args[num_given:], axes[num_given:], strict=True)
    ]

    def batched(closed: Any, like: list[Any]) -> Any:
        in_axes = (*given_axes, *[0] * len(like))
        return jax.make_jaxpr(jax.vmap(jaxpr_as_fun(closed), in_axes=in_axes, axis_size=size))(*given, *like)

    outputs = [jax.ShapeDtypeStruct((size, *a.shape), a.dtype) for a in forward.out_avals]
    out = _transposable.bind(
        *given,
        *vector,
        forward=batched(forward, vector),
        backward=batched(backward, outputs),
        num_given=num_given,
    )
    return out, [0] * len(out)


batching.primitive_batchers[_transposable] = _batch
