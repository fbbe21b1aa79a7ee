"""Megatron-Bridge reads and writes FoPE folders; ``make test-bridge``, with ``.venv-bridge``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exports import LONG, byte_tokenizer, make_exports, random_prompts
from forks import Launcher
from launch import ROOT
from ports import free_port
from trainer import Trainer

PACKAGES = ROOT / ".venv-bridge"
CHECKS = ROOT / "tests" / "scripts" / "bridge_checks.py"
NAMES = ["paper, dense", "intern-s1-pro, dense", "qwen2, shared heads and basis, learnable"]
LAYERS = 4


@pytest.fixture(scope="module")
def cases(trainer: Trainer, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    made = make_exports(
        NAMES,
        trainer,
        launcher,
        folder,
        prompts=random_prompts(LONG),
        generated=1,
        tokenizer=byte_tokenizer(folder / "tokenizer"),
    )
    listed = {
        name: {"folder": str(one.folder), "reference": str(one.reference)} for name, one in made.items()
    }
    (folder / "cases.json").write_text(json.dumps(listed))
    return folder / "cases.json"


@pytest.fixture(scope="module", params=[1])
def results(request: pytest.FixtureRequest, cases: Path) -> tuple[int, dict[str, Any]]:
    """With as many tensor-parallel ranks."""
    assert (PACKAGES / "megatron" / "bridge").is_dir(), (
        f"Megatron-Bridge is not in {PACKAGES}; use make test-bridge"
    )
    ranks, out = request.param, cases.with_name(f"results-{request.param}.json")
    paths = [str(PACKAGES), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
    }
    logs = [cases.with_name(f"log-{ranks}-{rank}") for rank in range(ranks)]
    started = [
        subprocess.Popen(
            [sys.executable, CHECKS, cases, out],
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"HF_MODULES_CACHE": str(cases.with_name(f"modules-{ranks}-{rank}"))},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-6000:] for log in logs)
    found = json.loads(out.read_text())
    for name, result in found.items():
        print(f"{ranks} ranks, {name}: logits differ by {result['difference']:.1e} from Megatron's")
    return ranks, found


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_bridge(name: str, results: tuple[int, dict[str, Any]]) -> None:
    ranks, found = results
    result = found[name]
    assert result["layers"] == result["own provider"] == LAYERS
    # One rank computes what Megatron does, bit for bit; two add in another order.
    assert result["difference"] <= (0.0 if ranks == 1 else 1e-5 * result["largest logit"])
    assert result["same names"] and result["same bits"] == []
    assert result["stored"]
    assert [text.partition(";")[0] for text in result["refused"]] == [
        "fope is None",
        "position_embedding_type is 'rope'",
        "mtp_num_layers is 1",
    ]
