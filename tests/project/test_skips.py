"""A test that is skipped because something is missing fails instead."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from launch import ROOT
from skips import REASONS

TESTS = """\
import pytest
@pytest.fixture
def library():
    return pytest.importorskip("no_such_library")
def test_fixture(library): ...
def test_call(): pytest.skip("tokenizers is not installed")
@pytest.mark.skipif(True, reason="not today")
def test_mark(): ...
@pytest.mark.skipif(True, reason="needs a GPU")
def test_allowed(): ...
@pytest.mark.xfail
def test_expected(): assert False
"""


def test_only_skips_with_a_listed_reason(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text('import pytest\npytest.importorskip("no_such_library")\n')
    command = ["-m", "pytest", "-p", "skips", "--continue-on-collection-errors", "-rA", "-c", "/dev/null"]
    done = subprocess.run(
        [sys.executable, *command, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT / "tests" / "helpers",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    outcomes = set(re.findall(r"^(?:FAILED|ERROR|SKIPPED|XFAIL) .*", done.stdout, re.MULTILINE))
    assert {re.sub(r" - .*|\[1\] |\S*/|:\d+:.*", "", line) for line in outcomes} == {
        "ERROR test_module.py", "ERROR test_some.py::test_fixture", "FAILED test_some.py::test_call",
        "ERROR test_some.py::test_mark", "SKIPPED test_some.py", "XFAIL test_some.py::test_expected",
    }  # fmt: skip
    assert "tests/helpers/skips.py: tokenizers is not installed" in done.stdout


def test_every_listed_reason_is_given_somewhere() -> None:
    """In the tests' source, where a number may be computed."""
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "skips.py")
    for reason in REASONS:
        start = re.split(r"[(\\]", reason.replace(r"\.", "."))[0]
        assert start in source, reason
