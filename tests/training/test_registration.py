"""``register()`` and ``unregister()`` against the installed Megatron, in one process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from launch import ROOT

SCRIPT = ROOT / "tests" / "scripts" / "registration_checks.py"
CHECKS = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Traceback or None of every check of the script."""
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.launch
@pytest.mark.parametrize("name", CHECKS)
def test_registration(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.launch
def test_all_checks_ran(outcomes: dict[str, str | None]) -> None:
    assert sorted(outcomes) == sorted(CHECKS)
    assert len(CHECKS) > 10


@pytest.mark.parametrize("module", ["megatron_fope", "megatron_fope.tools.cli", "megatron_fope.cpu"])
def test_import_loads_neither_torch_nor_megatron(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'megatron', 'numpy'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


def test_every_public_name_exists() -> None:
    import megatron_fope

    assert [name for name in megatron_fope.__all__ if not hasattr(megatron_fope, name)] == []
    with pytest.raises(AttributeError, match="'nothing'"):
        megatron_fope.nothing  # noqa: B018
