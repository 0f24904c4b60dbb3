"""The command line as a module: `python -m diffsight --help`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.exit(import_module("diffsight.gallery.cli").main())
