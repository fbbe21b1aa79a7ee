"""FoPE in real Megatron models: layers, precision, layouts of heads, packed data, checkpoint keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from launch import ROOT

SCRIPTS = ROOT / "tests" / "scripts"
CHECKS = [
    check
    for file in (
        *("model_checks.py", "spec_checks.py", "mla_checks.py"),
        *("host_checks.py", "state_checks.py", "position_checks.py"),
    )
    for check in re.findall(r"^def (check_\w+)", (SCRIPTS / file).read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "model_checks.py"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.launch
@pytest.mark.parametrize("check", CHECKS)
def test_model(check: str, results: dict[str, str | None]) -> None:
    assert results[check] is None, f"\n{results[check]}"
