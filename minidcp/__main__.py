"""`python -m minidcp …`, and so `torchrun … -m minidcp serve …`."""

from minidcp.cli import main

raise SystemExit(main())
