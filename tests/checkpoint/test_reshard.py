"""A few pairs of the big table (``make reshard``): checkpoints of one layout, loaded by another."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from forks import ROOT
from reshard import FAMILIES, layouts


@pytest.mark.launch
def test_every_layouts_checkpoint_loads_in_every_other() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "reshard.py"), "--quick"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    pairs = sum(len(layouts(family, quick=True)) ** 2 for family in FAMILIES)
    assert re.search(r"^(\d+) of (\d+) pairs", done.stdout, re.MULTILINE).groups() == (str(pairs),) * 2


def test_the_table_covers_what_is_promised() -> None:
    for family in FAMILIES:
        found = layouts(family, quick=False)
        assert len(found) == len(set(found)) >= 15
        assert {layout.ranks for layout in found} == {1, 2, 4}
        for size in ("tp", "pp", "cp", "dp"):
            assert {getattr(layout, size) for layout in found} == {1, 2, 4}
    assert {layout.ep for layout in layouts("experts", quick=False)} == {1, 2, 4}
