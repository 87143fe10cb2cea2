"""``python -m exssnet``: the command line."""

import sys

from .console import main

sys.exit(main())
