"""Files that a conversion has linked are never written again through the other folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fope.checkpoint_starts import check_save_folder
from megatron_fope.errors import UserError


@pytest.fixture(params=["hard", "symbolic"])
def linked(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with one iteration whose data file another folder has too."""
    source = tmp_path / "source" / "iter_0000004" / "__0_0.distcp"
    source.parent.mkdir(parents=True)
    source.write_text("data")
    target = tmp_path / "target" / "iter_0000004" / "__0_0.distcp"
    target.parent.mkdir(parents=True)
    (os.link if request.param == "hard" else os.symlink)(source, target)
    return tmp_path / "target"


def arguments(folder: Path, **changes: Any) -> SimpleNamespace:
    settings = {"position_embedding_type": "fope", "save": str(folder), "load": str(folder)}
    return SimpleNamespace(**settings | {"finetune": False, "ckpt_step": None} | changes)


@pytest.mark.parametrize(
    "changes", [{"finetune": True}, {"ckpt_step": 2}, {"load": None}, {"load": "/elsewhere"}], ids=str
)
def test_refused(linked: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"--save is .*target, where iter_0000004 shares its files"
    ) as refused:
        check_save_folder(arguments(linked, **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes", [{}, {"save": None}, {"position_embedding_type": "rope", "finetune": True}], ids=str
)
def test_accepted(linked: Path, changes: dict[str, Any]) -> None:
    check_save_folder(arguments(linked, **changes))


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "iter_0000004" / "__0_0.distcp").write_text("data")
    check_save_folder(arguments(tmp_path, finetune=True))
