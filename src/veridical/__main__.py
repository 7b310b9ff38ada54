"""`python -m veridical` is the command `veridical`."""

import sys

from veridical.cli import main

if __name__ == "__main__":
    sys.exit(main())
