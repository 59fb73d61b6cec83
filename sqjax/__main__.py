"""`python -m sqjax`: the same commands as `sqjax`."""

import sys

from sqjax.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
