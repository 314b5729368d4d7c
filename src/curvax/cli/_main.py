"""The program: arguments in, exit code out."""

import os
import sys
from collections.abc import Sequence

from curvax.cli._errors import TuningError, UsageError
from curvax.cli._options import parse
from curvax.cli._text import printable

_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells


def run(argv: Sequence[str] | None = None) -> int:
    """See `curvax.cli.main`."""
    try:
        options, resume, given = parse(argv)
    except UsageError as error:
        return _refuse(error)
    _limit_blas_threads()
    from curvax.cli._tune import tune  # imports JAX: not for --help, nor for a misspelt option

    try:
        tune(options, resume, given)
    except UsageError as error:
        return _refuse(error)
    except TuningError as error:
        print(f"curvax: {printable(error, 1000)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        hint = str(error) or "Nothing was written."
        print(f"\ncurvax: interrupted. {hint}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`curvax tune ... | head`); keep the interpreter from
        # complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _refuse(error: UsageError) -> int:
    print(f"curvax: error: {printable(error, 1000)}", file=sys.stderr)
    return 2


def _limit_blas_threads() -> None:
    """One thread for OpenBLAS, unless the user chose.

    jaxlib's LAPACK on the CPU is SciPy's OpenBLAS. Its threads and XLA's own fight for the cores: a Cholesky
    factorisation of size 256 inside a compiled step was measured at 125 ms instead of 0.4 ms.
    The variable counts when the library is loaded; for one that already is (`curvax` itself may have
    imported JAX), the running library is told.
    """
    if "OPENBLAS_NUM_THREADS" in os.environ:
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if "numpy" in sys.modules:
        import scipy.linalg  # noqa: F401  (the copy that jaxlib calls: it has to be there to be told)
        import threadpoolctl

        threadpoolctl.threadpool_limits(limits=1, user_api="blas")
