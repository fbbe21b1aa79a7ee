"""``python examples/bench BENCHMARK ...``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the package's folder instead of the package

from bench.command import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
