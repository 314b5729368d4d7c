"""Linear solvers that Lineax lacks, for use with `lineax.linear_solve`."""

from curvax.linear._auto import Auto as Auto
from curvax.linear._auto_stages import Method as Method
from curvax.linear._auto_stages import Reason as Reason
from curvax.linear._cg import CG as CG
from curvax.linear._minres import MINRES as MINRES
from curvax.linear._neumann import Neumann as Neumann
