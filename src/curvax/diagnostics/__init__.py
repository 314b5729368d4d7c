"""Diagnostics: is a hypergradient right, how noisy is a loss, what does a spectrum look like, pictures."""

from curvax.diagnostics._check import check_hypergradient as check_hypergradient
from curvax.diagnostics._compare import RuleComparison as RuleComparison
from curvax.diagnostics._compare import compare_rules as compare_rules
from curvax.diagnostics._pictures import plot_convergence as plot_convergence
from curvax.diagnostics._pictures import plot_hypergradient_error as plot_hypergradient_error
from curvax.diagnostics._report import Comparison as Comparison
from curvax.diagnostics._report import DirectionRow as DirectionRow
from curvax.diagnostics._report import HypergradientCheck as HypergradientCheck
from curvax.diagnostics._report import Ingredient as Ingredient
from curvax.diagnostics._spectrum import ConditionNumber as ConditionNumber
from curvax.diagnostics._spectrum import Extremes as Extremes
from curvax.diagnostics._spectrum import SpectralRadius as SpectralRadius
from curvax.diagnostics._spectrum import condition_number as condition_number
from curvax.diagnostics._spectrum import spectral_radius as spectral_radius
from curvax.diagnostics._stationarity import Stationarity as Stationarity
from curvax.diagnostics._stationarity import direction_quality as direction_quality
from curvax.diagnostics._stationarity import second_order_stationarity as second_order_stationarity
