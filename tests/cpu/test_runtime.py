"""The CPU runtime: its flags, and that parallel layouts train alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Launcher
from launch import ROOT, TINY_MODEL, losses

from megatron_fope import cpu
from megatron_fope.common.errors import UserError

# --- Flags --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``add_argument_defaults`` sets environment variables; undo that after each test."""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_missing_flags_are_appended() -> None:
    argv = ["program", "--num-layers", "2"]
    completed = cpu.add_argument_defaults(argv)
    assert argv == ["program", "--num-layers", "2"]
    assert completed[:3] == argv
    assert completed[completed.index("--distributed-backend") + 1] == "gloo"
    assert completed[completed.index("--transformer-impl") + 1] == "local"
    assert "--use-cpu-initialization" in completed
    assert "--no-create-attention-mask-in-dataloader" in completed
    assert not any("dropout" in word for word in completed)


@pytest.mark.parametrize(
    "given", [["--transformer-impl", "local"], ["--transformer-impl=local"], ["--no-rope-fusion"]]
)
def test_given_flags_are_kept(given: list[str]) -> None:
    completed = cpu.add_argument_defaults(given)
    flag = given[0].partition("=")[0]
    assert [word.partition("=")[0] for word in completed].count(flag) == 1
    assert cpu.add_argument_defaults(completed) == completed


def test_masks_of_documents_are_kept() -> None:
    completed = cpu.add_argument_defaults(["--reset-attention-mask"])
    assert "--no-create-attention-mask-in-dataloader" not in completed


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--transformer-impl", "transformer_engine"], ["--transformer-impl transformer_engine", "local"]),
        (["--transformer-impl=transformer_engine"], ["--transformer-impl transformer_engine", "local"]),
        (["--distributed-backend", "nccl"], ["--distributed-backend nccl", "gloo"]),
        (["--distributed-backend", "gloo", "--distributed-backend", "nccl"], ["nccl", "gloo"]),
        (["--fp8-format", "hybrid"], ["--fp8-format hybrid"]),
        (["--cuda-graph-impl", "local"], ["--cuda-graph-impl local", "none"]),
        (["--enable-cuda-graph"], ["--enable-cuda-graph"]),
        (["--use-megatron-fsdp", "--save", "out"], ["--save", "--use-megatron-fsdp"]),
        (["--attention-backend", "flash"], ["--attention-backend flash", "local"]),
    ],
)
def test_impossible_flags_are_refused_in_one_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        cpu.add_argument_defaults(["program", *argv, "--bf16"])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_environment_is_only_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    cpu.add_argument_defaults([])
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize("set_before", ["1", None])
@pytest.mark.parametrize("flag", ["--use-megatron-fsdp", "--use-torch-fsdp2"])
def test_environment_with_fsdp(flag: str, set_before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asserts another value than 1 there."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if set_before is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    completed = cpu.add_argument_defaults([flag])
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert ("--no-gradient-reduce-div-fusion" in completed) == ("megatron" in flag)


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; before = torch.cuda.current_stream, torch.Tensor.cuda; import megatron_fope.cpu, sys; "
        "assert (torch.cuda.current_stream, torch.Tensor.cuda) == before; "
        "assert not any(name.startswith('megatron.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- Training -----------------------------------------------------------------------------------------

ROPE = ("--position-embedding-type", "rope")
Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def train(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains the tiny model on a number of ranks with more flags; the losses."""
    folder = tmp_path_factory.mktemp("logs")

    def run(nproc: int, *flags: str) -> list[float]:
        return losses(launcher.output(nproc, ["--cpu", "pretrain", *TINY_MODEL, *flags], folder / "log"))

    return run


@pytest.fixture(scope="module")
def start(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that start a run from common weights: pipeline stages seed theirs differently."""
    folder = str(tmp_path_factory.mktemp("start"))
    train(
        1,
        *ROPE,
        "--save",
        folder,
        "--save-interval",
        "1",
        "--train-iters",
        "1",
        "--no-save-optim",
        "--no-save-rng",
    )
    return (*ROPE, "--load", folder, "--finetune")


@pytest.fixture(scope="module")
def one_rank(train: Train, start: tuple[str, ...]) -> list[float]:
    """Losses of one rank."""
    values = train(1, *start)
    assert len(values) == 3
    assert values[2] < values[0]
    return values


@pytest.mark.launch
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--context-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
    ids=["tp-sp", "cp", "pp-vpp", "dp-distopt"],
)
def test_layouts_train_alike(
    num_ranks: int, layout: str, train: Train, start: tuple[str, ...], one_rank: list[float]
) -> None:
    assert train(num_ranks, *start, *layout.split()) == pytest.approx(one_rank, abs=1e-5)


@pytest.mark.launch
def test_log_says_which_attention_runs(
    launcher: Launcher, start: tuple[str, ...], one_rank: list[float], tmp_path: Path
) -> None:
    """And that Megatron's own trains like the fused one."""
    for flags, line in (
        ((), "in PyTorch's fused kernel"),
        (("--attention-backend", "unfused"), "not fused because of --attention-backend unfused"),
        (("--attention-dropout", "0.1"), "not fused because of attention dropout"),
        (("--reset-attention-mask",), "not fused because of a mask that comes with the batch"),
    ):
        log = launcher.output(1, ["--cpu", "pretrain", *TINY_MODEL, *start, *flags], tmp_path / "log")
        lines = [word for word in log.splitlines() if word.startswith("> CPU runtime: attention")]
        assert len(lines) == 1 and line in lines[0], lines
        if "unfused" in flags:
            assert losses(log) == pytest.approx(one_rank, abs=1e-6)


@pytest.mark.launch
def test_distributed_optimizer_resumes_exactly(train: Train, tmp_path: Path) -> None:
    common = (*ROPE, "--bf16", "--use-distributed-optimizer", "--train-iters", "5")
    whole = train(2, *common)
    train(2, *common, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    resumed = train(2, *common, "--load", str(tmp_path))
    assert len(resumed) == 3
    # See launch.losses: the second number after a start is a mean.
    assert [resumed[0], resumed[2]] == pytest.approx([whole[2], whole[4]], abs=2e-6)


def test_losses_are_read_from_the_log() -> None:
    line = (
        " [2026-01-01 00:00:00] iteration        2/       3 | consumed samples: 8 | lm loss: 5.5E+00 | x: 1 |"
    )
    assert losses(f"noise\n{line}\n validation loss at iteration 2 | lm loss value: 4.0E+00 |") == [5.5]
