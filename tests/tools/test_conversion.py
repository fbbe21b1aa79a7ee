"""``convert``, ``inspect`` and ``diff`` on checkpoints made without a model."""

from __future__ import annotations

import enum
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT
from synthetic import LATEST, SyntheticCheckpoint, main

from megatron_fope.checkpoint import inert
from megatron_fope.checkpoint.reader import open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.tools.conversion.comparison import diff
from megatron_fope.tools.conversion.converter import convert
from megatron_fope.tools.conversion.inspection import inspect

FOPE = FoPEConfig.from_profile(train_length=64)
COEFFICIENT = "decoder.layers.self_attention.fope.sin_coef"


@pytest.fixture(params=[False, True], ids=["arguments in the table", "arguments in common.pt"])
def rope(request: pytest.FixtureRequest, tmp_path: Path) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(tmp_path / "rope", old=request.param)


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
        fresh = [Geometry(config, 16, 2).make_coefficients(layer=layer)[leaf] for layer in range(1, 5)]
        assert torch.equal(value, torch.stack(fresh))
    changed = ("position_embedding_type", "add_position_embedding")
    old = {key: value for key, value in vars(rope.args).items() if key not in changed}
    assert not made.args.add_position_embedding, "a Megatron without this package compares it and refuses"
    assert old.items() <= vars(made.args).items(), "the other arguments are the source's"
    source = open_checkpoint(rope.folder, name="source")
    for index, place in source.metadata.storage_data.items():
        kept = made.metadata.storage_data[index] == place
        assert kept != (index.fqn == "common_state/shard_0_1"), "only the arguments have moved"
    for name, entry in source.tensors.items():
        assert made.tensors[name] == entry
    for file in rope.path.glob("*.distcp"):
        kept = (made.path / file.name).read_bytes()
        assert kept == file.read_bytes() and not (made.path / file.name).samefile(file)
    assert done.linked_files == 2 and done.linked_bytes == sum(f.stat().st_size for f in rope.path.glob("_*"))


def test_there_and_back(rope: SyntheticCheckpoint, tmp_path: Path) -> None:
    convert(rope.folder, tmp_path / "fope")
    convert(tmp_path / "fope", tmp_path / "longer", train_length=1024)
    convert(tmp_path / "longer", tmp_path / "back", position_embedding_type="rope")
    assert inspect(tmp_path / "longer").train_length == 1024
    for name in ("fope", "longer", "back"):
        table = open_checkpoint(tmp_path / name, name=name).metadata
        assert {index.fqn for index in table.storage_data} == table.state_dict_metadata.keys()
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
    assert (clip.args.fope_pad_value, inspect(clip.folder).anneal) == ("0,1", None)


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
    # A chain of conversions does not depend on the folders in the middle.
    convert(tmp_path / "fope", tmp_path / "next", train_length=128, link=link)
    shutil.rmtree(tmp_path / "fope")
    assert inspect(tmp_path / "next").train_length == 128


def test_links_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SyntheticCheckpoint(tmp_path / "rope")
    monkeypatch.setattr(os, "link", raiser(OSError(18, "Invalid cross-device link")))
    with pytest.raises(UserError, match=r"it cannot be written \(Invalid cross-device link\)"):
        convert(tmp_path / "rope", tmp_path / "fope", link="hard")


def test_copies_keep_holes_and_every_byte(tmp_path: Path) -> None:
    """Data before, between and behind holes, and a file that ends with one."""
    rope = SyntheticCheckpoint(tmp_path / "rope")
    file = rope.path / "more.bin"
    with open(file, "wb") as stream:
        for place in (0, 5_000_001, 40_000_000):
            stream.seek(place)
            stream.write(os.urandom(70_001))
        stream.truncate(90_000_000)
    convert(rope.folder, tmp_path / "fope")
    copy = tmp_path / "fope" / "iter_0000004" / "more.bin"
    assert copy.read_bytes() == file.read_bytes()
    assert copy.stat().st_blocks <= file.stat().st_blocks + 8 < 2000


def test_no_space_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = SyntheticCheckpoint(tmp_path / "rope")
    (rope.path / "more.bin").write_bytes(bytes(5_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=4_000_000))
    with pytest.raises(UserError, match=r"TARGET needs .* GB for copies .* or --link hard"):
        convert(rope.folder, tmp_path / "fope")
    assert convert(rope.folder, tmp_path / "fope", link="hard").links == "hard"


def test_clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system clones, no byte is copied and no space is asked for."""
    from megatron_fope.tools.conversion import writing

    rope = SyntheticCheckpoint(tmp_path / "rope")
    cloned = []

    def clone(old: Any, copy: Any) -> bool:
        copy.write(old.read())
        cloned.append(old.name)
        return True

    monkeypatch.setattr(writing, "_clone", clone)
    monkeypatch.setattr(writing, "_copy_data", raiser(AssertionError("copied")))
    monkeypatch.setattr(shutil, "disk_usage", raiser(AssertionError("asked for space")))
    assert convert(rope.folder, tmp_path / "fope").links == "clone"
    assert {str(file) for file in rope.path.glob("*.distcp")} <= set(map(str, cloned))


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("link", ["hard", "symbolic", "copy"])
def test_terabytes(link: str, tmp_path: Path) -> None:
    """Time and memory of the whole command do not depend on the size of the data."""
    source = SyntheticCheckpoint(tmp_path / "rope", layers=80, hidden=8192, pieces=8)
    assert source.apparent_bytes > 500e9
    before = {path: state[:3] for path, state in source.contents().items()}
    # For a new process the kernel first counts what the one that starts it has taken; this counts anew.
    # Megatron, whose rotary module is asked, takes seconds of its own to be imported.
    code = (
        "import re, sys, time; import megatron.core.models.gpt; from megatron_fope.tools.cli import main; "
        "start = time.process_time(); main(sys.argv[1:]); print('seconds:', time.process_time() - start); "
        "print(re.search(r'VmHWM.*', open('/proc/self/status').read())[0])"
    )
    command = [sys.executable, "-c", code, "convert", source.folder, tmp_path / "fope"]
    command += ["--link", link]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    output = process.stdout.read()
    assert process.wait() == 0, output
    assert float(re.search(r"seconds: (.+)", output)[1]) < 5
    assert int(re.search(r"VmHWM:\s+(\d+) kB", output)[1]) < 1.1e6
    assert {path: state[:3] for path, state in source.contents().items()} == before
    assert inspect(tmp_path / "fope").apparent_bytes > 500e9
    assert "8 data files" in output
    assert ("would destroy SOURCE" in output) == (link != "copy")
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "fope").rglob("*") if file.is_file())
    assert used < 1e9, "holes stay holes"


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
    model = {name: Geometry(FOPE, 16, 2).make_coefficients(layer=1)["sin_coef"]}
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
    convert(first, tmp_path / "longer", train_length=256, link="hard")
    found = diff(first, tmp_path / "longer")
    assert found.tensors[COEFFICIENT] == ("[4, 2, 3, 3] float32", "[4, 2, 4, 4] float32")
    assert found.same_file == 20 and found.settings["fope_train_length"] == (64, 256)


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
