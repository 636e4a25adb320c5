"""Run ``python -m mooncake_connector.cli``."""

from __future__ import annotations

import sys

from mooncake_connector.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
