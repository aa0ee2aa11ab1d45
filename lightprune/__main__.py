"""`python -m lightprune` is the same as the command `lightprune`."""

import sys

from lightprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
