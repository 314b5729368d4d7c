"""Curvature matrices that are never formed: Lineax operators over pytrees."""

from curvax.operators._base import AbstractDerivativeOperator as AbstractDerivativeOperator
from curvax.operators._block_diagonal import BlockDiagonal as BlockDiagonal
from curvax.operators._block_tridiagonal import BlockTridiagonal as BlockTridiagonal
from curvax.operators._circulant import Circulant as Circulant
from curvax.operators._cross_derivative import CrossDerivative as CrossDerivative
from curvax.operators._cross_derivative import cross_derivative as cross_derivative
from curvax.operators._damped import Damped as Damped
from curvax.operators._gauss_newton import GaussNewton as GaussNewton
from curvax.operators._gauss_newton import gauss_newton as gauss_newton
from curvax.operators._hessian import Hessian as Hessian
from curvax.operators._hessian import hessian as hessian
from curvax.operators._jacobian import Jacobian as Jacobian
from curvax.operators._jacobian import fixed_point_jacobian as fixed_point_jacobian
from curvax.operators._jacobian import residual_jacobian as residual_jacobian
from curvax.operators._kronecker import EigenKronecker as EigenKronecker
from curvax.operators._kronecker import Kronecker as Kronecker
from curvax.operators._kronecker_sum import KroneckerSum as KroneckerSum
from curvax.operators._kronecker_sum import nearest_kronecker as nearest_kronecker
from curvax.operators._low_rank import LowRankPlusDiagonal as LowRankPlusDiagonal
from curvax.operators._structured import AbstractStructuredOperator as AbstractStructuredOperator
from curvax.operators._toeplitz import Toeplitz as Toeplitz
