"""Curvax: second derivatives put to work in JAX."""

from curvax import bilevel as bilevel
from curvax import diagnostics as diagnostics
from curvax import implicit as implicit
from curvax import linear as linear
from curvax import operators as operators
from curvax import unroll as unroll
from curvax._results import RESULTS as RESULTS
from curvax.bilevel import Bilevel as Bilevel
from curvax.bilevel import Checkpoint as Checkpoint
from curvax.bilevel import EarlyStopping as EarlyStopping
from curvax.bilevel import Every as Every
from curvax.bilevel import Info as Info
from curvax.bilevel import Minibatches as Minibatches
from curvax.bilevel import hypergradient as hypergradient
from curvax.bilevel import minimise as minimise
from curvax.bilevel import solution_map as solution_map
from curvax.diagnostics import check_hypergradient as check_hypergradient
from curvax.implicit import FixedPoint as FixedPoint
from curvax.implicit import Implicit as Implicit
from curvax.implicit import Root as Root
from curvax.unroll import Steps as Steps
from curvax.unroll import Unrolled as Unrolled
