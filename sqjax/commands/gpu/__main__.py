"""`python -m sqjax.commands.gpu`."""

import sys

from sqjax.commands.gpu.script import main

if __name__ == "__main__":
    sys.exit(main())
