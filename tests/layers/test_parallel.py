"""Packed documents, changing lengths and learnable coefficients under tensor and context parallelism.

Ordinary and packed sequences, padded and not, per-sample context-parallel groups: the loss and every gradient
of 4 ranks equal those of one rank on the separate documents.
"""

from __future__ import annotations

import json
import sys

import pytest
from launch import ROOT, torchrun

SCRIPTS = ROOT / "tests" / "scripts"
sys.path.insert(0, str(SCRIPTS))
import parallel_checks  # noqa: E402


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    done = torchrun(parallel_checks.RANKS, [str(SCRIPTS / "parallel_checks.py")], timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.mark.launch
@pytest.mark.parametrize("check", parallel_checks.checks())
def test_equals_one_rank(check: str, results: dict[str, str | None]) -> None:
    assert results[check] is None, f"\n{results[check]}"
