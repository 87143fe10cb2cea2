"""``python -m exssnet``: the command line."""

import sys

from .io.console import main

sys.exit(main())
