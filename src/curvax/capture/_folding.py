"""Whether a bias may be folded into the weight of the site it is added to."""

from collections.abc import Sequence

from curvax.capture._knowledge import Output, View
from curvax.capture._layout import Atom, Layout, merged

# Size, stride in the output of the site, stride in the bias.
_Pair = tuple[int, int, int]


def folded(
    roles: Sequence[tuple[int, str]], output: Output, bias: View, shape: Sequence[int]
) -> Layout | None:
    """The layout (stack, rows) of a bias that is added to the output of a site, if it is one.

    It is, if all of the output is there, once, and if an entry of the bias belongs to exactly one row of one member of
    the stack, at all shared positions. A bias that reaches a third of the output (as one of the three of a GRU) or that
    experts share is a parameter of its own.

    Args:
        roles: Sizes and roles of the axes of the output.
        output: That of the site, as it is laid out in the sum.
        bias: As it is laid out in the sum.
        shape: Of the sum.
    """
    if bias.layout is None:
        return None
    ours, its = output.layout.broadcast_to(shape), bias.layout.broadcast_to(shape)
    pairs = [_together(a, b) for a, b in zip(ours.axes, its.axes, strict=True)]
    if any(pair is None for pair in pairs) or ours.offset != 0:
        return None
    split = _by_axis([p for pair in pairs if pair is not None for p in pair], roles)
    if split is None:
        return None
    stride = 1
    for size, step, _, _ in sorted(split, key=lambda p: p[1]):
        if step != stride:
            return None
        stride *= size
    whole = 1
    for size, _ in roles:
        whole *= size
    if stride != whole or any((role == "shared") != (its_step == 0) for _, _, its_step, role in split):
        return None
    split.sort(key=lambda p: -p[1])
    part = lambda wanted: tuple((size, its_step) for size, _, its_step, role in split if role == wanted)
    return Layout(its.offset, (merged((*bias.stack, *part("stack"))), merged(part("rows"))))


def _together(ours: Sequence[Atom], its: Sequence[Atom]) -> list[_Pair] | None:
    """One axis of two arrays, cut where either of them is."""
    a, b, pairs = list(merged(ours)), list(merged(its)), []
    while a and b:
        (n, s), (m, t) = a.pop(0), b.pop(0)
        size = min(n, m)
        if max(n, m) % size:
            return None
        pairs.append((size, s * (n // size), t * (m // size)))
        if n > size:
            a.insert(0, (n // size, s))
        if m > size:
            b.insert(0, (m // size, t))
    return pairs


def _by_axis(
    pairs: Sequence[_Pair], roles: Sequence[tuple[int, str]]
) -> list[tuple[int, int, int, str]] | None:
    """The same cut where an axis of the output ends, each with the role of its axis."""
    axes, stride = [], 1
    for size, role in reversed(roles):
        axes.append((stride, stride * size, role))
        stride *= size
    found, rest = [], list(pairs)
    while rest:
        size, step, its_step = rest.pop()
        if size == 1:
            continue
        axis = next(((low, high, role) for low, high, role in axes if low <= step < high), None)
        if axis is None:
            return None
        _, high, role = axis
        inside = min(size, high // step)
        if size % inside:
            return None
        found.append((inside, step, its_step, role))
        if size > inside:
            rest.append((size // inside, step * inside, its_step * inside))
    return found
