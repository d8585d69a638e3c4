"""`python -m sdeflow` is the command `sdeflow`; torchrun starts it by this name."""

import sys

from .cli import main

sys.exit(main())
