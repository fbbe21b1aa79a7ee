"""The flag in Megatron's own training loop, on real data, from the first log line to the evaluation."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from launch import ROOT
from trainer import FOPE, TP2, Run, Trainer

from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry

pytestmark = pytest.mark.launch

HEAD_DIM, KV_HEADS, LAYERS, LENGTH = 16, 2, 4, 64


BUILT_IN = ("-m", "megatron_fope", "--cpu", "pretrain")


@pytest.fixture(scope="module")
def one_rank(trainer: Trainer) -> Run:
    return trainer.run("one_rank", *FOPE, entry=BUILT_IN)


@pytest.fixture(scope="module")
def two_ranks(trainer: Trainer) -> Run:
    return trainer.run("two_ranks", *FOPE, *TP2, nproc=2)


def stored(run: Run, name: str, iteration: int = 4) -> torch.Tensor:
    """A coefficient tensor as the checkpoint holds it: ``[layers, KV heads, D_in, D_out]``."""
    from torch.distributed import checkpoint

    folder = run.folder / f"iter_{iteration:07d}"
    metadata = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    (key,) = [key for key in metadata if key.endswith(f"fope.{name}") and not key.startswith("optimizer")]
    entry = metadata[key]
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state[key]


def test_start_up_says_what_runs(one_rank: Run) -> None:
    settings, implementation, layers = (
        line for line in one_rank.log.splitlines() if line.startswith("> FoPE: ")
    )
    for part in ("profile paper", "train length 64", "3 frequencies", "5 clipped", "gain 0.3", "frozen"):
        assert part in settings
    assert "PyTorch" in implementation
    assert layers == "> FoPE: 4 attention layers: decoder 1-4"
    assert re.search(r"^  position_embedding_type \.+ fope$", one_rank.log, re.MULTILINE)


def test_settings_reach_tensorboard(one_rank: Run) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    events = accumulator.EventAccumulator(str(one_rank.events))
    events.Reload()
    texts = set(events.Tags()["tensors"])
    for name in ("fope_profile", "fope_kept_frequencies", "fope_clipped_frequencies", "fope_backend"):
        assert f"{name}/text_summary" in texts
    assert "lm loss" in events.Tags()["scalars"]


def test_tensor_parallel_training_agrees(one_rank: Run, two_ranks: Run) -> None:
    assert len(one_rank.losses) == 4
    assert two_ranks.losses == pytest.approx(one_rank.losses, abs=1e-5)
    assert two_ranks.grad_norms == pytest.approx(one_rank.grad_norms, abs=2e-3)  # printed with 3 digits


def test_checkpoint_holds_the_coefficients_exactly(one_rank: Run, two_ranks: Run) -> None:
    config = FoPEConfig.from_profile(train_length=LENGTH)
    geometry = Geometry(config, HEAD_DIM, KV_HEADS)
    for name in ("sin_coef", "cos_coef"):
        layers = [geometry.make_coefficients(layer=i + 1)[name] for i in range(LAYERS)]
        for run in (one_rank, two_ranks):
            assert torch.equal(stored(run, name), torch.stack(layers))


def test_resuming_continues_exactly(trainer: Trainer, one_rank: Run) -> None:
    """From iteration 2, with other fresh coefficients: those of the checkpoint must win."""
    run = trainer.run(
        "resumed", *FOPE, "--load", str(one_rank.folder), "--ckpt-step", "2", "--fope-seed", "9"
    )
    third, fourth = one_rank.losses[2:]
    # See launch.losses: the second number after a start is the mean of two.
    assert run.losses[0] == third
    assert 2 * run.losses[1] - run.losses[0] == pytest.approx(fourth, abs=3e-6)
    assert torch.equal(stored(run, "sin_coef"), stored(one_rank, "sin_coef"))


LAYOUTS = {
    "tensor": TP2,
    "pipeline": ("--pipeline-model-parallel-size", "2"),
    "context": ("--context-parallel-size", "2"),
    "data, distributed optimizer": ("--use-distributed-optimizer", "--no-load-optim", "--finetune"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_continue_alike(layout: str, trainer: Trainer, one_rank: Run) -> None:
    """One rank's checkpoint on two ranks: the next loss is the one that one rank had."""
    start = ("--load", str(one_rank.folder), "--ckpt-step", "2", "--exit-interval", "3")
    if "--finetune" in LAYOUTS[layout]:  # starts at the first batch, whose loss one rank never saw again
        start = (*start, "--train-iters", "2", "--lr", "0", "--exit-interval", "1")
        reference = trainer.run(
            "first batch again", *FOPE, *start, "--finetune", "--no-load-optim", save=False
        ).losses[0]
    else:
        reference = one_rank.losses[2]
    run = trainer.run(layout, *FOPE, *start, *LAYOUTS[layout], nproc=2, save=False)
    assert run.losses[0] == pytest.approx(reference, abs=1e-5)


def test_use_checkpoint_args_restores_fope(trainer: Trainer, one_rank: Run) -> None:
    """No FoPE flag at all, and another layout."""
    run = trainer.run(
        "from_args", "--load", str(one_rank.folder), "--ckpt-step", "2", "--use-checkpoint-args", *TP2,
        "--finetune", "--train-iters", "1", nproc=2, save=False,
    )  # fmt: skip
    assert "> FoPE: profile paper, train length 64" in run.log
    assert run.losses[0] == pytest.approx(one_rank.losses[2], abs=0.5)  # the same model, not a fresh one
    assert run.losses[0] < one_rank.losses[0] - 0.05


