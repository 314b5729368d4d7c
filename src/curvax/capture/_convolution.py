"""Sites of `conv_general_dilated`: any layout, rank, stride, dilation and grouping."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from curvax.capture._convolution_inputs import ConvolutionInputs, Window
from curvax.capture._dense import Roles, grouped
from curvax.capture._inputs import AbstractInputs, DenseInputs
from curvax.capture._layout import Layout, divided, merged


@dataclass(frozen=True)
class Convolution:
    """A convolution of an image with a weight.

    Attributes:
        window: Where it looks.
        groups: Of features, each with its own part of the weight.
        image_axes: Axes of the image: the one of images, of space, of features.
        output_axes: Likewise of the result.
        output_shape: Of the result.
        order: Of the axes (*taps, features) of an input, as in the weight.
    """

    window: Window
    groups: int
    image_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    output_shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def roles(self) -> Roles:
        """Sizes and roles of the axes of the result, that of the features cut in groups and rows."""
        features = self.output_axes[-1]
        roles: list[tuple[int, str]] = []
        for axis, size in enumerate(self.output_shape):
            if axis == features:
                roles += [(self.groups, "stack"), (size // self.groups, "rows")]
            else:
                roles.append((size, "shared"))
        return tuple(roles)

    def inputs(self, x: Array, bias: bool, diagonal: bool) -> AbstractInputs:
        """Of examples along the leading axis; every leaf gets a leading axis, of the stack."""
        images = x.transpose(0, *(1 + i for i in self.image_axes))
        images = images.reshape(*images.shape[:-1], self.groups, images.shape[-1] // self.groups)
        images = images.transpose(images.ndim - 2, *range(images.ndim - 2), images.ndim - 1)
        w = self.window
        if (
            all(k == 1 for k in w.taps)
            and w.positions == w.image
            and all(s == 1 for s in (*w.strides, *w.spread))
        ):
            flat = images.reshape(*images.shape[:2], -1, images.shape[-1])
            return DenseInputs(flat, bias, diagonal)
        return ConvolutionInputs(images, self.window, self.order, bias, diagonal)

    def cotangents(self, g: Array) -> Float[Array, "S B T out"]:
        """Of examples along the leading axis."""
        *kept, features = self.output_axes
        size = self.output_shape[features]
        shape = (*g.shape[: 1 + features], self.groups, size // self.groups, *g.shape[2 + features :])
        after = lambda axis: axis + (axis > features)
        return grouped(g.reshape(shape), ((features,), [after(axis) for axis in kept], (features + 1,)))


def convolution(
    params: dict[str, Any], shapes: Sequence[tuple[int, ...]], layout: Layout | None
) -> tuple[Convolution, Layout | None] | None:
    """The site of a convolution, and the layout of its weight as (stack, rows, columns).

    Args:
        params: Of the equation.
        shapes: Of the image and the weight.
        layout: Of the weight in its parameter, None if it is no layout.

    Returns:
        None for a convolution that no site is known for (groups of images).
    """
    if params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (image, features, *space), (rows, columns, *taps) = numbers.lhs_spec, numbers.rhs_spec
    output, output_features, *output_space = numbers.out_spec
    window = Window(
        tuple(shapes[0][i] for i in space),
        tuple(shapes[1][i] for i in taps),
        tuple(params["window_strides"]),
        tuple((int(a), int(b)) for a, b in params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
    )
    result = [0] * len(shapes[0])
    result[output], result[output_features] = shapes[0][image], shapes[1][rows]
    for axis, size in zip(output_space, window.positions, strict=True):
        result[axis] = size
    inner = [*taps, columns]  # in the order of the taps and features of a `ConvolutionInputs`
    order = tuple(sorted(range(len(inner)), key=inner.__getitem__))
    site = Convolution(
        window,
        groups,
        (image, *space, features),
        (output, *output_space, output_features),
        tuple(result),
        order,
    )
    if layout is None:
        return site, None
    split = divided(layout.axes[rows], (groups, shapes[1][rows] // groups))
    if split is None:
        return site, None
    axes = (merged(split[0]), merged(split[1]), merged(a for i in order for a in layout.axes[inner[i]]))
    if any(stride == 0 for axis in axes for _, stride in axis):
        return site, None
    return site, Layout(layout.offset, axes)
