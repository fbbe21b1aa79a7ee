"""What ``convert``, ``inspect`` and ``diff`` refuse, and that a refusal leaves everything as it was."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT
from synthetic import LATEST, SyntheticCheckpoint, main

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.tools.conversion.converter import convert

FOPE = FoPEConfig.from_profile(train_length=64)


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as stop:
        main(*argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out
    (line,) = output.err.splitlines()
    assert line.startswith("megatron-fope: error: ")
    return line.removeprefix("megatron-fope: error: ")


BAD: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "same folder": (lambda t: [t / "fope", t / "fope"], "which is SOURCE or a part of it"),
    "same folder through a link": (
        lambda t: [(t / "link").symlink_to(t / "fope") or t / "fope", t / "link"],
        "which is SOURCE or a part of it",
    ),
    "part of the source": (lambda t: [t / "fope", t / "fope" / "new"], "which is SOURCE or a part of it"),
    "target exists": (lambda t: [t / "fope", (t / "new").mkdir() or t / "new"], "which exists"),
    "no folder for the target": (lambda t: [t / "fope", t / "a" / "b"], "does not exist"),
    "nothing there": (lambda t: [t / "nowhere", t / "new"], "SOURCE is '{0}/nowhere': no such folder"),
    "no checkpoint": (lambda t: [t / "empty", t / "new"], f"no {LATEST} there"),
    "one iteration": (lambda t: [t / "fope" / "iter_0000004", t / "new"], "give the folder above it"),
    "no such iteration": (
        lambda t: [t / "fope", t / "new", "--iteration", "7"],
        "there is no iteration 7; it holds: iter_0000004",
    ),
    "iteration is no number": (lambda t: [t / "fope", t / "new", "--iteration", "x"], "--iteration is 'x'"),
    "shorter": (
        lambda t: [t / "fope", t / "new", "--fope-train-length", "32"],
        "--fope-train-length is 32, but SOURCE was trained with 64",
    ),
    "shorter than RoPE": (
        lambda t: [t / "rope", t / "new", "--fope-train-length", "32"],
        "--fope-train-length is 32, but SOURCE was trained with 64",
    ),
    "other profile": (
        lambda t: [t / "fope", t / "new", "--fope-profile", "intern-s1-pro"],
        "--fope-profile is 'intern-s1-pro', but SOURCE was trained with 'paper'",
    ),
    "unknown profile": (lambda t: [t / "rope", t / "new", "--fope-profile", "x"], "--fope-profile is 'x'"),
    "RoPE to RoPE": (
        lambda t: [t / "rope", t / "new", "--position-embedding-type", "rope"],
        "a RoPE model already",
    ),
    "FoPE flags for RoPE": (
        lambda t: [t / "fope", t / "new", "--position-embedding-type", "rope", "--fope-seed", "1"],
        "--fope-seed is given",
    ),
    "learnable": (
        lambda t: [t / "rope", t / "new", "--fope-learnable"],
        "--fope-learnable is set and SOURCE",
    ),
    "start of FoPE": (
        lambda t: [t / "fope", t / "new", "--fope-start-from-rope"],
        "--fope-start-from-rope is 'immediate'; requires a SOURCE of RoPE",
    ),
    "unknown start": (
        lambda t: [t / "rope", t / "new", "--fope-start-from-rope", "x"],
        "--fope-start-from-rope is 'x'; allowed: immediate",
    ),
    "preserving another base": (
        lambda t: [
            *(t / "rope", t / "new", "--rotary-base", "20000"),
            *("--fope-start-from-rope", "function-preserving", "--fope-anneal-iters", "5"),
        ],
        "--rotary-base is 20000, but the checkpoint in {0}/rope was trained with 10000",
    ),
    "permission": (lambda t: [t / "fope", t / "new", "--fope-grow"], "--fope-grow is given to convert"),
    "unknown way to link": (lambda t: [t / "fope", t / "new", "--link", "x"], "--link is 'x'; allowed: copy"),
    "no number": (lambda t: [t / "fope", t / "new", "--rotary-base", "x"], "--rotary-base is 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [
        SyntheticCheckpoint(tmp_path / "fope", fope=FOPE),
        SyntheticCheckpoint(tmp_path / "rope"),
    ]
    (tmp_path / "empty").mkdir()
    before = [source.contents() for source in sources]
    argv, message = BAD[case]
    assert message.format(tmp_path) in refusal(capsys, "convert", *argv(tmp_path))
    assert [source.contents() for source in sources] == before
    assert not list(tmp_path.glob("new/*")) and not list(tmp_path.glob(".new.*"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the checkpoint ran",)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "table of contents cut": (lambda p: cut(p / ".metadata"), ".metadata cannot be read"),
    "table of contents with code": (
        lambda p: (p / ".metadata").write_bytes(pickle.dumps(Evil())),
        "builtins.print has no place in a table of contents",
    ),
    "another pickle": (
        lambda p: (p / ".metadata").write_bytes(pickle.dumps({})),
        "a table of contents is expected, not dict",
    ),
    "data file cut": (lambda p: cut(p / "__1_0.distcp"), "__1_0.distcp is cut off"),
    "data file gone": (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "metadata.json gone": (lambda p: (p / "metadata.json").unlink(), "metadata.json is missing"),
    "metadata.json empty": (lambda p: (p / "metadata.json").write_text(""), "metadata.json cannot be read"),
    "another format": (
        lambda p: (p / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "its format is zarr; allowed: torch_dist",
    ),
    "arguments cut": (lambda p: cut(p / "common.pt"), "common.pt is damaged"),
    "arguments with code": (
        lambda p: torch.save({"args": Evil()}, p / "common.pt"),
        "the arguments in {0} cannot be read",
    ),
    "no arguments": (lambda p: torch.save({}, p / "common.pt"), "stores no arguments"),
    "latest iteration garbage": (
        lambda p: (p.parent / LATEST).write_text("four"),
        f"{LATEST} says 'four'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_source(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticCheckpoint(tmp_path / "rope", old=True)
    harm, message = DAMAGES[damage]
    harm(source.path)
    before = source.contents()
    message = message.format(source.path)
    for command in (
        ["convert", source.folder, tmp_path / "new"],
        ["inspect", source.folder],
        ["diff", source.folder, source.folder],
    ):
        assert message in refusal(capsys, *command)
    assert source.contents() == before and sorted(p.name for p in tmp_path.iterdir()) == ["rope"]


def test_other_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learned = SyntheticCheckpoint(tmp_path / "learned", position_embedding_type="learned_absolute")
    assert "allowed: rope, yarn, fope" in refusal(capsys, "convert", learned.folder, tmp_path / "new")
    other = SyntheticCheckpoint(tmp_path / "other", layers=5)
    assert refusal(capsys, "diff", learned.folder, other.folder) == (
        f"B '{other.folder}' is a checkpoint of another model: num_layers is 5, in A 4"
    )
    (tmp_path / "legacy" / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "legacy" / LATEST).write_text("4")
    torch.save(
        {"args": other.args, "model": {}},
        tmp_path / "legacy" / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt",
    )
    error = refusal(capsys, "convert", tmp_path / "legacy", tmp_path / "new")
    assert "legacy format torch; requires torch_dist" in error and "--ckpt-convert-format" in error
    assert "legacy format torch" in refusal(capsys, "diff", tmp_path / "legacy", other.folder)


def test_disk_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write: at every file of the new checkpoint, one after the other."""
    source = SyntheticCheckpoint(tmp_path / "rope")
    before, sync, calls = source.contents(), os.fsync, []
    limit = 0

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) > limit:
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    for limit in range(3):  # noqa: B007
        calls.clear()
        error = refusal(capsys, "convert", source.folder, tmp_path / "new")
        assert error.endswith("it cannot be written (No space left on device); nothing was left there")
        assert source.contents() == before and sorted(p.name for p in tmp_path.iterdir()) == ["rope"]


