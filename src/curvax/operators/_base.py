"""What every operator made by automatic differentiation shares."""

import abc
import types
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax.operators._dense import dense_matrix, matrix_free_diagonal
from curvax.operators._dispatch import as_function, register


class AbstractDerivativeOperator(lx.AbstractLinearOperator):
    """A matrix of derivatives, known through its products with vectors.

    Subclasses give `mv`, `transpose`, the structures and `linearised`; `as_matrix` writes the matrix
    out below a size limit and raises `ValueError` above it.
    """

    tags: eqx.AbstractVar[frozenset[object]]

    @abc.abstractmethod
    def linearised(self) -> lx.AbstractLinearOperator:
        """The same operator with what does not depend on the vector computed once."""

    def as_matrix(self) -> Array:
        """The matrix over raveled leaves, in min(rows, columns) products. Raises above a size limit."""
        return dense_matrix(self)


def linear_map(
    product: Callable[[PyTree[Array]], PyTree[Array]], operator: AbstractDerivativeOperator
) -> lx.FunctionLinearOperator:
    """The products of an operator, linearised by the caller, as one that Lineax knows."""
    return lx.FunctionLinearOperator(with_fast_contractions(product), operator.in_structure(), operator.tags)


class _Captured(eqx.Module):
    """`theta ↦ fn(theta, *args)` over the inexact leaves of theta; the other leaves are kept here."""

    fn: Callable
    rest: PyTree
    args: tuple[Any, ...]

    def __call__(self, theta: PyTree[Array], *more: Any) -> Any:
        return self.fn(eqx.combine(theta, self.rest), *more, *self.args)


def as_arrays(tree: PyTree) -> PyTree:
    """NumPy leaves as JAX arrays: only these are arrays to Equinox's filters."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, tree)


def split(name: str, tree: PyTree) -> tuple[PyTree[Array], PyTree]:
    """The inexact array leaves of an argument, and all the rest.

    Raises:
        ValueError: there is none, or one is complex.
    """
    dynamic, rest = eqx.partition(as_arrays(tree), eqx.is_inexact_array)
    leaves = jax.tree.leaves(dynamic)
    if not leaves:
        raise ValueError(
            f"`{name}` has no floating-point array leaf to differentiate in; found leaves of type "
            f"{sorted({_kind(leaf) for leaf in jax.tree.leaves(rest)})}. Pass floating-point JAX arrays "
            "(`jnp.asarray(...)`): Python numbers count as constants."
        )
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise ValueError(
            f"`{name}` has a complex leaf; curvature operators are real. Split it into two real leaves."
        )
    return dynamic, rest


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} array" if eqx.is_array(leaf) else type(leaf).__name__


def capture(fn: Callable, theta: PyTree, *args: Any) -> Callable:
    """`fn` with whatever traced value it closes over made visible as pytree leaves.

    An operator crosses API boundaries (`jit`, Lineax's primitive), where a hidden tracer would leak. A
    function that hides none stays itself: then two operators of the same function compare equal
    and an eager `lx.linear_solve` in a loop compiles once.
    """
    if isinstance(fn, types.FunctionType) and fn.__closure__ is None:
        return fn
    converted = eqx.filter_closure_convert(fn, theta, *args)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((converted, theta, args)))
    return converted if traced else fn


def capture_args(fn: Callable, theta: PyTree, args: tuple[Any, ...]) -> tuple[Callable, PyTree[Array]]:
    """`theta ↦ fn(theta, *args)` over the inexact leaves of theta, and these leaves."""
    dynamic, rest = split("theta", theta)
    args = as_arrays(args)
    fn = capture(fn, eqx.combine(dynamic, rest), *args)
    return _Captured(fn, rest, args), dynamic


def structure(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a tree of arrays, weak types forgotten."""
    return strip_weak(jax.eval_shape(lambda: tree))


def strip_weak(tree: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.ShapeDtypeStruct]:
    """The same structure without weak types, which would make equal structures differ."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def as_tags(tags: object | Iterable[object]) -> frozenset[object]:
    """One tag or several as a frozen set."""
    return frozenset(tags) if isinstance(tags, Iterable) else frozenset([tags])


def check_scalar(name: str, fn: Callable, *args: Any) -> None:
    """Raise unless `fn(*args)` is one real scalar."""
    out = eqx.filter_eval_shape(fn, *args)
    if not (
        isinstance(out, jax.ShapeDtypeStruct) and out.shape == () and jnp.issubdtype(out.dtype, jnp.floating)
    ):
        found = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", out)
        raise ValueError(f"`{name}` must return one real scalar, found {found}. Sum or average its output.")


register(AbstractDerivativeOperator, one_by_one=True)


@lx.linearise.register(AbstractDerivativeOperator)
def _(operator):
    return operator.linearised()


@lx.diagonal.register(AbstractDerivativeOperator)
def _(operator):
    return lx.diagonal(as_function(operator)) if lx.is_diagonal(operator) else matrix_free_diagonal(operator)


@lx.tridiagonal.register(AbstractDerivativeOperator)
def _(operator):
    if lx.is_tridiagonal(operator):
        return lx.tridiagonal(as_function(operator))
    matrix = operator.as_matrix()
    return jnp.diagonal(matrix), jnp.diagonal(matrix, offset=-1), jnp.diagonal(matrix, offset=1)
