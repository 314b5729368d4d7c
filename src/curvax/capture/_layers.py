"""The layers of a model: what `find_layers` returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax.capture import _jaxprs
from curvax.capture._finder import find
from curvax.capture._groups import NOT_USED, Group, groups
from curvax.capture._knowledge import Colour, Data, View
from curvax.capture._layout import Layout
from curvax.capture._run import Plan


@dataclass(frozen=True, eq=False)
class Model:
    """A model as it was traced.

    Attributes:
        jaxpr: Its program, over the floating-point parameters and the arrays of one example.
        plan: Where its sites are.
        outputs: Structure of what it returns.
        params: Structure of its floating-point parameters.
        example: Structure of the arrays of one example.
        flows: By key of a site, shape and dtype of its data and of its result.
    """

    jaxpr: Any
    plan: Plan
    outputs: PyTree
    params: PyTree
    example: PyTree
    flows: Mapping[str, tuple[Any, Any]]


class Layers(eqx.Module):
    """The layers that `find_layers` found in a model: groups of sites, each with its block of the parameters.

    They belong to the shapes with which they were found, and to what the model closes over.

    Attributes:
        groups: In the order of the parameters. Their blocks do not overlap, and hold every entry that is used.
        names: Of the floating-point parameters, as `jax.tree_util.keystr` writes their paths.
    """

    groups: tuple[Group, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    model: Model = eqx.field(static=True, repr=False)
    constants: list[Any] = eqx.field(repr=False)

    def pack(self, tree: PyTree[Array]) -> dict[str, Array]:
        """For each group the entries of a tree like the parameters as matrices (stack, rows, columns).

        Args:
            tree: Of the structure of the parameters, or of their floating-point arrays: a gradient, say.

        Raises:
            ValueError: It has another number of arrays.
        """
        return {group.name: group.block.pack(tree) for group in self.groups}

    def unpack(self, matrices: Mapping[str, Array]) -> PyTree[Array]:
        """The transpose of `pack`: a tree of the floating-point parameters, zero where no group has entries.

        Args:
            matrices: By name of the group, as `pack` returns them; groups that are left out count as zero.
        """
        arrays: dict[str, Array] = {}
        for group in self.groups:
            if group.name in matrices:
                for name, part in group.block.unpack(matrices[group.name]).items():
                    arrays[name] = arrays[name] + part if name in arrays else part
        likes, structure = jax.tree.flatten(self.model.params)
        return jax.tree.unflatten(
            structure,
            [
                arrays[name] if name in arrays else jnp.zeros(like.shape, like.dtype)
                for name, like in zip(self.names, likes, strict=True)
            ],
        )

    @property
    def fallbacks(self) -> dict[str, str]:
        """For each group that has one: what is done instead of a known site, and why."""
        return {group.name: group.fallback for group in self.groups if group.fallback}


def find_layers(
    model_fn: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *,
    key: PRNGKeyArray | None = None,
    strict: bool = False,
) -> Layers:
    """Find every use of every parameter of a model, and bring them together in blocks.

    Values are followed through the model's program in two colours. A *view* is linear in one parameter: it has been
    transposed, reshaped, cast, sliced, multiplied by a scalar. *Data* is all the rest. An operation that is linear in a
    view and in data is a site: a product of any dimension numbers, a convolution of any layout, a lookup. A bias
    belongs to its site if nothing else reads the site's output and it reaches all of it; else it is a block of its own.
    `jit`, `jax.checkpoint`, `scan` and `cond` are entered; custom rules are not, and a parameter that enters one, or is
    used in any way that is not known, is a block with the gradients of the examples (`Group.fallback` says so).

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; any pytrees. With `key`: `model_fn(params, x, key)`.
        params: Any pytree; its floating-point arrays are the parameters.
        x: One example, any pytree; arrays or `jax.ShapeDtypeStruct`s.
        key: A key as for one example, if the model takes one.
        strict: Raise if any use of a parameter is not a known site.

    Returns:
        The layers.

    Raises:
        ValueError: There is no floating-point parameter, or one is complex; with `strict`, parameters have a fallback.

    Cost: traces the model once; nothing is computed.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        params = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(3)}
        model_fn = lambda params, x: params["weight"] @ x + params["bias"]
        layers = cx.capture.find_layers(model_fn, params, jnp.ones(2))
        (group,) = layers.groups
        group.block.shape  # (1, 3, 3): three rows, two inputs and a bias
        layers.pack(params)["['weight']"].shape  # (1, 3, 3)
        ```
    """
    with_paths, static = _parameters(params)
    names = tuple(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(with_paths))
    example = example_structure((x,) if key is None else (x, key))

    def model(params: PyTree, example: PyTree) -> PyTree:
        return model_fn(eqx.combine(params, static), *example)

    varying, rest = eqx.partition(example, _is_structure)
    whole = lambda params, varying: model(params, eqx.combine(varying, rest))
    program, outputs = _jaxprs.trace(whole, with_paths, varying)
    count = len(jax.tree.leaves(varying))
    known = [View(i, Layout.of(like.shape)) for i, like in enumerate(jax.tree.leaves(with_paths))]
    findings = find(program, [*known, *[Data(Colour.EXAMPLE)] * count])
    found = groups(names, jax.tree.leaves(with_paths), findings)
    if strict:
        _check_covered(found)
    sites = [site for group in found for site in group.sites if site.geometry is not None]
    flows = {site.key: (findings.sites[site.key].data, findings.sites[site.key].result) for site in sites}
    traced = Model(program.jaxpr, Plan.of(findings, sites), outputs, with_paths, varying, flows)
    return Layers(found, names, traced, list(program.constants))


def _is_structure(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def as_structure(leaf: Any) -> Any:
    """Shape and dtype of an array or a number; anything else itself."""
    if isinstance(leaf, bool | int | float | complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return jax.eval_shape(lambda: jnp.asarray(leaf)) if not _is_structure(leaf) else leaf
    return leaf


def example_structure(x: PyTree) -> PyTree:
    """Shapes and dtypes of one example; what is no array stays."""
    return jax.tree.map(as_structure, x)


def _parameters(params: PyTree) -> tuple[PyTree, PyTree]:
    """Structures of the floating-point arrays, and all the rest."""
    varying, static = eqx.partition(params, _is_float)
    for path, leaf in jax.tree_util.tree_leaves_with_path(varying):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"`params{jax.tree_util.keystr(path)}` is complex; split it into its real and imaginary part."
            )
    if not jax.tree.leaves(varying):
        raise ValueError("`params` has no floating-point array, so there is nothing to find.")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), varying), static


def _check_covered(found: tuple[Group, ...]) -> None:
    uncovered = [f"{g.name}: {g.fallback}" for g in found if g.fallback and g.fallback != NOT_USED]
    if uncovered:
        raise ValueError(
            "`strict=True`, and not every use of every parameter is a known site. Write these in another way, or "
            "accept the fallback with `strict=False`:\n  " + "\n  ".join(uncovered)
        )
