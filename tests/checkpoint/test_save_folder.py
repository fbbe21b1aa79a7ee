"""Saving into a folder whose files other checkpoints have too: they keep what they have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from trainer import Run, Trainer

from megatron_fope.checkpoint.files import TRACKER
from megatron_fope.checkpoint.saving import release_shared_files
from megatron_fope.common.errors import UserError
from megatron_fope.tools.conversion.converter import convert

ROPE = ("--position-embedding-type", "rope")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in ("iter_0000004/__0_0.distcp", "iter_0000004/mp_rank_00/model_optim_rng.pt", TRACKER):
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("4")
    return tmp_path / "source"


def link_folder(source: Path, target: Path) -> None:
    target.mkdir()
    (target / "iter_0000004").symlink_to(source / "iter_0000004", target_is_directory=True)
    (target / TRACKER).symlink_to(source / TRACKER)


WAYS = {
    "hard": lambda source, target: shutil.copytree(source, target, copy_function=os.link),
    "symbolic": lambda source, target: shutil.copytree(source, target, copy_function=os.symlink),
    "a link to the folder": link_folder,
}


@pytest.mark.parametrize("way", WAYS)
def test_links_are_let_go(way: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    WAYS[way](source, target)
    release_shared_files(target, 2)
    assert capsys.readouterr().out == "" and (target / "iter_0000004" / "__0_0.distcp").exists()
    release_shared_files(target, 4)
    assert "target/iter_0000004 shared" in capsys.readouterr().out
    assert not [path for path in target.rglob("*") if path.is_file() and path.name != TRACKER]
    (target / TRACKER).write_text("5")
    assert [path.read_text() for path in source.rglob("*") if path.is_file()] == ["4", "4", "4"]


def test_a_folder_of_its_own(source: Path) -> None:
    """And one that is not there, or elsewhere."""
    before = sorted(source.rglob("*"))
    for folder, step in ((source, 4), (source, "release"), (source / "new", 4)):
        release_shared_files(folder, step)
    assert sorted(source.rglob("*")) == before


def test_links_that_cannot_be_removed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "target", copy_function=os.link)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"iter_0000004 shares files .* \(Permission denied\); use another"):
        release_shared_files(tmp_path / "target", 4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.launch
@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_a_rope_run_over_its_links(link: str, trainer: Trainer, tmp_path: Path) -> None:
    """RoPE to FoPE and back, both with links; then a RoPE run that saves the linked iteration again."""
    rope: Run = trainer.run("rope with links", *ROPE)
    convert(rope.folder, tmp_path / "fope", link=link)
    back = convert(tmp_path / "fope", tmp_path / "back", position_embedding_type="rope", link=link).target
    before = files(rope.folder), files(tmp_path / "fope")
    flags = ("--load", str(back), "--save", str(back), "--finetune", "--lr", "3e-3")
    run = trainer.run(f"over {link} links", *ROPE, *flags)
    assert run.code == 0 and "back/iter_0000004 shared" in run.log
    assert (files(rope.folder), files(tmp_path / "fope")) == before
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in back.rglob("*.distcp"))
    after = trainer.run(f"after {link} links", *ROPE, *flags[:2], "--finetune", "--train-iters", "1")
    assert list(after.curve()) == [1]


@pytest.mark.launch
def test_the_legacy_format_over_links(trainer: Trainer, tmp_path: Path) -> None:
    """Another format, another position embedding, and links that convert did not make."""
    legacy = ("--position-embedding-type", "learned_absolute", "--ckpt-format", "torch")
    first: Run = trainer.run("legacy with links", *legacy)
    target = shutil.copytree(first.folder, tmp_path / "target", copy_function=os.link)
    before = files(first.folder)
    flags = ("--load", str(target), "--save", str(target), "--finetune", "--lr", "3e-3")
    assert trainer.run("over legacy links", *legacy, *flags).code == 0
    assert files(first.folder) == before
    name = "iter_0000004/mp_rank_00/model_optim_rng.pt"
    old, new = (
        torch.load(folder / name, weights_only=False)["model"]["embedding.word_embeddings.weight"]
        for folder in (first.folder, target)
    )
    assert not torch.equal(old, new)
