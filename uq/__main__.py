"""``python -m uq`` is the ``uq`` command."""

import sys

from uq.cli import main

sys.exit(main())
