"""What is known about a value of a program: the two colours of provenance."""

from dataclasses import dataclass, replace
from enum import IntEnum

from curvax.capture._layout import Axis, Layout


class Colour(IntEnum):
    """What a value depends on: nothing, arrays that all examples share (parameters too), or the example."""

    CONSTANT = 0
    FIXED = 1
    EXAMPLE = 2


@dataclass(frozen=True)
class Data:
    """Anything that is not a view. `iota` is the axis along which it counts, `one_hot` the one with a single 1."""

    colour: Colour
    iota: int | None = None
    one_hot: int | None = None


@dataclass(frozen=True)
class Output:
    """The result of a site, rearranged."""

    colour: Colour
    site: str
    layout: Layout


@dataclass(frozen=True)
class View:
    """Linear (up to a constant) in exactly one parameter, and independent of data.

    Attributes:
        leaf: Number of the parameter.
        layout: Where its entries lie in the parameter; None if they are no rearrangement of it times a scalar.
        stack: The axes that scans have taken off, the outermost first.
        levels: For every scan around: whether each step has its own part.
        scaled: Whether there is a scalar factor.
        reason: Why `layout` is None.
    """

    leaf: int
    layout: Layout | None
    stack: Axis = ()
    levels: tuple[bool, ...] = ()
    scaled: bool = False
    reason: str = ""

    @property
    def colour(self) -> Colour:
        """Parameters are the same for all examples."""
        return Colour.FIXED

    def moved(
        self, layout: Layout | None, reason: str = "rearranged in a way that no strides describe"
    ) -> "View":
        """The same, rearranged."""
        return replace(self, layout=layout, reason=self.reason if layout or not self.layout else reason)

    def blurred(self, reason: str) -> "View":
        """Still linear in the parameter, but not by a rearrangement."""
        return replace(self, layout=None, reason=self.reason or reason)


Knowledge = Data | Output | View
