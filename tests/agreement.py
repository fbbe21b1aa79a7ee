"""Prints how far logits differ between Megatron and transformers, by family, direction and layout.

``python tests/agreement.py`` runs the tests that compare them, and prints what they found as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().with_name("helpers")))

from differences import VARIABLE
from launch import ROOT

TESTS = ("tests/tools/test_huggingface.py", "tests/tools/test_export.py")
NAMES = "computes_what_transformers_does or return_from_every_layout or exported"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        environment = os.environ | {VARIABLE: str(file)}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", NAMES]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        print(table(file.read_text()))


def table(rows: str) -> str:
    """Of the lines that :func:`differences.keep` wrote."""
    found: dict[tuple[str, str, str], dict[str, float | None]] = defaultdict(dict)
    for line in rows.splitlines():
        family, direction, layout, version, difference = json.loads(line)
        found[direction, family, layout][version] = difference
    versions = sorted({version for cells in found.values() for version in cells}, reverse=True)
    lines = [
        "| direction | model | ranks | " + " | ".join(f"transformers {v}" for v in versions) + " |",
        "|---|---|---|" + "---:|" * len(versions),
    ]
    rows_of: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for (direction, family, layout), cells in found.items():
        rows_of[direction, family, *(shown(cells, version) for version in versions)].append(layout)
    for (direction, family, *values), layouts in rows_of.items():
        lines.append(f"| {' | '.join([direction, family, ', '.join(layouts), *values])} |")
    return "\n".join(lines)


def shown(cells: dict[str, float | None], version: str) -> str:
    """One cell."""
    if version not in cells:
        return ""
    difference = cells[version]
    return "the same bits" if difference is None else f"{difference:.1e}" if difference else "0"


if __name__ == "__main__":
    main()
