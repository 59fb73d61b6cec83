"""`python -m sqjax`: the same commands as `sqjax`."""

import sys

from sqjax.commands.cli import script

if __name__ == "__main__":
    sys.exit(script())
