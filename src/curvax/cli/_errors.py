"""How the command line says no."""


class UsageError(Exception):
    """Something the user can put right: one line on the standard error and exit code 2."""


class TuningError(Exception):
    """The numerics gave up although data and options are fine: one line and exit code 1."""
