"""Bilevel optimisation: the problem, its hypergradient, the solution map and the driver."""

from curvax.bilevel._callbacks import EarlyStopping as EarlyStopping
from curvax.bilevel._callbacks import Every as Every
from curvax.bilevel._callbacks import Info as Info
from curvax.bilevel._checkpoint import Checkpoint as Checkpoint
from curvax.bilevel._data import Minibatches as Minibatches
from curvax.bilevel._history import History as History
from curvax.bilevel._hypergradient import Hypergradient as Hypergradient
from curvax.bilevel._hypergradient import hypergradient as hypergradient
from curvax.bilevel._minimise import Solution as Solution
from curvax.bilevel._minimise import minimise as minimise
from curvax.bilevel._problem import Bilevel as Bilevel
from curvax.bilevel._solution_map import SolutionMap as SolutionMap
from curvax.bilevel._solution_map import solution_map as solution_map
from curvax.bilevel._state import initial_state as initial_state
