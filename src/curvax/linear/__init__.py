"""Linear solvers that Lineax lacks, preconditioners for them, and matrix equations."""

from curvax.linear._auto import Auto as Auto
from curvax.linear._auto_stages import Method as Method
from curvax.linear._auto_stages import Reason as Reason
from curvax.linear._cg import CG as CG
from curvax.linear._fgmres import FGMRES as FGMRES
from curvax.linear._jacobi import jacobi as jacobi
from curvax.linear._lbfgs import LBFGSPreconditioner as LBFGSPreconditioner
from curvax.linear._lbfgs import lbfgs as lbfgs
from curvax.linear._low_rank_sylvester import LowRankSolution as LowRankSolution
from curvax.linear._minres import MINRES as MINRES
from curvax.linear._neumann import Neumann as Neumann
from curvax.linear._nystrom import NystromPreconditioner as NystromPreconditioner
from curvax.linear._nystrom import nystrom as nystrom
from curvax.linear._refined import Refined as Refined
from curvax.linear._sylvester import solve_lyapunov as solve_lyapunov
from curvax.linear._sylvester import solve_sylvester as solve_sylvester
from curvax.linear._upkeep import KeptPreconditioner as KeptPreconditioner
from curvax.linear._upkeep import Upkeep as Upkeep
