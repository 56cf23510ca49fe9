"""`python -m finestsam`: parse, then run one mode."""

import sys

from finestsam.cli import main

if __name__ == "__main__":
    sys.exit(main())
