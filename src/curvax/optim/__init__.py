"""Second-order optimisers for training: optax transformations that learn the curvature of every layer."""

from curvax.optim._kbfgs import kbfgs as kbfgs
from curvax.optim._kfac import ekfac as ekfac
from curvax.optim._kfac import kfac as kfac
from curvax.optim._options import Damping as Damping
from curvax.optim._options import Factors as Factors
from curvax.optim._options import Momentum as Momentum
from curvax.optim._options import Schedule as Schedule
from curvax.optim._report import BlockRow as BlockRow
from curvax.optim._report import OptimiserReport as OptimiserReport
from curvax.optim._report import report as report
from curvax.optim._state import OptimiserState as OptimiserState
from curvax.optim._state import StepInfo as StepInfo
from curvax.optim._trust_region import kf_trust_region as kf_trust_region
