"""Checkpoints that cannot be loaded: one line that names the file, exit code 2, nothing lost."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_arguments import outcome, start
from trainer import FOPE, TP2, Run, Trainer

pytestmark = pytest.mark.launch

LATEST = "latest_checkpointed_iteration.txt"
COEFFICIENT = "decoder.layers.self_attention.fope.sin_coef"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Run:
    return trainer.run("undamaged", *FOPE)


@pytest.fixture(scope="module")
def legacy(trainer: Trainer) -> Run:
    return trainer.run("undamaged legacy", *FOPE, *TP2, "--ckpt-format", "torch", nproc=2)


def cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text) and None


def metadata(change: Callable[[dict], object]) -> Damage:
    """Change what the table of contents says about the tensors."""

    def damage(folder: Path) -> None:
        file = folder / "iter_0000004" / ".metadata"
        table = pickle.loads(file.read_bytes())
        change(table.state_dict_metadata)
        file.write_bytes(pickle.dumps(table))

    return damage


def without_coefficients(folder: Path) -> None:
    """A legacy file from which the coefficients of one layer are gone."""
    file = folder / "iter_0000004" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    del state["model"]["decoder.layers.2.self_attention.fope.cos_coef"]
    torch.save(state, file)


DATA, TABLE = "iter_0000004/__0_0.distcp", "iter_0000004/.metadata"
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "data file cut": (cut(DATA), f"{DATA} is cut off: ", "--ckpt-step: 2"),
    "data file gone": (remove(DATA), f"{DATA} is missing; restore it", "--ckpt-step: 2"),
    "table of contents cut": (cut(TABLE), f"{TABLE} cannot be read", "--ckpt-step: 2"),
    "table of contents gone": (remove(TABLE), f"{TABLE} is missing: a save that did not finish", "2"),
    "format file gone": (remove("iter_0000004/metadata.json"), "iter_0000004/metadata.json is missing", "2"),
    "coefficients gone": (metadata(lambda t: t.pop(COEFFICIENT)), f"iter_0000004 has no {COEFFICIENT}", "2"),
    "coefficients of one layer gone": (
        metadata(lambda table: table[COEFFICIENT].chunks.pop(2)),
        f"iter_0000004 has only a part of {COEFFICIENT}",
        "--ckpt-step: 2",
    ),
    "iteration gone": (
        lambda folder: shutil.rmtree(folder / "iter_0000004"),
        "iter_0000004 does not exist; restore it",
        "--ckpt-step: 2",
    ),
    "latest iteration empty": (write(LATEST, ""), f"{LATEST} says ''", "(complete iterations: 2, 4)"),
    "latest iteration garbage": (
        write(LATEST, "four"),
        f"{LATEST} says 'four'",
        "the number of an iteration",
    ),
    "no other iteration": (
        lambda folder: (shutil.rmtree(folder / "iter_0000002"), cut(DATA)(folder))[1],
        f"{DATA} is cut off: ",
        "has no other iteration",
    ),
}
LEGACY: dict[str, tuple[Damage, str, str]] = {
    "file of rank 0 cut": (
        cut("iter_0000004/mp_rank_00/model_optim_rng.pt"),
        "iter_0000004/mp_rank_00/model_optim_rng.pt is damaged",
        "--ckpt-step: 2",
    ),
    "file of rank 1 cut": (
        cut("iter_0000004/mp_rank_01/model_optim_rng.pt"),
        "iter_0000004/mp_rank_01/model_optim_rng.pt is damaged",
        "--ckpt-step: 2",
    ),
    "file of rank 1 gone": (
        remove("iter_0000004/mp_rank_01/model_optim_rng.pt"),
        "iter_0000004/mp_rank_01/model_optim_rng.pt is missing",
        "--ckpt-step: 2",
    ),
    "coefficients gone": (
        without_coefficients,
        "has no decoder.layers.2.self_attention.fope.cos_coef",
        "load one that is complete",
    ),
}


def refusal(name: str, run: Run, damage: Damage, trainer: Trainer, *flags: str, nproc: int = 1) -> str:
    """Damage a copy, try to resume from it and to save there; the files must stay as they are."""
    folder = trainer.folder / "damaged" / name
    shutil.copytree(run.folder, folder)
    damage(folder)
    before = contents(folder)
    refused = trainer.run(
        f"refused, {name}",
        *FOPE,
        "--load",
        str(folder),
        "--save",
        str(folder),
        *flags,
        nproc=nproc,
        check=False,
    )
    assert contents(folder) == before
    return refused.error.replace(f"{folder}/", "")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name: str, trainer: Trainer, whole: Run) -> None:
    damage, start, part = DAMAGES[name]
    line = refusal(name, whole, damage, trainer)
    assert line.startswith(start) and part in line


def test_damage_under_tensor_parallelism(trainer: Trainer, whole: Run) -> None:
    """One line, not one per rank."""
    line = refusal("TP2", whole, cut(DATA), trainer, *TP2, nproc=2)
    assert line.startswith(f"{DATA} is cut off: ")


def test_no_strictness_lets_coefficients_be_missing(trainer: Trainer, whole: Run) -> None:
    """Megatron would only log it, and the model would go on with fresh ones."""
    damage = metadata(lambda table: table.pop(COEFFICIENT))
    line = refusal("log all", whole, damage, trainer, "--dist-ckpt-strictness", "log_all")
    assert line.startswith(f"iter_0000004 has no {COEFFICIENT}")


def test_an_iteration_that_was_never_saved(trainer: Trainer, whole: Run) -> None:
    line = refusal("step", whole, lambda folder: None, trainer, "--ckpt-step", "3")
    assert line.startswith("iter_0000003 does not exist") and "--ckpt-step: 2, 4" in line


def test_damage_before_the_arguments_are_known(trainer: Trainer, whole: Run) -> None:
    line = refusal("arguments", whole, cut(DATA), trainer, "--use-checkpoint-args")
    assert line.startswith(f"{DATA} is cut off: ")


@pytest.mark.parametrize("name", LEGACY)
def test_damage_of_the_legacy_format(name: str, trainer: Trainer, legacy: Run) -> None:
    damage, part, way_out = LEGACY[name]
    flags = (*TP2, "--ckpt-format", "torch")
    line = refusal(f"legacy, {name}", legacy, damage, trainer, *flags, nproc=2)
    assert part in line and way_out in line


@pytest.mark.parametrize(
    ("flags", "nproc"), [((), 1), (("--pipeline-model-parallel-size", "2"), 2)], ids=["one rank", "PP2"]
)
def test_the_legacy_format_keeps_its_layout(
    flags: tuple[str, ...], nproc: int, trainer: Trainer, legacy: Run
) -> None:
    line = refusal(
        f"legacy, {nproc}",
        legacy,
        lambda folder: None,
        trainer,
        "--ckpt-format",
        "torch",
        *flags,
        nproc=nproc,
    )
    assert line.startswith("--tensor-model-parallel-size is 1") and "allowed: 2" in line


def test_evaluation_names_the_damage(trainer: Trainer, whole: Run) -> None:
    from megatron_fope.checkpoint.reader import open_checkpoint
    from megatron_fope.common.errors import UserError

    folder = trainer.folder / "damaged" / "evaluation"
    shutil.copytree(whole.folder, folder)
    remove(DATA)(folder)
    with pytest.raises(UserError, match=r"--checkpoint is .*__0_0.distcp is missing"):
        open_checkpoint(folder, name="--checkpoint")


LAYOUTS = {
    "ranks": ("--tensor-model-parallel-size 5", "--tensor-model-parallel-size 5 x", "WORLD_SIZE is 12"),
    "heads": (
        "--tensor-model-parallel-size 3",
        "--tensor-model-parallel-size is 3",
        "4 --num-attention-heads",
    ),
    "KV heads": (
        "--tensor-model-parallel-size 2 --num-attention-heads 6 --kv-channels 16 --group-query-attention "
        "--num-query-groups 3",
        "--tensor-model-parallel-size is 2",
        "a divisor or a multiple of the 3 --num-query-groups",
    ),
    "layers": ("--pipeline-model-parallel-size 3", "--pipeline-model-parallel-size is 3", "2 --num-layers"),
    "tokens": ("--context-parallel-size 3", "--context-parallel-size is 3", "64 tokens of --seq-length"),
    "experts": (
        "--num-experts 4 --expert-model-parallel-size 3 --global-batch-size 24",
        "--expert-model-parallel-size is 3",
        "4 --num-experts",
    ),
    "batch": ("--global-batch-size 4", "--global-batch-size is 4", "--micro-batch-size 2 times 12"),
}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_do_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fope import register

    flags, beginning, allowed = LAYOUTS[name]
    register()
    monkeypatch.setenv("WORLD_SIZE", "12")
    found = outcome(start, [*FOPE, *flags.split()])
    assert found["error"] is None, found["error"]
    (line,) = [line for line in found["stderr"].splitlines() if "error: " in line]
    assert found["code"] == 2 and line.startswith(f"megatron-fope: error: {beginning}") and allowed in line
