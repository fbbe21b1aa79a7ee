"""Every command in the documentation runs, or its page says why it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "examples", "patches") for page in sorted(ROOT.glob(f"{folder}/**/*.md"))),
]
_BLOCK = re.compile(r"(?:<!-- (?P<mark>.+) -->\n)?```(?:bash|sh|console)\n(?P<commands>[\s\S]*?)```")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(comment in front, commands) of every block of shell commands."""
    return [(m["mark"] or "", m["commands"]) for m in _BLOCK.finditer(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_whether_it_is_run(page: Path) -> None:
    for mark, commands in blocks(page):
        elsewhere = re.fullmatch(r"run by (tests/\S+\.py)", mark)
        assert mark == "run" or elsewhere or re.match(r"not run: .{10,}", mark), f"unmarked:\n{commands}"
        assert not elsewhere or page.name in (ROOT / elsewhere[1]).read_text(), mark


@pytest.mark.launch
@pytest.mark.parametrize("page", [p for p in PAGES if any(mark == "run" for mark, _ in blocks(p))], ids=name)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    """All blocks of a page that are to run, one after another as one script, in an empty folder."""
    script = "\n".join(commands for mark, commands in blocks(page) if mark == "run")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "EXAMPLES": str(ROOT / "examples"),
        "DOCS": str(ROOT / "docs"),
        "PACKAGE": str(ROOT / "megatron_fope"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
