"""How a model's layers are found in its program, and what flows through them."""

from curvax.capture._block import Block as Block
from curvax.capture._groups import Group as Group
from curvax.capture._inputs import AbstractInputs as AbstractInputs
from curvax.capture._layers import Layers as Layers
from curvax.capture._layers import find_layers as find_layers
from curvax.capture._moments import Moments as Moments
from curvax.capture._moments import PerExampleGradients as PerExampleGradients
from curvax.capture._moments import SecondMoments as SecondMoments
from curvax.capture._report import Report as Report
from curvax.capture._report import ReportRow as ReportRow
from curvax.capture._report import report as report
from curvax.capture._second_moment import second_moment as second_moment
from curvax.capture._site import Site as Site
from curvax.capture._statistics import statistics as statistics
