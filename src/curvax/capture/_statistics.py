"""The seam of the room: statistics of what flows through the layers of a model."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax.capture import _jaxprs
from curvax.capture._layers import Layers, as_structure, find_layers
from curvax.capture._run import Taps, run
from curvax.capture._site import Site
from curvax.capture._tap import Statistic, measure, over_examples, tap

Results = dict[str, tuple[PyTree, ...]]


def statistics(
    model: Callable[..., PyTree] | Layers,
    params: PyTree,
    inputs: PyTree,
    cotangents: PyTree | Callable[..., PyTree],
    statistic: Statistic,
    aux: Mapping[str, PyTree] | None = None,
    *,
    targets: PyTree = None,
    directions: bool = False,
    key: PRNGKeyArray | None = None,
) -> Results:
    """A statistic of the inputs and cotangents of every site of a model, taken in one backward pass.

    For each site the statistic is called with the inputs x and the cotangents g = Jᵀc of all examples, J the Jacobian
    of the model's outputs in those of the site and c the given cotangents of the outputs. Nothing of the size of the
    activations is kept for it: it is computed where the backward pass comes through. Sums over examples are SUMS, not
    means. A site inside of a `scan` that shares its weight is met once a step, and the results of the steps are added.

    A statistic is a pure function `statistic(site, inputs, cotangents, aux)` of

    - `site`: a [`Site`][curvax.capture.Site], static;
    - `inputs`: x, [`AbstractInputs`][curvax.capture.AbstractInputs] of shape (B, T, in);
    - `cotangents`: g, an array (B, T, out), in units of the parameter (factors of the weight are in x, or in g);
    - `aux`: what it needs besides, for this member of the stack; None if there is nothing.

    for one member of the stack (expert, group, layer), returning any pytree of floating-point arrays. So the gradient
    of example b is Σ_T g_b x_bᵀ = `inputs.outer(cotangents)[b]`, of shape (out, in), the transpose of the block's
    coordinates if `site.transposed`. If the block's parameter is used in several sites, its gradient is their sum.

    Args:
        model: `model_fn(params, x)` → outputs, for ONE example (`model_fn(params, x, key)` with `key`); or the layers
            that `find_layers` found in it.
        params: Any pytree; its floating-point arrays are the parameters.
        inputs: Examples, stacked along the leading axis of every array.
        cotangents: Like the outputs of all examples, stacked along the leading axis (None or anything in the place of
            an output that is not floating-point); or a function of one example's outputs and its part of `targets`
            that returns its cotangents.
        statistic: What to compute; `SecondMoments` for Kronecker factors.
        aux: By name of the group, a pytree whose arrays have the stack (of `group.block.shape`) along the leading axis.
        targets: What `cotangents` needs of each example if it is a function: labels, keys; stacked likewise.
        directions: Whether cotangents have, behind the axis of the examples, an axis of directions: one backward pass
            each, one after the other, and the results are added.
        key: If the model takes one; split into a key for each example.

    Returns:
        For each group, by name, one result for each of its sites, in their order. Every array has a leading axis of the
            stack. Groups without a site have none.

    Raises:
        ValueError: Shapes that do not fit; a statistic that returns something that is not floating-point.

    Cost: one forward and one backward pass to all sites, no gradient of any weight, and the statistics. Parameters
    whose site is not a product (`site.kind` is `"other"`) take the memory of one gradient for each example.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        params = {"weight": jnp.array([[1.0, 2.0]])}
        inputs, cotangents = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [2.0]])

        def squared_norm(site, inputs, cotangents, aux):  # of the gradient of each example
            return jnp.sum(inputs.outer(cotangents) ** 2, axis=(1, 2))

        result = cx.capture.statistics(
            lambda params, x: params["weight"] @ x, params, inputs, cotangents, squared_norm
        )
        result["['weight']"][0]  # [[1., 8.]]
        ```

    Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
    arXiv 1503.05671, for what to take; taking it as the cotangent of a slot is ours.
    """
    layers = model if isinstance(model, Layers) else None
    return _measured(layers, model, params, inputs, cotangents, statistic, aux, targets, directions, key)


@eqx.filter_jit
def _measured(
    layers: Layers | None,
    model_fn: Callable[..., PyTree] | Layers,
    params: PyTree,
    inputs: PyTree,
    cotangents: PyTree | Callable[..., PyTree],
    statistic: Statistic,
    aux: Mapping[str, PyTree] | None,
    targets: PyTree,
    directions: bool,
    key: PRNGKeyArray | None,
) -> Results:
    size = _number_of_examples(inputs)
    examples = (inputs,) if key is None else (inputs, jax.random.split(key, size))
    if layers is None:
        assert not isinstance(model_fn, Layers)
        x, *keys = _first_structures(examples)
        layers = find_layers(model_fn, params, x, key=keys[0] if keys else None)
    leaves, arrays = _leaves(layers, params), _arrays(layers, examples, size)
    sites = [(group.name, site) for group in layers.groups for site in group.sites]
    _check_aux(layers, aux)
    by_site = {site.key: _split(site, (aux or {}).get(name)) for name, site in sites}
    one = _Example(
        layers, leaves, statistic, by_site, cotangents if callable(cotangents) else None, directions
    )
    slots, singles = _empty(layers, statistic, by_site, size, leaves)
    given = targets if callable(cotangents) else _floats_of(cotangents, layers)
    if not callable(cotangents) and any(leaf.shape[:1] != (size,) for leaf in given):
        raise ValueError(
            f"`cotangents` must be shaped like the outputs of all {size} examples; found "
            f"{[leaf.shape for leaf in given]}."
        )
    found = jax.vmap(
        lambda example, given, token: one(slots, singles, example, given, token),
        in_axes=(0, 0, 0),
        out_axes=None,
        axis_size=size,
    )(arrays, given, jnp.zeros(size))
    results: Results = {group.name: () for group in layers.groups}
    for name, site in sites:
        results[name] += (_merged(site, found[site.key]),)
    return results


class _Example(eqx.Module):
    """The statistics of one example, under a `vmap` that sums them over all."""

    layers: Layers
    leaves: list[Array]
    statistic: Statistic
    aux: Mapping[str, PyTree]
    cotangents: Callable[..., PyTree] | None
    directions: bool

    def __call__(
        self,
        slots: dict[str, PyTree],
        singles: dict[str, PyTree],
        example: list[Array],
        given: PyTree,
        token: Array,
    ) -> dict[str, PyTree]:
        """By key of the site.

        Args:
            slots: Zeros like the statistics of matrix sites.
            singles: Zeros like those of the sites of whole parameters.
            example: Its arrays.
            given: Cotangents, or the target that a function makes them of.
            token: Any number that is there for each example.
        """
        model = self.layers.model
        program = _jaxprs.Program(model.jaxpr, self.layers.constants)
        sites = [site for group in self.layers.groups for site in group.sites]
        alone = [site for site in sites if site.geometry is None]
        likes = {site.key: _one_step(site, (slots | singles)[site.key]) for site in sites}

        def forward(slots: dict[str, PyTree], moving: dict[int, Array]) -> tuple[list[Array], list[Array]]:
            values = [moving.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            taps = Taps(slots, {k: v for k, v in self.aux.items() if k in slots}, None, token)
            results = run(
                model.plan,
                program,
                [*values, *example],
                taps,
                lambda site: tap(self.statistic, site, likes[site.key]),
            )
            floating = [r for r in results if jnp.issubdtype(r.dtype, jnp.inexact)]
            return floating, results

        moving = {site.leaf: self.leaves[site.leaf] for site in alone}
        floating, pull, results = jax.vjp(forward, slots, moving, has_aux=True)
        if self.cotangents is not None:
            outputs = jax.tree.unflatten(jax.tree.structure(model.outputs), results)
            given = _floats_of(self.cotangents(outputs, given), self.layers)
        _check_cotangents(given, floating, self.directions)

        def backward(given: list[Array]) -> dict[str, PyTree]:
            given = [c.astype(like.dtype) for c, like in zip(given, floating, strict=True)]
            through, gradients = pull(given)
            for site in alone:
                measured = lambda aux, g, token, site=site: measure(self.statistic, site, None, g, aux, None)
                through[site.key] = over_examples(measured, likes[site.key])(
                    self.aux[site.key], gradients[site.leaf], token
                )
            return through

        if not self.directions:
            return backward(given)
        add = lambda total, given: (jax.tree.map(jnp.add, total, backward(given)), None)
        return jax.lax.scan(add, slots | singles, given)[0]


def _number_of_examples(inputs: PyTree) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves(inputs) if hasattr(leaf, "shape")]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            "The arrays of `inputs` must share one leading axis, of at least one example; found shapes "
            f"{shapes}."
        )
    return shapes[0][0]


def _first_structures(examples: PyTree) -> PyTree:
    def first(leaf: Any) -> Any:
        like = as_structure(leaf)
        return (
            jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
            if isinstance(like, jax.ShapeDtypeStruct)
            else leaf
        )

    return jax.tree.map(first, examples)


def _leaves(layers: Layers, params: PyTree) -> list[Array]:
    """The floating-point parameters, which must be those of the layers."""
    is_float = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(params, is_float))]
    likes = jax.tree.leaves(layers.model.params)
    found, wanted = [(x.shape, x.dtype) for x in leaves], [(x.shape, x.dtype) for x in likes]
    if found != wanted:
        raise ValueError(
            f"`params` must have the floating-point arrays with which the layers were found, {wanted}; found {found}."
        )
    return leaves


def _arrays(layers: Layers, examples: PyTree, size: int) -> list[Array]:
    """The arrays of all examples, which must be like that of the layers."""
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(examples) if hasattr(leaf, "shape")]
    wanted = [((size, *x.shape), x.dtype) for x in jax.tree.leaves(layers.model.example)]
    found = [(x.shape, x.dtype) for x in arrays]
    if found != wanted:
        raise ValueError(f"`inputs` must hold arrays of shapes and dtypes {wanted}; found {found}.")
    return arrays


def _floats_of(cotangents: PyTree, layers: Layers) -> list[Array]:
    """Cotangents of the floating-point outputs."""
    outputs = layers.model.outputs
    structure = jax.tree.structure(outputs)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(outputs)]
    try:
        parts = structure.flatten_up_to(cotangents)
    except (ValueError, TypeError):
        parts = []
    found = [part for part, floating in zip(parts, is_float, strict=False) if floating]
    if len(parts) != len(is_float) or not all(hasattr(part, "shape") for part in found):
        raise ValueError(
            f"`cotangents` must have the structure of the outputs, {structure}; found "
            f"{jax.tree.structure(cotangents)}."
        )
    return [jnp.asarray(part) for part in found]


def _check_cotangents(given: list[Array], floating: list[Array], directions: bool) -> None:
    shapes = [c.shape[1:] if directions else c.shape for c in given]
    if shapes != [f.shape for f in floating] or (directions and len({c.shape[:1] for c in given}) > 1):
        raise ValueError(
            "`cotangents` must be shaped like the outputs of all examples"
            + (", with an axis of directions behind that of the examples" if directions else "")
            + f": for one example {[f.shape for f in floating]}, found {[c.shape for c in given]}."
        )


def _check_aux(layers: Layers, aux: Mapping[str, PyTree] | None) -> None:
    groups = {group.name: group for group in layers.groups}
    for name, tree in (aux or {}).items():
        if name not in groups:
            raise ValueError(f"`aux` has {name!r}, which is no group; there are {list(groups)}.")
        stack = groups[name].block.shape[0]
        if any(leaf.shape[:1] != (stack,) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"`aux[{name!r}]` must have arrays with the stack, of size {stack}, along the leading axis; found "
                f"{[leaf.shape for leaf in jax.tree.leaves(tree)]}."
            )


def _one_step(site: Site, stacked: PyTree) -> PyTree:
    """Shapes and dtypes without the axes of the scans around a site."""
    outer = len(site.outer_stack)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[outer:], leaf.dtype), stacked)


def _split(site: Site, aux: PyTree) -> PyTree:
    """With the scans around a site as axes of their own."""
    inner = -1 if site.stack else 0
    return jax.tree.map(lambda leaf: leaf.reshape(*site.outer_stack, inner, *leaf.shape[1:]), aux)


def _merged(site: Site, result: PyTree) -> PyTree:
    """The stacks of scans and of the operation as one axis."""
    count = len(site.outer_stack) + 1
    return jax.tree.map(lambda leaf: leaf.reshape(site.stack, *leaf.shape[count:]), result)


def _empty(
    layers: Layers, statistic: Statistic, aux: Mapping[str, PyTree], size: int, leaves: list[Array]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Zeros like the statistics of matrix sites, and of the sites of whole parameters."""
    slots: dict[str, PyTree] = {}
    singles: dict[str, PyTree] = {}
    stacked = lambda like: jax.ShapeDtypeStruct((size, *like.shape), like.dtype)
    for site in (site for group in layers.groups for site in group.sites):
        outer = site.outer_stack
        one = _one_step(site, aux[site.key])
        if site.geometry is None:
            flow: tuple[Any, Any] = (None, stacked(leaves[site.leaf]))
        else:
            data, result = layers.model.flows[site.key]
            flow = (stacked(data), stacked(result))
        like = jax.eval_shape(
            lambda x, g, aux, site=site: measure(statistic, site, x, g, aux, None), *flow, one
        )
        _check_floating(like)
        zeros = jax.tree.map(lambda leaf, outer=outer: jnp.zeros((*outer, *leaf.shape), leaf.dtype), like)
        (singles if site.geometry is None else slots)[site.key] = zeros
    return slots, singles


def _check_floating(result: PyTree) -> None:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(result)]
    if any(not jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            f"`statistic` must return real floating-point arrays, found {[str(d) for d in dtypes]}; cast counts."
        )
