"""``python -m harness`` is ``kv-eviction``."""

import sys

from .cli import main

sys.exit(main())