def test_file_size_limit(tmp_path: Path) -> None:
    """The same from the system itself: data files may not grow beyond 8 KB."""
    source = SyntheticCheckpoint(tmp_path / "rope")
    before = source.contents()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        "from megatron_fope.tools.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "convert", str(source.folder), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "it cannot be written (File too large)" in done.stderr
    assert source.contents() == before and sorted(p.name for p in tmp_path.iterdir()) == ["rope"]


def test_killed_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticCheckpoint(tmp_path / "rope")
    before = source.contents()
    code = (
        "import os, signal, sys; from megatron_fope.tools.conversion import writing; "
        "write = writing._write; "
        "writing._write = lambda file, data: (file.name == 'metadata.json' "
        "and os.kill(os.getpid(), signal.SIGKILL), write(file, data))[1]; "
        "from megatron_fope.tools.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "convert", str(source.folder), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert source.contents() == before and not (tmp_path / "new").exists()
    (left,) = tmp_path.glob(".new.partial-*")
    assert f"no {LATEST} there" in refusal(capsys, "inspect", left / "new"), "what is left does not load"
    assert main("convert", source.folder, tmp_path / "new") == 0
    line = f"left by an interrupted conversion to TARGET, unless one is still running: {left}"
    assert line in capsys.readouterr().out
    assert left.is_dir(), "it may be somebody's who is still at work"


def test_changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fope.tools.conversion import writing

    source = SyntheticCheckpoint(tmp_path / "rope")
    link = writing._bring

    def link_and_touch(file: Path, *rest: Any) -> None:
        link(file, *rest)
        os.utime(file)

    monkeypatch.setattr(writing, "_bring", link_and_touch)
    with pytest.raises(UserError, match="was changed while it was converted"):
        convert(source.folder, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rope"]
