"""Files and folders that appear when they are whole, and runs that share a folder, a name and a pid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from synthetic import SyntheticCheckpoint

from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_output_file, leftovers, staging_folder, write_text
from megatron_fope.tools.conversion import writing
from megatron_fope.tools.conversion.converter import convert
from megatron_fope.tools.conversion.inspection import inspect


def test_two_runs_for_one_target(tmp_path: Path) -> None:
    """Neither takes the other's folder, although containers give all of them the same pid."""
    target = tmp_path / "a[b]"
    with staging_folder(target) as first:
        (first / "data").write_text("first")
        with staging_folder(target) as second:
            assert first != second and leftovers(target) == sorted([first, second])
        assert (first / "data").read_text() == "first" and not second.exists()
    assert not list(tmp_path.iterdir())


def test_conversions_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finishes while another one is in the middle: that one refuses, and both folders are whole."""
    source = SyntheticCheckpoint(tmp_path / "rope")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    build = writing._build

    def build_twice(*given: object) -> object:
        monkeypatch.setattr(writing, "_build", build)
        convert(source.folder, tmp_path / "new", seed=7)
        return build(*given)

    monkeypatch.setattr(writing, "_build", build_twice)
    with pytest.raises(UserError, match="it was made meanwhile"):
        convert(source.folder, tmp_path / "new")
    assert inspect(tmp_path / "new").position_embedding_type == "fope"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "rope"]
    assert oct((tmp_path / "new").stat().st_mode) == oct(source.folder.stat().st_mode), "others may read it"


def test_long_names(tmp_path: Path) -> None:
    with staging_folder(tmp_path / ("é" * 127)) as folder:
        assert folder.is_dir()


def test_write_text(tmp_path: Path) -> None:
    """A link is followed, a second name of the file keeps its text, and a failure leaves the old text."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    os.link(tmp_path / "file", tmp_path / "second name")
    os.symlink("file", tmp_path / "link")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "second name").read_text() == "old"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\udcff" * 9)
    assert (tmp_path / "file").read_text() == "new"
    write_text("/dev/null", "new")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("path", ["/dev/full", "{}", "{}/file/below", "/proc/new"])
def test_refused_outputs(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=r"^--output is .*, which cannot be written \([A-Z][a-z ]+\)$"):
        check_output_file("--output", path.format(tmp_path))
    assert (tmp_path / "file").read_text() == "old"


def test_accepted_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe", "new", "folder/new"):
        check_output_file("--output", tmp_path / name)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "pipe"]
    check_output_file("--output", "/dev/stdout")
