"""vLLM computes what Megatron does; ``make test-vllm``, in ``.venv-vllm``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from exports import LONG, MODELS, make_exports, random_prompts
from forks import Launcher
from launch import ROOT
from trainer import Trainer

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CHECKS = ROOT / "tests" / "scripts" / "vllm_checks.py"
RUNS = {"one rank": (1, "float32"), "TP 2": (2, "float32"), "bf16": (1, "bfloat16")}
NAMES = list(MODELS)
GENERATED = 16
LARGEST, MEAN_BF16 = 1e-4, 0.2
"""Allowed differences of log-probabilities: each in float32; their mean in bfloat16, where other experts may
be chosen. Megatron's are float32."""


@pytest.fixture(scope="module")
def cases(trainer: Trainer, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model exported; prompts of four times the trained length, and of another length."""
    folder = tmp_path_factory.mktemp("exports")
    prompts = random_prompts(LONG, 100)
    made = make_exports(NAMES, trainer, launcher, folder, prompts=prompts, generated=GENERATED)
    listed = {
        name: {"folder": str(one.folder), "reference": str(one.reference)} for name, one in made.items()
    }
    (folder / "cases.json").write_text(json.dumps(listed))
    return folder / "cases.json"


@pytest.fixture(scope="module", params=list(RUNS))
def results(request: pytest.FixtureRequest, cases: Path) -> tuple[int, str, dict[str, Any]]:
    assert PYTHON.exists(), f"vLLM is not in {PYTHON.parent.parent}; use make test-vllm"
    ranks, dtype = RUNS[request.param]
    out = cases.with_name(f"results-{ranks}-{dtype}.json")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(cases.with_name(f"modules-{ranks}-{dtype}")),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [PYTHON, CHECKS, cases, str(ranks), dtype, out],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    found = json.loads(out.read_text())
    for name, result in found.items():
        print(f"{request.param}, {name}: log-probabilities differ from Megatron's", end=" ")
        print(f"by {result['largest']:.1e} at most, {result['mean']:.1e} on average")
    return ranks, dtype, found


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_vllm(name: str, results: tuple[int, str, dict[str, Any]]) -> None:
    """Log-probabilities of prompts up to four times the trained length, and the text after them."""
    ranks, dtype, found = results
    result = found[name]
    if dtype == "float32":
        assert result["largest"] < LARGEST and all(result["same text"])
    else:
        assert result["mean"] < MEAN_BF16
    assert len(result["coefficients"]) == ranks
    for of_rank in result["coefficients"]:
        assert of_rank
        assert all(kind == "torch.float32" for kind, _, _ in of_rank.values())
