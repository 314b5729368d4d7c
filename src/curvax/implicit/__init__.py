"""Derivatives of solutions: the implicit function theorem as a rule, with a known error."""

from curvax.implicit._condition import FixedPoint as FixedPoint
from curvax.implicit._condition import Root as Root
from curvax.implicit._implicit import Implicit as Implicit
from curvax.implicit._rule import AbstractRule as AbstractRule
from curvax.implicit._rule import Outcome as Outcome
from curvax.implicit._rule import State as State
from curvax.implicit._rule import Stats as Stats
from curvax.implicit._rule import Task as Task
