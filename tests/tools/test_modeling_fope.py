"""The model file that travels with exported weights: every family, newest and oldest transformers."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT
from ports import free_port

MODELING = ROOT / "megatron_fope" / "tools" / "huggingface" / "modeling_fope.py"
SCRIPTS = [ROOT / "tests" / "scripts" / name for name in ("modeling_checks.py", "modeling_parallel.py")]
CHECKS = [
    name for path in SCRIPTS for name in re.findall(r"^def (check_\w+)", path.read_text(), re.MULTILINE)
]
FAMILIES = 5
OLDEST = "5.1.0"
"""The oldest transformers that pyproject.toml allows."""


@pytest.fixture(scope="module", params=["installed", OLDEST])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """Every check of every family with one release of transformers."""
    made = tmp_path_factory.mktemp("models")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if request.param == OLDEST:
        folder = Path(sys.prefix) / "transformers" / OLDEST
        assert (folder / "transformers").is_dir(), f"transformers {OLDEST} is not in {folder}; use make setup"
        paths.insert(0, str(folder))
    done = subprocess.run(
        [sys.executable, SCRIPTS[0], made, str(free_port())],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(made / "modules"), "PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    installed = importlib.metadata.version("transformers")
    assert answer["transformers"] == (OLDEST if request.param == OLDEST else installed)
    print(f"largest difference of a logit with transformers {answer['transformers']}: ", end="")
    print(f"{answer['largest difference']:.1e} of the largest")
    return answer["results"]


@pytest.mark.launch
@pytest.mark.parametrize("check", CHECKS)
def test_model_file(check: str, results: dict[str, str | None]) -> None:
    outcomes = {name: result for name, result in results.items() if name.startswith(f"{check}[")}
    assert len(outcomes) == FAMILIES
    failed = {name: result for name, result in outcomes.items() if result is not None}
    assert not failed, "\n".join(f"{name}\n{result}" for name, result in failed.items())


def test_it_travels_alone() -> None:
    """It imports PyTorch, transformers and Python's own modules."""
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(MODELING.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or "."] if isinstance(node, ast.ImportFrom)
            else []
        )
    }  # fmt: skip
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_transformers_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from megatron_fope.tools.huggingface import register; "
        "assert 'transformers' not in sys.modules; register(); register(); "
        "from transformers import AutoConfig; print(AutoConfig.for_model('fope_qwen3_moe').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fope_qwen3_moe", done.stderr
