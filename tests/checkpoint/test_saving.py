"""Saving and resuming: every bit of the losses, asynchronous saves, and a kill in the middle of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import ROOT
from trainer import DROPOUT, FOPE, TP2, Run, Trainer

from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry

pytestmark = pytest.mark.launch

ROPE = ("--position-embedding-type", "rope")
ASYNC = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
DIST = "--use-distributed-optimizer"
KILL = ROOT / "tests" / "scripts" / "kill_while_saving"


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Run:
    """Four iterations on one rank without interruption, all of them saved."""
    return trainer.run("whole", *FOPE, *DROPOUT, "--save-interval", "1")


def fresh_coefficients(name: str) -> torch.Tensor:
    config = FoPEConfig.from_profile(train_length=64)
    geometry = Geometry(config, 16, 2)
    return torch.stack([geometry.make_coefficients(layer=layer)[name] for layer in range(1, 5)])


LAYOUTS = {
    "TP2 SP": (2, TP2),
    "PP2, learnable": (2, ("--pipeline-model-parallel-size", "2", "--fope-learnable")),
    "DP2, distributed optimizer, bf16": (2, (DIST, "--bf16")),
    "DP2, reshardable distributed optimizer, learnable": (
        2,
        (DIST, "--dist-ckpt-optim-fully-reshardable", "--fope-learnable"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_is_exact(layout: str, trainer: Trainer) -> None:
    """Dropout needs the random state, other fresh coefficients must not matter."""
    nproc, flags = LAYOUTS[layout]
    flags = (*FOPE, *DROPOUT, *flags)
    run = trainer.run(layout, *flags, nproc=nproc)
    resumed = trainer.run(
        f"{layout}, resumed", *flags, "--load", str(run.folder), "--ckpt-step", "2", "--fope-seed", "9",
        nproc=nproc,
    )  # fmt: skip
    check_continues(resumed, run)
    before, after = run.coefficients(2), run.coefficients(4)
    for name, value in resumed.coefficients().items():
        assert torch.equal(value, after[name])
        assert torch.equal(before[name], fresh_coefficients(name)) != ("learnable" in layout)
        assert torch.equal(after[name], before[name]) != ("learnable" in layout)


def check_continues(resumed: Run, run: Run, *iterations: int) -> None:
    for tag in ("lm loss", "grad-norm"):
        expected, curve = run.curve(tag), resumed.curve(tag)
        assert {step: expected[step] for step in iterations or (3, 4)} == curve
        assert len(set(expected.values())) == 4, "iterations that do not differ would prove nothing"


def test_resuming_on_one_rank_is_exact(trainer: Trainer, whole: Run) -> None:
    resumed = trainer.run(
        "one rank, resumed", *FOPE, *DROPOUT, "--load", str(whole.folder), "--ckpt-step", "2", save=False
    )
    check_continues(resumed, whole)


def test_the_random_state_matters(trainer: Trainer, whole: Run) -> None:
    """The test above would fail without it."""
    resumed = trainer.run(
        "one rank, other random numbers", *FOPE, *DROPOUT, "--load", str(whole.folder), "--ckpt-step", "2",
        "--no-load-rng", save=False,
    )  # fmt: skip
    assert resumed.curve()[3] != whole.curve()[3]


WITHOUT = "import megatron_fope.training.registration as registration; registration.register = lambda: None"
"""A hook that leaves Megatron as it is, on the CPU."""


@pytest.mark.parametrize("flags", [ROPE, ("--use-checkpoint-args",)], ids=["resume", "checkpoint-args"])
def test_megatron_without_this_package_does_not_go_on(
    flags: tuple[str, ...], trainer: Trainer, whole: Run
) -> None:
    """It would train without positions and say nothing."""
    name = f"without {flags[-1]}"
    run = trainer.run(name, *flags, *DROPOUT, "--load", str(whole.folder), hook=WITHOUT, check=False)
    expected = "add_position_embedding value from checkpoint (False)" if flags == ROPE else (
        "--no-position-embedding is deprecated"
    )  # fmt: skip
    assert run.code and expected in run.log, run.log[-3000:]
    assert not run.folder.exists() or not list(run.folder.glob("iter_*"))


def test_legacy_format(trainer: Trainer) -> None:
    flags = (*FOPE, *DROPOUT, *TP2, "--ckpt-format", "torch", "--fope-learnable")
    run = trainer.run("legacy", *flags, nproc=2)
    resumed = trainer.run(
        "legacy, resumed", *flags, "--load", str(run.folder), "--ckpt-step", "2", "--fope-seed", "9", nproc=2
    )
    check_continues(resumed, run)
    for rank in ("mp_rank_00", "mp_rank_01"):
        models = [
            torch.load(folder / f"iter_000000{step}" / rank / "model_optim_rng.pt", weights_only=False)[
                "model"
            ]
            for folder, step in ((run.folder, 4), (resumed.folder, 4), (run.folder, 2))
        ]
        names = [name for name in models[0] if ".fope." in name]
        assert len(names) == 8  # sin and cos of four layers
        assert all(torch.equal(models[0][name], models[1][name]) for name in names)
        assert not any(torch.equal(models[0][name], models[2][name]) for name in names), "they learn"


def test_asynchronous_saving(trainer: Trainer, whole: Run) -> None:
    """Training goes on while a checkpoint is written; it must hold the numbers of its own iteration."""
    run = trainer.run("asynchronous", *FOPE, *DROPOUT, *ASYNC)
    assert "scheduled an async checkpoint save" in run.log
    assert run.curve() == whole.curve()
    resumed = trainer.run(
        "asynchronous, resumed", *FOPE, *DROPOUT, *ASYNC, "--load", str(run.folder), "--ckpt-step", "2"
    )
    check_continues(resumed, whole)
    for name in ("sin_coef", "cos_coef"):
        for step in (2, 4):
            assert torch.equal(run.coefficients(step)[name], fresh_coefficients(name))


KILLS = {
    "half of the data": ("data", ()),
    "before the latest iteration is named": ("tracker", ()),
    "asynchronous, half of the data": ("data", ASYNC),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_while_saving_loses_nothing_older(moment: str, trainer: Trainer, whole: Run) -> None:
    word, flags = KILLS[moment]
    flags = (*FOPE, *DROPOUT, *flags, "--save-interval", "1")
    folder = trainer.folder / moment / "checkpoints"
    killed = trainer.run(moment, *flags, hook=kill_hook(word, folder / "iter_0000003"), check=False)
    assert killed.code == -9, killed.log[-3000:]
    assert (folder / "iter_0000003" / "__0_0.distcp").exists()
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    again = trainer.run(moment, *flags, "--load", str(folder))
    # While a checkpoint is written asynchronously, training may come as far as the next one.
    assert "> FoPE: iter_0000003" in again.log, again.log[-3000:]
    assert again.says(f"in {folder} never became the latest checkpoint: a save did not finish; loading iter")
    assert f"loading distributed checkpoint from {folder} at iteration 2" in again.log
    check_continues(again, whole, 1, 2, 3, 4)
    for name, value in whole.coefficients().items():
        assert torch.equal(again.coefficients(3)[name], value)


def kill_hook(moment: str, folder: Path) -> str:
    """Python for :meth:`forks.Launcher.run`: this process and those that it starts from nothing."""
    return f"""
import os
os.environ["KILL_WHILE_SAVING"] = {f"{moment} {folder}"!r}
os.environ["PYTHONPATH"] = {str(KILL)!r} + os.pathsep + os.environ["PYTHONPATH"]
exec(open({str(KILL / "sitecustomize.py")!r}).read())
"""
