"""A test on ranks fails when it fails on one of them, with that rank's traceback, and the next goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

TESTS = """\
import os, pytest
import torch.distributed as dist
pytestmark = pytest.mark.ranks(2)
def test_passes():
    assert dist.get_world_size() == 2 and "PYTEST_CURRENT_TEST" in os.environ
def test_fails_on_one_rank():
    assert [1, dist.get_rank()] == [1, 0]
    dist.barrier()
def test_rank_dies():
    os._exit(7)
def test_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("X", "1")
    dist.barrier()
def test_skipped():
    pytest.skip("needs a GPU")
"""


@pytest.mark.launch
def test_reports(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  ranks(n): n ranks\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "ranks", "-p", "no:cacheprovider", "-rA", str(tmp_path)],
        cwd=ROOT / "tests" / "helpers",
        capture_output=True,
        text=True,
    )
    outcomes = re.findall(
        r"^(PASSED|FAILED|SKIPPED) (?:\[1\] )?\S*?(?:::(\w+))?(?::\d+)?(?:$|[: ])", done.stdout, re.M
    )
    assert sorted(outcomes) == [
        ("FAILED", "test_fails_on_one_rank"), ("FAILED", "test_rank_dies"), ("PASSED", "test_goes_on"),
        ("PASSED", "test_passes"), ("SKIPPED", ""),
    ], done.stdout[-4000:] + done.stderr[-4000:]  # fmt: skip
    assert "assert [1, 1] == [1, 0]" in done.stdout and "failed on rank 1 of 2" in done.stdout
    assert "the ranks ended with 7" in done.stdout
