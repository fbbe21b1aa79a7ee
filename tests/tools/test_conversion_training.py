"""Converted checkpoints in real training runs, and beside checkpoints that Megatron itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import FOPE, TP2, Run, Trainer

from megatron_fope.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.growth import grow_coefficients
from megatron_fope.tools.conversion.comparison import diff
from megatron_fope.tools.conversion.converter import Conversion, convert

pytestmark = pytest.mark.launch

ROPE = ("--position-embedding-type", "rope")
PP2 = ("--pipeline-model-parallel-size", "2")
EXPERTS = (
    "--num-experts", "4", "--moe-layer-freq", "[0,1,1,1]", "--moe-router-topk", "2",
    "--moe-router-load-balancing-type", "none", "--disable-bias-linear",
)  # fmt: skip


@pytest.fixture(scope="module")
def rope(trainer: Trainer) -> Run:
    return trainer.base(*ROPE)


@pytest.fixture(scope="module")
def converted(rope: Run, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The RoPE run's iteration 2 as a FoPE checkpoint."""
    return convert(rope.folder, tmp_path_factory.mktemp("converted") / "fope", iteration=2, seed=5)


def resume(trainer: Trainer, name: str, folder: Path, *flags: str, nproc: int = 1, save: bool = False) -> Run:
    return trainer.run(name, "--load", str(folder), *flags, nproc=nproc, save=save)


def test_trains_as_from_the_flag(trainer: Trainer, rope: Run, converted: Conversion) -> None:
    """Every bit: coefficients, weights, and with the second step the optimizer's states."""
    flagged = resume(
        trainer, "flag", rope.folder, *FOPE, *TP2, "--fope-start-from-rope", "--fope-seed", "5",
        "--ckpt-step", "2", nproc=2, save=True,
    )  # fmt: skip
    two_ranks = resume(trainer, "converted TP2", converted.target, *FOPE, *TP2, nproc=2, save=True)
    assert list(two_ranks.curve()) == [3, 4]
    assert two_ranks.curve() == flagged.curve()
    assert two_ranks.curve("grad-norm") == flagged.curve("grad-norm")
    for name, value in flagged.coefficients().items():
        assert torch.equal(two_ranks.coefficients()[name], value)
    stages = resume(trainer, "converted PP2", converted.target, "--use-checkpoint-args", *PP2, nproc=2)
    assert stages.curve() == pytest.approx(flagged.curve(), abs=2e-6)
    assert abs(stages.curve()[3] - rope.curve()[3]) > 3e-6, "another model than the RoPE one"


def test_and_back(trainer: Trainer, rope: Run, converted: Conversion, tmp_path: Path) -> None:
    """FoPE to RoPE: the run goes on as the RoPE run did."""
    back = convert(converted.target, tmp_path / "back", position_embedding_type="rope")
    assert not open_checkpoint(back.target, name="back").coefficients
    run = resume(trainer, "back", back.target, *ROPE)
    assert run.curve() == {step: rope.curve()[step] for step in (3, 4)}


def test_longer(trainer: Trainer, converted: Conversion, tmp_path: Path) -> None:
    """FoPE to a longer FoPE: another run under another layout reads what growth made."""
    longer = convert(converted.target, tmp_path / "longer", train_length=256, rotary_base=20000.0)
    assert longer.train_length == (64, 256)
    flags = (*FOPE, *TP2, "--fope-train-length", "256", "--rotary-base", "20000")
    run = resume(trainer, "longer", longer.target, *flags, nproc=2, save=True)
    old = FoPEConfig.from_profile(train_length=64, seed=5)
    new = FoPEConfig.from_profile(train_length=256, seed=5, rotary_base=20000.0)
    before, after = (Geometry(config, 16, 2) for config in (old, new))
    for layer in range(1, 5):
        grown = grow_coefficients(before.make_coefficients(layer=layer), before, after, layer=layer)
        for name, value in run.coefficients().items():
            assert torch.equal(value[layer - 1], grown[name])


def test_function_preserving_start(trainer: Trainer, rope: Run, tmp_path: Path) -> None:
    """In the middle of annealing after two iterations, from the flag and from a converted checkpoint."""
    flags = (*FOPE, "--fope-start-from-rope", "function-preserving", "--fope-anneal-iters", "3")
    flagged = resume(trainer, "flag, preserving", rope.folder, *flags, "--ckpt-step", "2")
    made = convert(rope.folder, tmp_path / "fope", iteration=2, start="function-preserving", anneal_iters=3)
    run = resume(trainer, "converted, preserving", made.target, "--use-checkpoint-args")
    assert run.says("iteration 4 had FoPE's weight 0.333333 against RoPE")
    assert run.curve() == flagged.curve()
    assert run.curve()[3] == pytest.approx(rope.curve()[3], abs=2e-6)


MODELS: dict[str, tuple[str, ...]] = {
    "prediction layers": ("--mtp-num-layers", "2"),
    "layers of two kinds": EXPERTS,
    "hybrid": ("--hybrid-layer-pattern", "*-*-", "--qk-layernorm"),
}


@pytest.mark.parametrize("model", MODELS)
def test_as_megatron_writes_it(model: str, trainer: Trainer, tmp_path: Path) -> None:
    """Names, shapes, pieces and numbers of the coefficients are those of a FoPE run's own checkpoint."""
    flags = (*MODELS[model], "--train-iters", "1", "--save-interval", "1")
    rope = trainer.run(f"{model}, rope", *ROPE, *flags)
    fope = trainer.run(f"{model}, fope", *FOPE, *flags)
    made = open_checkpoint(convert(rope.folder, tmp_path / "fope").target, name="made")
    real = open_checkpoint(fope.folder, name="real")
    assert made.metadata.state_dict_metadata.keys() == real.metadata.state_dict_metadata.keys()
    expected = {"prediction layers": 6, "layers of two kinds": 8, "hybrid": 4}
    assert len(made.coefficients) == expected[model]
    for name in made.coefficients:
        assert described(made, name) == described(real, name)
        assert torch.equal(made.read_tensor(name), real.read_tensor(name))
    comparison = diff(made.folder, fope.folder)
    assert not comparison.only_first + comparison.only_second + list(comparison.tensors)
    assert not comparison.coefficients


def described(checkpoint: Checkpoint, name: str) -> Any:
    """A tensor's entry in the table of contents, without where its bytes are."""
    entry = checkpoint.tensors[name]
    pieces = {index for index in checkpoint.metadata.storage_data if index.fqn == name}
    return entry.size, entry.properties.dtype, entry.chunks, pieces
