"""``--fope-fold-padding``: at load time and in ``convert``, the losses are those of padding 0,1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer import FOPE, SHARP, TP2, Run, Trainer

from megatron_fope.checkpoint.reader import open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.tools import cli
from megatron_fope.tools.conversion.converter import convert

pytestmark = pytest.mark.launch

UNFOLDED, FOLD = ("--fope-pad-value", "0,1"), "--fope-fold-padding"
ONE = ("--train-iters", "1")


@pytest.fixture(scope="module")
def unfolded(trainer: Trainer) -> Run:
    return trainer.run("unfolded", *FOPE, *SHARP, *UNFOLDED)


@pytest.fixture(scope="module")
def first_loss(trainer: Trainer, unfolded: Run) -> float:
    """Of the model as it is, continued with a fresh optimizer."""
    load = ("--load", str(unfolded.folder), "--finetune")
    return trainer.run("unfolded, continued", *FOPE, *SHARP, *UNFOLDED, *load, *ONE, save=False).curve()[1]


@pytest.mark.parametrize(
    ("layout", "nproc", "flags"),
    [
        ("one rank", 1, ("--use-checkpoint-args",)),
        ("TP2 SP", 2, TP2),
        (
            "TP4, two KV heads",
            4,
            # Four ranks and the same padded vocabulary.
            ("--tensor-model-parallel-size", "4", "--make-vocab-size-divisible-by", "128"),
        ),
        ("PP2, bf16", 2, ("--pipeline-model-parallel-size", "2", "--bf16", "--use-distributed-optimizer")),
    ],
)
def test_at_load_time(
    layout: str, nproc: int, flags: tuple[str, ...], trainer: Trainer, unfolded: Run, first_loss: float
) -> None:
    load = ("--load", str(unfolded.folder), "--finetune", FOLD, "--save-interval", "1", *ONE)
    run = trainer.run(
        f"folded, {layout}", *FOPE, *SHARP, *load, *flags, nproc=nproc, save=layout == "one rank"
    )
    assert run.says("the padding is folded: query and key weights of 5 of 8 channel pairs are divided by the")
    assert run.curve()[1] == pytest.approx(first_loss, abs=3e-2 if "bf16" in layout else 2e-6)
    if layout != "one rank":
        return
    again = ("--load", str(run.folder), "--train-iters", "2", "--override-opt_param-scheduler")
    folded = trainer.run("folded, again", *FOPE, *SHARP, *again, FOLD, save=False)
    assert "is folded" not in folded.log
    without = trainer.run("folded, no flag", *FOPE, *SHARP, *again, save=False)
    assert without.curve() == folded.curve()


def test_refused_at_load_time(trainer: Trainer, unfolded: Run) -> None:
    load = ("--load", str(unfolded.folder), FOLD)
    error = trainer.run("folded, optimizer", *FOPE, *SHARP, *load, save=False, check=False).error
    assert error.startswith(f"{FOLD} is given, but the checkpoint in") and "--no-load-optim or --fin" in error
    error = trainer.run("folded, 0,1", *FOPE, *SHARP, *load, *UNFOLDED, save=False, check=False).error
    assert error == "--fope-pad-value is '0,1'; allowed: 1,1 with --fope-fold-padding"


def test_convert(
    trainer: Trainer, unfolded: Run, first_loss: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the projections, the coefficients and the arguments are written; the optimizer is left out."""
    assert cli.main(["convert", str(unfolded.folder), str(tmp_path / "folded"), FOLD]) == 0
    said = capsys.readouterr().out
    assert "weights decoder.layers.self_attention.linear_qkv.weight [4, 128, 64]" in said
    assert "the padding is folded into these weights" in said and "--no-load-optim or --finetune" in said
    old, new = (open_checkpoint(folder, name="X") for folder in (unfolded.folder, tmp_path / "folded"))
    assert not new.has_optimizer and new.args.no_save_optim and new.args.fope_pad_value == "1,1"
    for name in new.tensors:
        same = torch.equal(old.read_tensor(name), new.read_tensor(name))
        assert same == (not name.endswith(("linear_qkv.weight", "linear_qkv.bias"))), name
    load = ("--load", str(tmp_path / "folded"), "--finetune", *ONE)
    run = trainer.run("converted, folded", *FOPE, *SHARP, *load, save=False)
    assert run.curve()[1] == pytest.approx(first_loss, abs=2e-6)
    with pytest.raises(
        UserError, match=r"--fope-fold-padding is given, but SOURCE .* has --fope-pad-value 1,1"
    ):
        convert(tmp_path / "folded", tmp_path / "twice", fold_padding=True)
    assert not (tmp_path / "twice").exists()


def test_from_rope(trainer: Trainer, tmp_path: Path) -> None:
    """A gradual start, with the flag and from a converted checkpoint, and the clip alone."""
    rope = trainer.base("--position-embedding-type", "rope", *SHARP)
    load = ("--load", str(rope.folder), "--finetune")
    go_on = ("--position-embedding-type", "rope", *SHARP, *load, *ONE)
    plain = trainer.run("rope, continued", *go_on, save=False).curve()[1]
    gradual = ("--fope-start-from-rope", "function-preserving", "--fope-anneal-iters", "3", FOLD)
    started = trainer.run("rope, folded", *FOPE, *SHARP, *load, *gradual, *ONE, save=False)
    assert started.curve()[1] == pytest.approx(plain, abs=2e-6) and started.says("the padding is folded")
    convert(rope.folder, tmp_path / "fope", start="function-preserving", anneal_iters=3, fold_padding=True)
    converted = ("--load", str(tmp_path / "fope"), "--finetune", *gradual, *ONE)
    run = trainer.run("rope, converted", *FOPE, *SHARP, *converted, save=False)
    assert run.curve()[1] == pytest.approx(plain, abs=2e-6)
    clip = ("--fope-start-from-rope", "clip-only")
    alone = trainer.run("rope, clip", *FOPE, *SHARP, *load, *clip, *ONE, save=False).curve()[1]
    folded = trainer.run("rope, clip folded", *FOPE, *SHARP, *load, *clip, FOLD, *ONE, save=False)
    assert folded.curve()[1] == pytest.approx(alone, abs=2e-6)
    assert folded.says("sin,cos = 1,1")
