"""Differentiating through training: Optax inner loops and their derivatives."""

from curvax.unroll._cost import CostRow as CostRow
from curvax.unroll._cost import Costs as Costs
from curvax.unroll._cost import cost as cost
from curvax.unroll._finite_difference import FiniteDifference as FiniteDifference
from curvax.unroll._first_order import FirstOrder as FirstOrder
from curvax.unroll._gradient_flow import GradientFlow as GradientFlow
from curvax.unroll._half import HalfPrecision as HalfPrecision
from curvax.unroll._one_step import OneStep as OneStep
from curvax.unroll._path_stats import PathStats as PathStats
from curvax.unroll._schedule import MemoryBudget as MemoryBudget
from curvax.unroll._steps import Steps as Steps
from curvax.unroll._unrolled import Unrolled as Unrolled