def test_other_settings_than_the_checkpoints_are_refused(trainer: Trainer, one_rank: Run) -> None:
    run = trainer.run(
        "refused", *FOPE, "--fope-pad-value", "0,1", "--load", str(one_rank.folder), check=False
    )  # fmt: skip
    (line,) = [line for line in run.log.splitlines() if line.startswith("megatron-fope: error: ")]
    assert "--fope-pad-value is '0,1'" in line and "'1,1'" in line and not run.losses
    assert not (run.folder / "latest_checkpointed_iteration.txt").exists()


@pytest.fixture(scope="module")
def learnable(trainer: Trainer) -> list[Run]:
    flags = (*FOPE, "--fope-learnable", "--lr", "1e-2")
    return [trainer.run("learnable1", *flags), trainer.run("learnable2", *flags, *TP2, nproc=2)]


def test_learnable_coefficients_train_alike_under_tensor_parallelism(learnable: list[Run]) -> None:
    """Each rank owns one of two KV heads; the other head's gradient must arrive from the other rank."""
    single, parallel = learnable
    assert parallel.losses == pytest.approx(single.losses, abs=1e-5)
    assert parallel.grad_norms == pytest.approx(single.grad_norms, abs=2e-3)
    config = FoPEConfig.from_profile(train_length=LENGTH)
    start = Geometry(config, HEAD_DIM, KV_HEADS).make_coefficients(layer=1)["cos_coef"]
    moved = [(stored(run, "cos_coef")[0] - start).abs().amax(dim=(1, 2)) for run in learnable]
    assert all(m.min() > 1e-3 for m in moved), "the coefficients of every head must have moved"
    # Adam's first steps have the size of the learning rate whatever the gradient, so tiny gradients'
    # signs decide: compare where they are not tiny.
    torch.testing.assert_close(stored(parallel, "cos_coef"), stored(single, "cos_coef"), rtol=0, atol=2e-3)


def test_half_precision_keeps_coefficients_exact(trainer: Trainer) -> None:
    run = trainer.run("bf16", *FOPE, "--bf16", *TP2, nproc=2)
    assert run.losses[-1] < run.losses[0]
    coefficients = stored(run, "sin_coef")
    config = FoPEConfig.from_profile(train_length=LENGTH)
    expected = Geometry(config, HEAD_DIM, KV_HEADS).make_coefficients(layer=1)
    assert coefficients.dtype == torch.float32 and torch.equal(coefficients[0], expected["sin_coef"])


def test_one_line_in_the_users_own_script(trainer: Trainer, one_rank: Run) -> None:
    script = ROOT / "tests" / "scripts" / "own_training_script.py"
    run = trainer.run("own_script", *FOPE, "--train-iters", "1", save=False, entry=(str(script),))
    assert run.losses == one_rank.losses[:1]


@pytest.mark.skipif(
    "MEGATRON_LM" not in os.environ, reason="MEGATRON_LM does not name a Megatron-LM checkout"
)
def test_unmodified_megatron_lm_checkout(trainer: Trainer, one_rank: Run) -> None:
    """Its own ``pretrain_gpt.py``, on one rank and on two."""
    checkout = Path(os.environ["MEGATRON_LM"]).resolve()
    entry = ("-m", "megatron_fope", "--cpu", str(checkout / "pretrain_gpt.py"))
    single = trainer.run("checkout", *FOPE, entry=entry)
    parallel = trainer.run("checkout parallel", *FOPE, *TP2, nproc=2, entry=entry)
    for run in (single, parallel):
        assert f"{checkout}/megatron/core/" in run.log and "site-packages/megatron/" not in run.log
        assert "> FoPE: profile paper, train length 64" in run.log
    assert parallel.losses == pytest.approx(single.losses, abs=1e-5)
    # 0.16 and 0.17 draw other initial weights than the installed release.
    assert single.losses == pytest.approx(one_rank.losses, abs=0.1)


def test_perplexity_of_checkpoints(trainer: Trainer, one_rank: Run, two_ranks: Run) -> None:
    """The command, at lengths below and beyond the training's; layouts agree and numbers are sane."""
    from megatron_fope.tools.evaluation.perplexity_command import PerplexityOptions, evaluate_perplexity

    # One rank's model, saved again by two pipeline stages that changed nothing.
    stages = trainer.run(
        "two stages", *FOPE, *LAYOUTS["pipeline"], "--load", str(one_rank.folder), "--finetune",
        "--no-load-optim", "--lr", "0", "--train-iters", "1", nproc=2,
    )  # fmt: skip
    output, picture = trainer.folder / "report.json", trainer.folder / "report.png"
    options = PerplexityOptions(
        checkpoints={"one rank": one_rank.folder, "two ranks": two_ranks.folder, "two stages": stages.folder},
        data_path=trainer.data,
        lengths=[32, 64, 200],
        tokens=1000,
        tokens_per_batch=256,
        cpu=True,
        output=output,
        picture=picture,
    )
    report = evaluate_perplexity(options)
    assert json.loads(output.read_text()) == report and picture.stat().st_size > 10_000
    one, two, stages = report["checkpoints"].values()
    assert one["position_embedding_type"] == "fope" and one["train_length"] == LENGTH
    assert [row["length"] for row in one["results"]] == [32, 64, 200]
    assert [row["tokens"] for row in one["results"]] == [992, 960, 1000]
    for a, b, c in zip(one["results"], two["results"], stages["results"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["loss"] == pytest.approx(c["loss"], abs=1e-6)
    at_train_length = one["results"][1]["loss"]
    assert at_train_length == pytest.approx(one_rank.losses[-1], abs=0.5), "the model that was trained"
