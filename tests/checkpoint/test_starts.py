"""The function-preserving start and the start with the clip alone, in real runs."""

from __future__ import annotations

import argparse

import pytest
import torch
from trainer import DROPOUT, FOPE, SHARP, TP2, Run, Trainer

from megatron_fope.arguments.flags import check_before_megatron
from megatron_fope.common.errors import UserError

ROPE = ("--position-embedding-type", "rope", *SHARP)
START = "--fope-start-from-rope"
PRESERVING = (START, "function-preserving", "--fope-anneal-iters", "3")
GO_ON = (*FOPE, *SHARP, "--train-iters", "6", "--override-opt_param-scheduler")


@pytest.fixture(scope="module")
def rope(trainer: Trainer) -> Run:
    return trainer.base(*ROPE)


def start(
    trainer: Trainer,
    rope: Run,
    name: str,
    *flags: str,
    nproc: int = 1,
    save: bool = False,
    check: bool = True,
) -> Run:
    return trainer.run(
        name, *GO_ON, "--load", str(rope.folder), "--ckpt-step", "2", *flags,
        nproc=nproc, save=save, check=check,
    )  # fmt: skip


@pytest.fixture(scope="module")
def annealed(trainer: Trainer, rope: Run) -> Run:
    return start(trainer, rope, "annealed", *PRESERVING, *DROPOUT, "--save-interval", "1", save=True)


@pytest.mark.launch
@pytest.mark.parametrize("layout", ["one rank", "TP2 SP"])
def test_the_first_loss_is_the_rope_models(layout: str, trainer: Trainer, rope: Run) -> None:
    """Also the second, which has the first gradient in it; FoPE at once is measurably something else."""
    nproc, flags = (2, TP2) if layout == "TP2 SP" else (1, ())
    expected = rope.curve()
    slow = (START, "function-preserving", "--fope-anneal-iters", "1000000")
    preserved = start(trainer, rope, f"preserved, {layout}", *slow, *flags, nproc=nproc).curve()
    at_once = start(trainer, rope, f"at once, {layout}", START, *flags, nproc=nproc).curve()
    assert abs(preserved[3] - expected[3]) <= 2e-6
    assert abs(preserved[4] - expected[4]) <= 2e-5
    assert abs(at_once[3] - expected[3]) > 1e-3


@pytest.mark.launch
def test_the_weight_is_shown(annealed: Run) -> None:
    assert annealed.says("FoPE's weight against RoPE is 0, and 1 in 3 iterations from iteration 2")
    assert annealed.curve("fope-weight") == pytest.approx({3: 0, 4: 1 / 3, 5: 2 / 3})
    assert annealed.says("iteration 4 had FoPE's weight 0.333333 against RoPE")
    assert annealed.says("iteration 5 was the last with RoPE")


@pytest.mark.launch
def test_resuming_in_the_middle_is_exact(trainer: Trainer, annealed: Run) -> None:
    flags = (*GO_ON, *DROPOUT, "--load", str(annealed.folder), "--ckpt-step")
    expected = annealed.curve()
    resumed = trainer.run("annealed, resumed", *flags, "4", *PRESERVING, save=False)
    assert resumed.says("FoPE's weight against RoPE is 0.666667, and 1 in 3 iterations from iteration 2")
    assert START not in resumed.log.split("setting number of microbatches")[-1]
    assert resumed.curve() == {5: expected[5], 6: expected[6]}
    from_checkpoint = trainer.run(
        "annealed, from its arguments", *flags, "4", "--use-checkpoint-args", save=False
    )
    assert from_checkpoint.curve() == resumed.curve()
    for given, message in {
        (): "--fope-anneal-iters is 0, but the checkpoint in",
        (*PRESERVING[:-1], "4"): "--fope-anneal-iters is 4, but the checkpoint in",
    }.items():
        error = trainer.run("refused", *flags, "4", *given, check=False).error
        assert error.startswith(message) and "give --fope-start-from-rope function-preserving" in error


@pytest.mark.launch
def test_the_end_is_the_plain_model(trainer: Trainer, annealed: Run) -> None:
    """Losses and coefficients are those of a run that knows nothing of a start."""
    flags = (*GO_ON, *DROPOUT, "--load", str(annealed.folder), "--ckpt-step", "5")
    expected = annealed.curve()
    for name, more in (("annealed, plain", ()), ("annealed, same flags", PRESERVING)):
        plain = trainer.run(name, *flags, *more, save=False)
        assert plain.curve() == {6: expected[6]}
        assert "FoPE's weight" not in plain.log
    at_once = trainer.run("fresh", *FOPE, "--train-iters", "1", "--save-interval", "1")
    for name, value in annealed.coefficients(6).items():
        assert torch.equal(value, at_once.coefficients(1)[name])
    new = trainer.run("annealed, finetune", *flags, "--finetune", *PRESERVING, save=False)
    assert "FoPE's weight" not in new.log, "counting iterations anew is no new start"


SCHEDULED = (*PRESERVING, "--fope-anneal-order", "slowest-first", "--fope-anneal-clip", "0:2",
             "--fope-anneal-series", "1:3", "--fope-square", "--fope-pad-value", "0,1")  # fmt: skip


