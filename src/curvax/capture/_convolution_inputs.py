"""What flows into a convolution: an image, whose patches are not written out where that can be avoided."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from curvax.capture._inputs import AbstractInputs, accumulation_dtype, any_position, bordered
from curvax.capture._second_moment import second_moment

EXACT = jax.lax.Precision.HIGHEST
# Patches, or shifted images, of at most so many bytes are written out at a time. On CPU what stays in the cache is
# multiplied out twice as fast; elsewhere only memory counts.
_MOST_BYTES = {"cpu": 2**24}
_MOST_BYTES_ELSEWHERE = 2**28
# More strips than that along the border of an image take longer to compile than they save.
_MOST_STRIPS = 24


@dataclass(frozen=True)
class Window:
    """Where a convolution looks: tap k of position p is entry `p·stride + k·dilation − before` of the spread-out image.

    Attributes:
        image: Size of the image along each axis.
        taps: Size of the kernel.
        strides: From position to position.
        padding: Before and after; may be negative.
        spread: Spacing of the entries of the image (`lhs_dilation`).
        dilation: Spacing of the taps (`rhs_dilation`).
    """

    image: tuple[int, ...]
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Size of the output along each axis."""
        sizes = []
        for j in range(len(self.image)):
            whole = (self.image[j] - 1) * self.spread[j] + 1 + sum(self.padding[j])
            reach = (self.taps[j] - 1) * self.dilation[j] + 1
            sizes.append(max((whole - reach) // self.strides[j] + 1, 0))
        return tuple(sizes)

    def touched(self, axis: int) -> np.ndarray:
        """Whether tap k meets entry i at some position: a (taps, image) matrix of zeros and ones."""
        met = np.zeros((self.taps[axis], self.image[axis]))
        for tap, position in itertools.product(range(self.taps[axis]), range(self.positions[axis])):
            place = position * self.strides[axis] + tap * self.dilation[axis] - self.padding[axis][0]
            entry, between = divmod(place, self.spread[axis])
            if not between and 0 <= entry < self.image[axis]:
                met[tap, entry] = 1
        return met

    def padded(self, image: Float[Array, "..."]) -> Array:
        """The image (M, *image, C) with its padding and spreading."""
        inner = [(*pad, step - 1) for pad, step in zip(self.padding, self.spread, strict=True)]
        return jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *inner, (0, 0, 0)])

    @property
    def border(self) -> list["Strip"] | None:
        """The positions outside of the output whose patches meet the image; None if a stride or spread is not 1."""
        if any(step != 1 for step in (*self.strides, *self.spread)):
            return None
        positions, ranges = self.positions, []
        for n, k, d, (before, _) in zip(self.image, self.taps, self.dilation, self.padding, strict=True):
            ranges.append(range(before - (k - 1) * d, n + before))
        strips = []
        for axis, outer in enumerate(ranges):
            for place in outer:
                if 0 <= place < positions[axis]:
                    continue
                before = self.padding[axis][0]
                taps = [
                    tap
                    for tap in range(self.taps[axis])
                    if 0 <= place + tap * self.dilation[axis] - before < self.image[axis]
                ]
                if taps:
                    sides = [range(n) for n in positions[:axis]], ranges[axis + 1 :]
                    box = (*sides[0], range(place, place + 1), *sides[1])
                    strips.append(Strip(axis, range(taps[0], taps[-1] + 1), tuple(box)))
        return strips


@dataclass(frozen=True)
class Strip:
    """A box of positions, and the taps along one axis with which they meet the image."""

    axis: int
    taps: range
    box: tuple[range, ...]

    def size(self, window: Window) -> tuple[int, int]:
        """Number of positions and of taps."""
        others = math.prod(window.taps) // window.taps[self.axis]
        return math.prod(map(len, self.box)), others * len(self.taps)


