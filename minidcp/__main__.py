"""`python -m minidcp …`, and so `torchrun … -m minidcp serve …`."""

import sys

from minidcp.cli import main

sys.exit(main())