@pytest.mark.launch
def test_a_schedule(trainer: Trainer, rope: Run) -> None:
    """Its weights are shown, and a run that stops goes on with the same ones or not at all."""
    whole = start(trainer, rope, "scheduled", *SCHEDULED, "--save-interval", "1", save=True)
    expected = whole.curve()
    assert expected[3] == pytest.approx(rope.curve()[3], abs=2e-6)
    assert whole.says(
        "a schedule of their own: --fope-anneal-iters 3 --fope-anneal-order slowest-first --fope"
    )
    assert whole.says(
        "iteration 4 had FoPE's weight 0.333333 against RoPE (clip 0.5, padding 0.333333, series"
    )
    assert whole.curve("fope-clip") == pytest.approx({3: 0, 4: 0.5, 5: 1})
    assert (
        whole.curve("fope-padding") == whole.curve("fope-weight") == pytest.approx({3: 0, 4: 1 / 3, 5: 2 / 3})
    )
    assert whole.curve("fope-series") == pytest.approx({3: 0, 4: 0, 5: 0.5})
    flags = (*GO_ON, "--load", str(whole.folder), "--ckpt-step")
    assert trainer.run("scheduled, resumed", *flags, "4", *SCHEDULED, save=False).curve() == {
        5: expected[5],
        6: expected[6],
    }
    from_checkpoint = trainer.run("scheduled, from its arguments", *flags, "4", "--use-checkpoint-args")
    assert from_checkpoint.curve() == {5: expected[5], 6: expected[6]}
    other = trainer.run("other", *flags, "4", *SCHEDULED, "--fope-anneal-clip", "0:3", check=False).error
    assert other.startswith("--fope-anneal-clip is '0:3', but the checkpoint in") and other.endswith(
        "was trained with '0:2' and is in the middle; give --fope-start-from-rope function-preserving "
        "--fope-anneal-iters 3 --fope-anneal-order slowest-first --fope-anneal-clip 0:2 "
        "--fope-anneal-series 1:3"
    )
    plain = trainer.run("scheduled, plain", *flags, "5", "--fope-square", "--fope-pad-value", "0,1")
    assert plain.curve() == {6: expected[6]}


@pytest.mark.launch
def test_counting_anew_in_the_middle(trainer: Trainer, annealed: Run) -> None:
    run = trainer.run(
        "anew",
        *GO_ON,
        "--load",
        str(annealed.folder),
        "--ckpt-step",
        "3",
        "--finetune",
        *PRESERVING,
        save=False,
    )
    assert run.curve("fope-weight") == pytest.approx({1: 1 / 3, 2: 2 / 3})


@pytest.mark.launch
def test_clip_only(trainer: Trainer, rope: Run) -> None:
    """Every kept frequency stays in its channels, and the others turn nothing, as if they were zero."""
    alone = start(trainer, rope, "clip only", START, "clip-only", save=True)
    zeros = start(trainer, rope, "zeros", START, "--fope-init", "eye", "--no-fope-drop-clipped")
    assert alone.curve() == pytest.approx(zeros.curve(), abs=1e-5)
    assert abs(alone.curve()[3] - rope.curve()[3]) > 1e-4
    assert alone.says("sin,cos = 0,1") and torch.equal(
        alone.coefficients(6)["sin_coef"], torch.eye(3).expand(4, 2, 3, 3)
    )


@pytest.mark.launch
def test_another_base(trainer: Trainer, rope: Run) -> None:
    base = ("--rotary-base", "50000")
    error = start(trainer, rope, "base, refused", START, *base, check=False).error
    assert error.startswith("--rotary-base is 50000, but the checkpoint in") and "10000" in error
    assert error.endswith("--fope-change-rotary-base accepts the change")
    change = (*base, "--fope-change-rotary-base")
    changed = start(trainer, rope, "base, changed", START, *change)
    assert changed.says("is a RoPE model with --rotary-base 10000")
    error = start(trainer, rope, "base, preserved", *PRESERVING, *change, check=False).error
    assert error.startswith("--rotary-base is 50000") and "function-preserving keeps it" in error


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            {"start_from_rope": "slowly"},
            "--fope-start-from-rope is 'slowly'; allowed: immediate, function-pre",
        ),
        ({"start_from_rope": "function-preserving"}, "--fope-anneal-iters is 0; --fope-start-from-rope func"),
        (
            {"start_from_rope": "function-preserving", "anneal_iters": -2},
            "--fope-anneal-iters is -2; --fope-start-from-rope function-preserving needs at least 1",
        ),
        (
            {"anneal_iters": 9},
            "--fope-anneal-iters is 9; requires --fope-start-from-rope function-preserv",
        ),
        (
            {"start_from_rope": "immediate", "anneal_iters": 9},
            "--fope-anneal-iters is 9; requires --fope-start",
        ),
        (
            {"start_from_rope": "clip-only", "anneal_order": "slowest-first"},
            "--fope-anneal-order is slowest-first; requires --fope-start-from-rope function-preserving",
        ),
        (
            {"start_from_rope": "clip-only", "init": "eye"},
            "--fope-init is 'eye'; --fope-start-from-rope clip-",
        ),
        (
            {"start_from_rope": "clip-only", "clip": False},
            "--fope-clip is False; --fope-start-from-rope clip-",
        ),
    ],
)
def test_contradictions(flags: dict, message: str) -> None:
    values = {f"fope_{name}": value for name, value in flags.items()}
    with pytest.raises(UserError) as error:
        check_before_megatron(argparse.Namespace(position_embedding_type="fope", **values))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
