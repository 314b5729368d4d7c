"""`python -m curvax`."""

import sys

from curvax.cli import main

if __name__ == "__main__":
    sys.exit(main())