class ConvolutionInputs(AbstractInputs):
    """Patches of images, one for each of the N·P positions of an example.

    `second_moment` uses that the product of two taps depends, but for the border, on their distance only: as many
    products of shifted images as there are distances, 13 for a 3 × 3 kernel, instead of 81 blocks.
    """

    image: Float[Array, "B N *image C"]
    window: Window = eqx.field(static=True)
    order: tuple[int, ...] = eqx.field(static=True)  # of (*taps, C) in an input
    bias: bool = eqx.field(static=True)
    diagonal: bool = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N·P, in)."""
        examples, images, channels = self.image.shape[0], self.image.shape[1], self.image.shape[-1]
        size = math.prod(self.window.taps) * channels + self.bias
        return examples, images * math.prod(self.window.positions), size

    def mask(self, cotangents: Float[Array, "B T out"]) -> Bool[Array, "B T"]:
        """Example by example, so that no patch need be written out."""
        live = ~(jnp.max(jnp.abs(cotangents), axis=(1, 2), initial=0) == 0)
        return jnp.broadcast_to(live[:, None], cotangents.shape[:2])

    def array(self) -> Float[Array, "B T in"]:
        """The patches."""
        examples, shared, size = self.shape
        patches = self._patches(self._images(), self.window.padded, self._everywhere(), None)
        patches = patches.reshape(examples, shared, *self.window.taps, self.image.shape[-1])
        patches = patches.transpose(0, 1, *(2 + i for i in self.order)).reshape(examples, shared, -1)
        return jnp.pad(patches, ((0, 0), (0, 0), (0, 1)), constant_values=1) if self.bias else patches

    def second_moment(self, mask: Bool[Array, "B T"]) -> Array:
        """Σ x xᵀ over patches."""
        dtype = accumulation_dtype(self.image)
        live = mask[:, :1].reshape(-1, *(1,) * (self.image.ndim - 1))
        images = jnp.where(live, self.image, 0).reshape(-1, *self.image.shape[2:])
        count = jnp.sum(mask, dtype=dtype)
        if self.diagonal:
            squares = self._ordered(self._sums(jnp.square(images.astype(dtype)))).sum(axis=0)
            return jnp.append(squares, count) if self.bias else squares
        moment = self._ordered_matrix(self._by_chunks(images))
        if not self.bias:
            return moment
        return bordered(moment, self._ordered(self._sums(images)).sum(axis=0), count)

    def mean(self, mask: Bool[Array, "B T"]) -> Float[Array, "B in"]:
        """Over all positions, by sums of boxes of the image; zero for an example that does not count."""
        dtype = accumulation_dtype(self.image)
        examples, shared, _ = self.shape
        sums = (
            self._ordered(self._sums(self._images())).reshape(examples, self.image.shape[1], -1).sum(axis=1)
        )
        live = any_position(mask, dtype)
        mean = jnp.where(live != 0, sums / shared, 0)
        return jnp.concatenate([mean, live], axis=1) if self.bias else mean

    def project(self, basis: Float[Array, "in k"]) -> Float[Array, "B T k"]:
        """x V: a convolution."""
        window, channels, columns = self.window, self.image.shape[-1], basis.shape[1]
        whole = (*window.taps, channels)
        kernel = basis[: math.prod(whole)].reshape(*(whole[i] for i in self.order), columns)
        back = sorted(range(len(whole)), key=self.order.__getitem__)
        kernel = kernel.transpose(*back, len(whole)).astype(self.image.dtype)
        axes = len(window.taps)
        last = (0, axes + 1, *range(1, axes + 1))
        out = jax.lax.conv_general_dilated(
            self._images(),
            kernel,
            window.strides,
            window.padding,
            window.spread,
            window.dilation,
            jax.lax.ConvDimensionNumbers(last, (axes + 1, axes, *range(axes)), last),
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(*self.shape[:2], columns)
        return out + basis[-1].astype(out.dtype) if self.bias else out

    def _images(self) -> Array:
        return self.image.reshape(-1, *self.image.shape[2:])

    def _ordered(self, sums: Array) -> Array:
        """(M, *taps, C) as rows of inputs."""
        return sums.transpose(0, *(1 + i for i in self.order)).reshape(sums.shape[0], -1)

    def _ordered_matrix(self, moment: Array) -> Array:
        """A matrix over (*taps, C) as one over inputs."""
        whole = (*self.window.taps, self.image.shape[-1])
        axes = (*self.order, *(len(whole) + i for i in self.order))
        return moment.reshape(*whole, *whole).transpose(axes).reshape(moment.shape)

    def _sums(self, images: Array) -> Array:
        """Σ over positions of the patches, (M, *taps, C): axis by axis, since the positions of a tap form a box."""
        total = images.astype(accumulation_dtype(images))
        for axis in range(len(self.window.taps)):
            met = jnp.asarray(self.window.touched(axis), total.dtype)
            before, after = total.shape[: axis + 1], total.shape[axis + 2 :]
            # A product for each image, and not one for all: that reads the images as they lie.
            rows = total.reshape(math.prod(before), total.shape[axis + 1], math.prod(after))
            each = jnp.broadcast_to(met, (len(rows), *met.shape))
            total = jnp.matmul(each, rows, precision=EXACT).reshape(*before, len(met), *after)
        return total

    def _everywhere(self) -> list[range]:
        return [range(n) for n in self.window.positions]

    def _strips_worth_it(self) -> list[Strip] | None:
        """The strips to be subtracted, or None if patches cost less."""
        strips, channels = self.window.border, self.image.shape[-1]
        if strips is None or len(strips) > _MOST_STRIPS or len(strips) == 0 or channels == 1:
            return None
        sizes = [strip.size(self.window) for strip in strips]
        offsets = (math.prod(2 * k - 1 for k in self.window.taps) + 1) / 2
        direct = math.prod(self.window.positions) * (math.prod(self.window.taps) * channels) ** 2
        shifted = math.prod(self.window.image) * offsets * channels**2
        shifted += sum(positions * (taps * channels) ** 2 for positions, taps in sizes)
        return strips if shifted < 0.8 * direct else None

    def _by_chunks(self, images: Array) -> Array:
        """The moment over (*taps, C), a few images at a time."""
        strips = self._strips_worth_it()
        some = self._by_patches if strips is None else lambda images: self._by_offsets(images, strips)
        taps, positions = self.window.taps, math.prod(self.window.positions)
        copies = math.prod(taps) * positions
        if strips is not None:
            copies = (math.prod(2 * k - 1 for k in taps) + 1) // 2 * math.prod(self.window.image)
        each = max(1, copies * images.shape[-1] * images.dtype.itemsize)
        most = _MOST_BYTES.get(jax.default_backend(), _MOST_BYTES_ELSEWHERE)
        chunks = -(-len(images) // max(1, most // each))
        if chunks <= 1:
            return some(images)
        size = -(-len(images) // chunks)
        missing = chunks * size - len(images)  # images of zeros add nothing
        images = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
        images = images.reshape(chunks, size, *images.shape[1:])
        like = jax.eval_shape(some, images[0])
        add = lambda total, images: (total + some(images), None)
        return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), images)[0]

    def _by_patches(self, images: Array) -> Array:
        patches = self._patches(images, self.window.padded, self._everywhere(), None)
        return second_moment(patches.reshape(-1, math.prod(patches.shape[-2:])))

    def _by_offsets(self, images: Array, strips: list[Strip]) -> Array:
        """Over all positions of an endless plane the moment depends on distances; minus the ones off the output."""
        window, channels = self.window, images.shape[-1]
        moment = self._on_the_plane(images)
        reach = [((k - 1) * d, (k - 1) * d, 0) for k, d in zip(window.taps, window.dilation, strict=True)]
        pad = lambda image: jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *reach, (0, 0, 0)])
        for strip in strips:
            # In the image padded by the reach of the kernel, the first tap of position p is at p − before + reach.
            box = [
                range(r.start - before + margin, r.stop - before + margin)
                for r, (before, _), (margin, _, _) in zip(strip.box, window.padding, reach, strict=True)
            ]
            patches = self._patches(images, pad, box, strip)
            part = second_moment(patches.reshape(-1, math.prod(patches.shape[-2:])))
            taps = [range(k) for k in window.taps]
            taps[strip.axis] = strip.taps
            where = tuple(slice(r.start, r.stop) for r in taps)
            shape = (*map(len, taps), channels) * 2
            moment = moment.at[(*where, slice(None), *where, slice(None))].add(-part.reshape(shape))
        return moment.reshape(math.prod(window.taps) * channels, -1)

    def _on_the_plane(self, images: Array) -> Array:
        """(*taps, C, *taps, C) of products over all positions at which anything of the image is met."""
        window, channels = self.window, images.shape[-1]
        axes = len(window.taps)
        distances = list(itertools.product(*(range(-k + 1, k) for k in window.taps)))
        ahead = distances[len(distances) // 2 :]  # the others are their transposes
        shifted = jnp.concatenate([_shifted(images, self._step(distance)) for distance in ahead], axis=-1)
        products = jnp.matmul(
            images.reshape(-1, channels).T,
            shifted.reshape(-1, len(ahead) * channels),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=accumulation_dtype(images),
        ).reshape(channels, len(ahead), channels)
        forward = jnp.moveaxis(products, 1, 0)
        # In the order of `distances`.
        table = jnp.concatenate([jnp.flip(forward[1:], 0).swapaxes(1, 2), forward])
        taps = np.array(list(itertools.product(*map(range, window.taps))))
        apart = taps[None, :, :] - taps[:, None, :]
        index = np.zeros(apart.shape[:2], int)
        for axis in range(axes):
            index = index * (2 * window.taps[axis] - 1) + apart[..., axis] + window.taps[axis] - 1
        moment = table[index].transpose(0, 2, 1, 3)  # (tap, C, tap, C)
        return moment.reshape(*window.taps, channels, *window.taps, channels)

    def _step(self, distance: Sequence[int]) -> list[int]:
        return [k * d for k, d in zip(distance, self.window.dilation, strict=True)]

    def _patches(self, images: Array, pad: object, box: Sequence[range], strip: Strip | None) -> Array:
        """(M, *positions, taps, C) for a box of positions, given where their first tap is in the padded image."""
        window = self.window
        padded = pad(images)  # type: ignore[operator]
        taps = [range(k) for k in window.taps]
        if strip is not None:
            taps[strip.axis] = strip.taps
        parts = []
        for tap in itertools.product(*taps):
            starts = [
                r.start * s + k * d
                for r, s, k, d in zip(box, window.strides, tap, window.dilation, strict=True)
            ]
            ends = [a + (len(r) - 1) * s + 1 for a, r, s in zip(starts, box, window.strides, strict=True)]
            part = jax.lax.slice(
                padded, (0, *starts, 0), (padded.shape[0], *ends, padded.shape[-1]), (1, *window.strides, 1)
            )
            parts.append(part)
        return jnp.stack(parts, axis=-2)


def _shifted(images: Array, step: Sequence[int]) -> Array:
    """Entry q is entry q + step of the images, zero where there is none."""
    margins = [(-s, s, 0) for s in step]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
