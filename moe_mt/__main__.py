"""``python -m moe_mt`` is ``moe-mt``."""

import sys

from moe_mt.cli import main

if __name__ == "__main__":
    sys.exit(main())
