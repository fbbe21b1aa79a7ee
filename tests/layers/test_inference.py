"""Inference with FoPE in Megatron's own engines: positions, caches, tokens against the full forward pass."""

from __future__ import annotations

import json
import re

import pytest
from launch import ROOT, torchrun

pytestmark = pytest.mark.launch

SCRIPT = ROOT / "tests" / "scripts" / "inference_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    """Every check with two tensor-parallel ranks, then again with one."""
    log = torchrun(2, [str(SCRIPT)]).stdout
    lines = [line for line in log.splitlines() if line.startswith('{"check_')]
    assert lines, log[-4000:]
    return json.loads(lines[-1])


@pytest.mark.parametrize("ranks", ["tp2", "tp1"])
@pytest.mark.parametrize("check", CHECKS)
def test_inference(check: str, ranks: str, results: dict[str, str | None]) -> None:
    outcome = results.get(f"{check}[{ranks}]", "did not run: an earlier check failed")
    assert outcome is None, f"\n{outcome}"
