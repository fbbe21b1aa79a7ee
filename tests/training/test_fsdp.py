"""FoPE with fully sharded parameters, Megatron's and PyTorch's: the losses of one rank."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from forks import Launcher
from launch import TINY_MODEL, losses
from trainer import FOPE, SHARP, TP2

from megatron_fope import compat

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(
        compat.megatron_version().release < (0, 19), reason="FSDP was tried from Megatron-Core 0.19 on"
    ),
]

MODEL = [*TINY_MODEL, *FOPE, *SHARP, "--untie-embeddings-and-output-weights", "--train-iters", "4"]
MODELS = {"float32": "", "bf16": "--bf16", "learnable": "--fope-learnable"}
FSDP2 = "--use-torch-fsdp2 --ckpt-format torch_dcp"
MEGATRON_FSDP = (
    "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor "
    "--data-parallel-sharding-strategy "
)
WAYS = {
    "FSDP2": FSDP2,
    "Megatron optim": MEGATRON_FSDP + "optim",
    "Megatron optim_grads": MEGATRON_FSDP + "optim_grads",
    "Megatron optim_grads_params": MEGATRON_FSDP + "optim_grads_params",
}
CASES = [
    *(("float32", way, 2) for way in WAYS),
    *((model, way, 2) for model in ("bf16", "learnable") for way in ("FSDP2", "Megatron optim_grads_params")),
    ("float32", "Megatron optim_grads_params", 4),
]
"""Model, way, ranks; four ranks are TP 2 with SP, DP 2."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> dict[str, list[float]]:
    found = {}
    for model, flags in MODELS.items():
        log = tmp_path_factory.mktemp("one") / "log"
        found[model] = losses(launcher.output(1, ["--cpu", "pretrain", *MODEL, *flags.split()], log))
    assert len({tuple(curve) for curve in found.values()}) == 3, "the models differ"
    return found


@pytest.mark.parametrize(("model", "way", "ranks"), CASES)
def test_losses_are_those_of_one_rank(
    model: str, way: str, ranks: int, one_rank: dict[str, list[float]], launcher: Launcher, tmp_path: Path
) -> None:
    flags = [*shlex.split(WAYS[way]), *MODELS[model].split(), *(TP2 if ranks == 4 else ())]
    found = losses(launcher.output(ranks, ["--cpu", "pretrain", *MODEL, *flags], tmp_path / "log"))
    assert len(found) == 4 and found == pytest.approx(one_rank[model], abs=2e-3 if model == "bf16" else 1e-5)


@pytest.mark.parametrize("way", ["FSDP2", "Megatron optim_grads_params"])
def test_learnable_coefficients_in_16_bits_are_refused(way: str, launcher: Launcher, tmp_path: Path) -> None:
    flags = [*shlex.split(WAYS[way]), "--bf16", "--fope-learnable"]
    code, log = launcher.run(2, ["--cpu", "pretrain", *MODEL, *flags], tmp_path / "log")
    message = f"error: --fope-learnable and --bf16 are given with {flags[0]}, which"
    assert code == 2 and message in log, log[-4000:]
    assert "Traceback" not in log
