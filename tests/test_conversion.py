"""``convert``, ``inspect`` and ``diff`` on checkpoints made without a model."""

from __future__ import annotations

import enum
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT
from synthetic import SyntheticCheckpoint

from megatron_fope import cli
from megatron_fope.config import FoPEConfig
from megatron_fope.conversion import convert, diff, inert, inspect
from megatron_fope.conversion.source import open_checkpoint
from megatron_fope.errors import UserError

FOPE = FoPEConfig.from_profile(train_length=64)
LATEST = "latest_checkpointed_iteration.txt"
COEFFICIENT = "decoder.layers.self_attention.fope.sin_coef"


@pytest.fixture(params=[False, True], ids=["arguments in the table", "arguments in common.pt"])
def rope(request: pytest.FixtureRequest, tmp_path: Path) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(tmp_path / "rope", old=request.param)


def main(*argv: object) -> int:
    return cli.main([str(word) for word in argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as stop:
        main(*argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out
    (line,) = output.err.splitlines()
    assert line.startswith("megatron-fope: error: ")
    return line.removeprefix("megatron-fope: error: ")


def test_rope_to_fope(rope: SyntheticCheckpoint, tmp_path: Path) -> None:
    before = rope.contents()
    done = convert(rope.folder, tmp_path / "fope", seed=3, gain=0.5)
    assert rope.contents() == before
    config = FoPEConfig.from_profile(train_length=64, seed=3, gain=0.5)
    made = open_checkpoint(done.target, name="made")
    assert made.position_embedding_type == "fope" and made.iteration == 4
    assert (made.args.fope_seed, made.args.fope_gain, made.args.fope_kept_frequencies) == (3, 0.5, 3)
    for leaf in ("sin_coef", "cos_coef"):
        value = made.read_tensor(f"decoder.layers.self_attention.fope.{leaf}")
        fresh = [config.make_coefficients(2, 16, layer=layer)[leaf] for layer in range(1, 5)]
        assert torch.equal(value, torch.stack(fresh))
    old = {key: value for key, value in vars(rope.args).items() if key != "position_embedding_type"}
    assert old.items() <= vars(made.args).items(), "the other arguments are the source's"
    source = open_checkpoint(rope.folder, name="source")
    for index, place in source.metadata.storage_data.items():
        kept = made.metadata.storage_data[index] == place
        assert kept != (index.fqn == "common_state/shard_0_1"), "only the arguments have moved"
    for name, entry in source.tensors.items():
        assert made.tensors[name] == entry
    for file in rope.path.glob("*.distcp"):
        assert (made.path / file.name).samefile(file)
    assert done.linked_files == 2 and done.linked_bytes == sum(f.stat().st_size for f in rope.path.glob("_*"))


def test_there_and_back(rope: SyntheticCheckpoint, tmp_path: Path) -> None:
    convert(rope.folder, tmp_path / "fope")
    convert(tmp_path / "fope", tmp_path / "longer", train_length=1024)
    convert(tmp_path / "longer", tmp_path / "back", position_embedding_type="rope")
    assert inspect(tmp_path / "longer").train_length == 1024
    assert not diff(rope.folder, tmp_path / "back").different
    assert diff(rope.folder, tmp_path / "fope").settings["position_embedding_type"] == ("rope", "fope")


def test_settings_are_kept_or_asked_for(tmp_path: Path) -> None:
    SyntheticCheckpoint(tmp_path / "fope", fope=FOPE)
    convert(tmp_path / "fope", tmp_path / "longer", train_length=256, seq_length=256, rotary_base=5e5)
    args = open_checkpoint(tmp_path / "longer", name="longer").args
    assert (args.fope_train_length, args.seq_length, args.max_position_embeddings) == (256, 256, 256)
    assert args.rotary_base == 500000 and args.fope_seed == 1234
    convert(tmp_path / "fope", tmp_path / "same length", train_length=256)
    assert open_checkpoint(tmp_path / "same length", name="same length").args.seq_length == 64


def test_starts(tmp_path: Path) -> None:
    SyntheticCheckpoint(tmp_path / "rope")
    start = {"start": "function-preserving", "anneal_iters": 10}
    convert(tmp_path / "rope", tmp_path / "preserving", **start)
    args = open_checkpoint(tmp_path / "preserving", name="preserving").args
    assert (args.fope_anneal_iters, args.fope_anneal_start) == (10, 4)
    assert inspect(tmp_path / "preserving").anneal == (0, 10)
    with pytest.raises(UserError, match="whose start from RoPE is at 0 of 10 iterations; finish it first"):
        convert(tmp_path / "preserving", tmp_path / "longer", train_length=256)
    convert(tmp_path / "rope", tmp_path / "clip", start="clip-only")
    clip = open_checkpoint(tmp_path / "clip", name="clip")
    assert torch.equal(clip.read_tensor(COEFFICIENT), torch.eye(3).expand(4, 2, 3, 3))
    assert (clip.args.fope_padding, inspect(clip.folder).anneal) == ("0,1", None)


def test_older_iterations_and_releases(tmp_path: Path) -> None:
    SyntheticCheckpoint(tmp_path / "rope", iteration=2)
    SyntheticCheckpoint(tmp_path / "other", iteration=4).path.rename(tmp_path / "rope" / "iter_0000004")
    (tmp_path / "rope" / LATEST).write_text("4")
    assert convert(tmp_path / "rope", tmp_path / "two", iteration=2).iteration == 2
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["iter_0000002", LATEST]
    (tmp_path / "two" / "iter_0000002").rename(tmp_path / "two" / "release")
    (tmp_path / "two" / LATEST).write_text("release")
    convert(tmp_path / "two", tmp_path / "again", train_length=128)
    assert (tmp_path / "again" / LATEST).read_text() == "release"
    assert inspect(tmp_path / "again").iteration == "release"


@pytest.mark.parametrize("link", ["hard", "symbolic", "copy"])
def test_ways_to_link(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = SyntheticCheckpoint(tmp_path / "rope")
    (rope.path / "more").mkdir()
    (rope.path / "more" / "file.bin").write_bytes(b"something of another tool")
    done = convert(rope.folder, tmp_path / "fope", link=link)
    new = tmp_path / "fope" / "iter_0000004" / "__1_0.distcp"
    old = rope.path / "__1_0.distcp"
    assert (done.links, new.is_symlink()) == (link, link == "symbolic")
    assert new.samefile(old) == (link != "copy") and new.stat().st_size == old.stat().st_size
    assert (new.parent / "more" / "file.bin").read_bytes() == b"something of another tool"
    monkeypatch.setattr(os, "link", raiser(OSError(18, "Invalid cross-device link")))
    assert convert(rope.folder, tmp_path / "automatic").links == "symbolic"
    # A chain of conversions does not depend on the folders in the middle.
    convert(tmp_path / "automatic", tmp_path / "next", train_length=128)
    shutil.rmtree(tmp_path / "automatic")
    assert inspect(tmp_path / "next").train_length == 128


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_terabytes(tmp_path: Path) -> None:
    """Time and memory of the whole command do not depend on the size of the data."""
    source = SyntheticCheckpoint(tmp_path / "rope", layers=80, hidden=8192, pieces=8)
    assert source.apparent_bytes > 500e9
    before = {path: state[:3] for path, state in source.contents().items()}
    command = [sys.executable, "-m", "megatron_fope", "convert", source.folder, tmp_path / "fope"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, output
    assert usage.ru_utime + usage.ru_stime < 10, "seconds of the processor, import of torch included"
    assert usage.ru_maxrss < 1e6, "KB"
    assert {path: state[:3] for path, state in source.contents().items()} == before
    assert inspect(tmp_path / "fope").apparent_bytes > 500e9
    assert "8 data files" in output and "as hard links" in output


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SyntheticCheckpoint(tmp_path / "fope", fope=FOPE)
    assert main("inspect", tmp_path / "fope", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["coefficients"][COEFFICIENT] == {"shape": [4, 2, 3, 3], "dtype": "float32"}
    numbers = 128 * 64 + 4 * 64 * (64 + 64 + 64 + 8 * 64 + 4 * 64)
    expected = {
        "format": "torch_dist", "megatron": "0.19 or later", "position_embedding_type": "fope",
        "profile": "paper", "train_length": 64, "seq_length": 64, "rotary_base": 10000,
        "kept_frequencies": 3, "clipped_frequencies": 5, "series": 3, "learnable": False,
        "parameters": numbers, "dtypes": {"bfloat16": numbers}, "optimizer": True, "iteration": 4,
        "iterations": ["iter_0000004"], "linked_files": 0,
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert main("inspect", tmp_path / "fope") == 0
    text = capsys.readouterr().out
    for part in ("profile paper, train length 64 tokens", "3 kept, 5 clipped", f"{COEFFICIENT} [4, 2, 3, 3]"):
        assert part in text


def test_inspect_legacy(tmp_path: Path) -> None:
    made = SyntheticCheckpoint(tmp_path / "made", fope=FOPE)
    folder = tmp_path / "legacy" / "iter_0000004" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "legacy" / LATEST).write_text("4")
    name = "decoder.layers.0.self_attention.fope.sin_coef"
    model = {name: FOPE.make_coefficients(2, 16, layer=1)["sin_coef"]}
    torch.save({"args": made.args, "model": model}, folder / "model_optim_rng.pt")
    found = inspect(tmp_path / "legacy")
    assert (found.format, found.parameters, found.train_length) == ("torch", None, 64)
    assert found.coefficients == {name: {"shape": [2, 3, 3], "dtype": "float32"}}


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    SyntheticCheckpoint(first, fope=FOPE)
    shutil.copytree(first, second)
    assert main("diff", first, first) == 0
    assert capsys.readouterr().out == "22 entries are in the same file in A and B\n"
    assert main("diff", first, second) == 0, "the same numbers in another file"
    assert "20 entries are alike; their data, in different files, is not compared" in capsys.readouterr().out
    SyntheticCheckpoint(tmp_path / "third", fope=FoPEConfig.from_profile(train_length=64, seed=9))
    assert main("diff", first, tmp_path / "third") == 1
    text = capsys.readouterr().out
    assert "fope_seed: 1234 -> 9" in text and f"{COEFFICIENT}: differs by up to 0." in text
    convert(first, tmp_path / "longer", train_length=256)
    found = diff(first, tmp_path / "longer")
    assert found.tensors[COEFFICIENT] == ("[4, 2, 3, 3] float32", "[4, 2, 4, 4] float32")
    assert found.same_file == 20 and found.settings["fope_train_length"] == (64, 256)


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
        "--fope-start-from-rope is 'immediate'; allowed: for a SOURCE of RoPE",
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
    "unknown way to link": (lambda t: [t / "fope", t / "new", "--link", "x"], "--link is 'x'; allowed: auto"),
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
    assert not list(tmp_path.glob("new/*")) and not list(tmp_path.glob("*.tmp-*"))


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
    assert "allowed: rope, fope" in refusal(capsys, "convert", learned.folder, tmp_path / "new")
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
    assert "legacy format torch; allowed: torch_dist" in error and "--ckpt-convert-format" in error
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
        "from megatron_fope.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "convert", str(source.folder), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "it cannot be written (File too large)" in done.stderr
    assert source.contents() == before and sorted(p.name for p in tmp_path.iterdir()) == ["rope"]


def test_killed_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticCheckpoint(tmp_path / "rope")
    before = source.contents()
    code = (
        "import os, signal, sys; from megatron_fope.conversion import writing; "
        "write = writing._write; "
        "writing._write = lambda file, data: (file.name == 'metadata.json' "
        "and os.kill(os.getpid(), signal.SIGKILL), write(file, data))[1]; "
        "from megatron_fope.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "convert", str(source.folder), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert source.contents() == before and not (tmp_path / "new").exists()
    (left,) = tmp_path.glob("new.tmp-*")
    assert f"no {LATEST} there" in refusal(capsys, "inspect", left), "what is left does not load"
    assert main("convert", source.folder, tmp_path / "new") == 0
    assert f"left by an interrupted conversion, can be deleted: {left}" in capsys.readouterr().out


def test_changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fope.conversion import writing

    source = SyntheticCheckpoint(tmp_path / "rope")
    link = writing._link

    def link_and_touch(file: Path, *rest: Any) -> None:
        link(file, *rest)
        os.utime(file)

    monkeypatch.setattr(writing, "_link", link_and_touch)
    with pytest.raises(UserError, match="was changed while it was converted"):
        convert(source.folder, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rope"]


class Kind(enum.Enum):
    A = 1


class Record:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_foreign_classes_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written back under their names, although nothing of them can be imported meanwhile."""
    file, foreign = tmp_path / "foreign.pt", types.ModuleType("foreign")
    for cls in (Kind, Record):
        monkeypatch.setattr(cls, "__module__", "foreign")
        setattr(foreign, cls.__name__, cls)
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "foreign", foreign)
        torch.save({"kind": Kind.A, "record": Record([1, Kind.A]), "numbers": torch.arange(3)}, file)
    value = inert.load(str(file))
    assert repr(value["kind"]) == "Kind(1)" and value["kind"] == inert.load(str(file))["kind"]
    assert not isinstance(value["kind"], Kind)
    with open(file, "wb") as stream:
        inert.save(value, stream)
    monkeypatch.setitem(sys.modules, "foreign", foreign)
    back = torch.load(file, weights_only=False)
    assert back["kind"] is Kind.A and type(back["record"]) is Record
    assert back["record"].value == [1, Kind.A] and back["numbers"].tolist() == [0, 1, 2]
