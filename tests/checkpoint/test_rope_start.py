"""``--fope-start-from-rope``: a RoPE checkpoint continued with FoPE."""

from __future__ import annotations

import pytest
import torch
from test_saving import fresh_coefficients
from trainer import DROPOUT, FOPE, TP2, Run, Trainer

pytestmark = pytest.mark.launch

ROPE = ("--position-embedding-type", "rope")
START = "--fope-start-from-rope"
IDENTITY = ("--fope-init", "eye", "--no-fope-clip", "--no-fope-drop-clipped")
"""Coefficients with which FoPE is RoPE."""


@pytest.fixture(scope="module")
def rope(trainer: Trainer) -> Run:
    return trainer.base(*ROPE)


def test_refused_without_the_flag(trainer: Trainer, rope: Run) -> None:
    error = trainer.run("refused", *FOPE, "--load", str(rope.folder), check=False).error
    assert "--position-embedding-type is 'fope'" in error and "'rope'" in error and START in error


@pytest.mark.parametrize("layout", ["one rank", "TP2 SP", "use checkpoint arguments", "log_all"])
def test_everything_else_comes_from_the_checkpoint(layout: str, trainer: Trainer, rope: Run) -> None:
    """Weights, optimizer, iteration: where FoPE is RoPE, the losses are those that RoPE went on to have."""
    more = {
        "TP2 SP": TP2,
        "use checkpoint arguments": ("--use-checkpoint-args",),
        "log_all": ("--dist-ckpt-strictness", "log_all"),
    }
    run = trainer.run(
        f"identity, {layout}", *FOPE, *IDENTITY, START, "--load", str(rope.folder), "--ckpt-step", "2",
        *more.get(layout, ()), nproc=2 if layout == "TP2 SP" else 1, save=False,
    )  # fmt: skip
    assert run.says(f"the coefficients are fresh (seed 1234): {rope.folder} is a RoPE model")
    assert "load_return" not in run.log, "Megatron met names that it did not expect"
    expected, curve = rope.curve(), run.curve()
    assert list(curve) == [3, 4]
    assert [curve[3], curve[4]] == pytest.approx([expected[3], expected[4]], abs=2e-6)


def test_the_new_checkpoint_is_an_ordinary_one(trainer: Trainer, rope: Run) -> None:
    """Fresh coefficients; resumed with the flag, as a restarted job does, and without."""
    first = trainer.run(
        "start", *FOPE, *DROPOUT, START, "--fope-seed", "5", "--load", str(rope.folder), "--ckpt-step", "2"
    )
    assert first.says("the coefficients are fresh (seed 5)")
    assert first.curve()[3] != pytest.approx(rope.curve()[3], abs=1e-4), "another model"
    # Megatron compares the weight decay's schedule, too, which depends on the number of iterations.
    from_file = ("--load", str(first.folder), "--train-iters", "6", "--override-opt_param-scheduler")
    with_flag = trainer.run("start, with the flag", *FOPE, *DROPOUT, START, *from_file, save=False)
    without = trainer.run("start, without the flag", *FOPE, *DROPOUT, *from_file)
    assert with_flag.says(f"{START} has no effect: {first.folder} holds coefficients")
    assert list(without.curve()) == [5, 6] and without.curve() == with_flag.curve()
    for name, value in first.coefficients().items():
        assert not torch.equal(value, fresh_coefficients(name)), "another seed than the default"
        assert torch.equal(value, without.coefficients(6)[name])


def test_learnable_coefficients_have_no_optimizer_state(trainer: Trainer, rope: Run) -> None:
    flags = (*FOPE, START, "--fope-learnable", "--load", str(rope.folder))
    error = trainer.run("learnable, refused", *flags, check=False).error
    assert error.startswith("--fope-learnable is given") and "--no-load-optim or --finetune" in error


def test_one_command_line_for_every_restart(trainer: Trainer, rope: Run) -> None:
    """``--pretrained-checkpoint`` for the first start, ``--load`` for the others; coefficients that learn."""
    folder = trainer.folder / "restarts" / "checkpoints"
    flags = (
        *FOPE, START, "--fope-learnable", "--use-checkpoint-args",
        "--pretrained-checkpoint", str(rope.folder), "--load", str(folder),
    )  # fmt: skip
    first = trainer.run("restarts", *flags, "--exit-interval", "2")
    assert first.says(f"the coefficients are fresh (seed 1234): {rope.folder} is a RoPE model")
    again = trainer.run("restarts", *flags)
    assert again.says(f"{START} has no effect") and again.folder == folder
    assert list(again.curve()) == [1, 2, 3, 4]
    start, end = first.coefficients(2), again.coefficients(4)
    assert not any(torch.equal(value, start[name]) for name, value in end.items()), "they learn"


def test_legacy_format(trainer: Trainer) -> None:
    legacy = ("--ckpt-format", "torch")
    rope = trainer.run("legacy rope", *ROPE, *TP2, *legacy, nproc=2)
    run = trainer.run(
        "legacy start", *FOPE, *IDENTITY, *TP2, *legacy, START, "--load", str(rope.folder),
        "--ckpt-step", "2", nproc=2, save=False,
    )  # fmt: skip
    assert run.says("the coefficients are fresh (seed 1234)") and "load_return" not in run.log
    expected, curve = rope.curve(), run.curve()
    assert [curve[3], curve[4]] == pytest.approx([expected[3], expected[4]], abs=2e-6)


def test_nothing_to_start_from(trainer: Trainer) -> None:
    error = trainer.run("nothing", *FOPE, START, "--load", "/nowhere", check=False).error
    assert error == f"{START} is given, but there is no checkpoint in /nowhere"


def test_flag_without_fope(trainer: Trainer, rope: Run) -> None:
    error = trainer.run("rope again", *ROPE, START, "--load", str(rope.folder), check=False).error
    assert START in error and "--position-embedding-type is 'rope'" in error
