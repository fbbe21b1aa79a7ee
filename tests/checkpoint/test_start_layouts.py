"""Starts from RoPE and growth in layouts besides tensor parallelism: the losses are one rank's."""

from __future__ import annotations

import pytest
from launch import LATENT
from trainer import FOPE, SHARP, Run, Trainer

from megatron_fope.tools.evaluation.perplexity_command import PerplexityOptions, evaluate_perplexity

GRADUAL = ("--fope-start-from-rope", "function-preserving", "--fope-anneal-iters", "2")
GROWN = ("--fope-train-length", "256", "--fope-grow")
WAYS = {"from rope": ("rope", GRADUAL), "grown": ("fope", GROWN)}
LAYOUTS = {
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "CP2": ("--context-parallel-size", "2"),
    "DP2, distributed optimizer": ("--use-distributed-optimizer",),
}


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> dict[str, Run]:
    """A model of each kind, trained on one rank."""
    return {kind: trainer.base("--position-embedding-type", kind, *SHARP) for kind in ("rope", "fope")}


def go_on(trainer: Trainer, base: Run, name: str, *flags: str, nproc: int = 1, save: bool = False) -> Run:
    """Continue with a fresh optimizer, four iterations."""
    load = ("--load", str(base.folder), "--finetune", "--exit-on-missing-checkpoint")
    return trainer.run(name, *FOPE, *SHARP, *load, *flags, nproc=nproc, save=save)


@pytest.mark.launch
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_rank(way: str, trainer: Trainer, trained: dict[str, Run]) -> None:
    kind, flags = WAYS[way]
    expected = go_on(trainer, trained[kind], f"{way}, one rank", *flags)
    assert len(expected.curve()) == 4
    without = go_on(trainer, trained["fope"], f"{way}, nothing", "--fope-train-length", "64")
    assert abs(without.curve()[3] - expected.curve()[3]) > 1e-3, "the way makes a difference"
    for layout, more in LAYOUTS.items():
        run = go_on(trainer, trained[kind], f"{way}, {layout}", *flags, *more, nproc=2)
        assert run.curve() == pytest.approx(expected.curve(), abs=2e-5), layout
        if way == "from rope":
            assert run.curve("fope-weight") == expected.curve("fope-weight") == {1: 0.0, 2: 0.5}


@pytest.mark.launch
def test_multi_latent_attention(trainer: Trainer) -> None:
    """The start preserves the function, also where the rotated channels stand apart; and it grows."""
    trainer = trainer.without("--group-query-attention")
    rope = trainer.run("latent rope", "--position-embedding-type", "rope", *SHARP, *LATENT)
    same = trainer.run(
        "latent rope, continued", "--position-embedding-type", "rope", *SHARP, *LATENT,
        "--load", str(rope.folder), "--finetune", save=False,
    )  # fmt: skip
    slow = (*GRADUAL[:-1], "1000000")
    preserved = go_on(trainer, rope, "latent, preserved", *LATENT, *slow)
    at_once = go_on(trainer, rope, "latent, at once", *LATENT, "--fope-start-from-rope", save=True)
    assert abs(preserved.curve()[1] - same.curve()[1]) <= 2e-6
    assert abs(preserved.curve()[2] - same.curve()[2]) <= 2e-5
    assert abs(at_once.curve()[1] - same.curve()[1]) > 1e-4
    grown = go_on(trainer, at_once, "latent, grown", *LATENT, *GROWN)
    assert grown.says("the coefficients grow (aligned) from train length 64 to 256")


@pytest.mark.launch
def test_evaluation_of_latent_attention(trainer: Trainer) -> None:
    """Evaluation finds the model's flags wherever Megatron's parser lists them, ``--rope-type`` for one."""
    trainer = trainer.without("--group-query-attention")
    run = trainer.run("latent", *FOPE, *SHARP, *LATENT)
    options = PerplexityOptions(
        checkpoints={"latent": run.folder},
        data_path=trainer.data,
        lengths=[64],
        tokens=1000,
        tokens_per_batch=256,
        cpu=True,
    )
    report = evaluate_perplexity(options)
    (row,) = report["checkpoints"]["latent"]["results"]
    assert row["loss"] == pytest.approx(run.curve()[4], abs=0.5)
