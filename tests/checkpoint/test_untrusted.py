"""Damaged and hostile checkpoints: every command refuses them in one line, before any process starts.

No code of a checkpoint runs, wherever in it a pickle is.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT
from synthetic import COMMON, LATEST, SyntheticCheckpoint, main
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_fope.checkpoint.reader import open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.tools.data import prepare_data
from megatron_fope.tools.evaluation import launching

COEFFICIENT = "decoder.layers.self_attention.fope.sin_coef"
RUN = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "transformer_impl": "local",
    "padded_vocab_size": 384,
}  # fmt: skip
COMMANDS = {
    "perplexity": "--cpu evaluate-perplexity --checkpoint {c} --data-path {d} --lengths 64 --tokens 128",
    "retrieval": "--cpu evaluate-retrieval --checkpoint {c} --data-path {d} --lengths 64",
    "inspect": "inspect {c}",
    "diff": "diff {c} {c}",
    "convert": "convert {c} {c}-new",
    "export": "export {c} {c}-new",
}
EVALUATIONS = ("perplexity", "retrieval")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = prepare_data(
        ROOT, tmp_path_factory.mktemp("data") / "text", include=["LICENSE"], show_progress=False
    )
    return data.train.prefix


def table(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the table of contents."""

    def damage(folder: Path) -> None:
        file = folder / "iter_0000004" / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        change(metadata)
        file.write_bytes(pickle.dumps(metadata))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def move(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / "elsewhere")


def tracker_is_a_folder(folder: Path) -> None:
    (folder / LATEST).unlink()
    (folder / LATEST).mkdir()


def first_chunk(metadata: Any, name: str = COEFFICIENT) -> Any:
    return metadata.state_dict_metadata[name].chunks[0]


def place_of(metadata: Any, name: str) -> MetadataIndex:
    return next(index for index in metadata.storage_data if index.fqn == name)


def elsewhere(metadata: Any) -> None:
    index = place_of(metadata, COEFFICIENT)
    metadata.storage_data[index] = _StorageInfo("../../../etc/passwd", 0, 1)


def flipped(folder: Path) -> None:
    """The bytes of the arguments are noise."""
    metadata = pickle.loads((folder / "iter_0000004" / ".metadata").read_bytes())
    place = metadata.storage_data[place_of(metadata, COMMON)]
    with open(folder / "iter_0000004" / place.relative_path, "r+b") as file:
        file.seek(place.offset)
        file.write(os.urandom(place.length))


def arguments(**changes: Any) -> Callable[[Path], None]:
    """Other arguments, in the file in which Megatron through 0.18 keeps them."""

    def damage(folder: Path) -> None:
        stored = open_checkpoint(folder, name="c").args
        torch.save({"args": argparse.Namespace(**vars(stored) | changes)}, folder / I4 / "common.pt")

    return damage


I4 = "iter_0000004"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tracker empty": (write(LATEST, b""), f"{LATEST} says ''"),
    "tracker garbage": (write(LATEST, b"\xff\x00four\nlines\n"), f"{LATEST} says"),
    "tracker negative": (write(LATEST, b"-4"), f"{LATEST} says '-4'"),
    "tracker of another iteration": (write(LATEST, b"7"), "there is no iteration 7; it holds: iter_0000004"),
    "tracker gone": (move(LATEST), f"no {LATEST} there"),
    "tracker is a folder": (tracker_is_a_folder, f"no {LATEST} there"),
    "iteration gone": (move(I4), "there is no iteration 4"),
    "iteration empty": (lambda f: (shutil.rmtree(f / I4), (f / I4).mkdir()), "metadata.json is missing"),
    "data file cut": (cut(f"{I4}/__0_0.distcp"), "__0_0.distcp is cut off"),
    "data file gone": (move(f"{I4}/__1_0.distcp"), "__1_0.distcp is missing"),
    "table cut": (cut(f"{I4}/.metadata"), ".metadata cannot be read"),
    "table empty": (write(f"{I4}/.metadata", b""), ".metadata cannot be read"),
    "table gone": (move(f"{I4}/.metadata"), ".metadata is missing"),
    "table of text": (write(f"{I4}/.metadata", b"hello"), ".metadata cannot be read"),
    "table of another kind": (write(f"{I4}/.metadata", pickle.dumps({})), "is expected, not dict"),
    "entries are no dictionary": (
        table(lambda m: setattr(m, "state_dict_metadata", [1])),
        "it is no table of contents",
    ),
    "no places": (table(lambda m: setattr(m, "storage_data", None)), "it is no table of contents"),
    "entry of another kind": (
        table(lambda m: m.state_dict_metadata.update(x=3)),
        "it is no table of contents: 'x' is a int",
    ),
    "place of another kind": (
        table(lambda m: m.storage_data.update({place_of(m, COEFFICIENT): "here"})),
        "it is no table of contents",
    ),
    "data outside of the folder": (table(elsewhere), "'../../../etc/passwd', outside of the checkpoint"),
    "part larger than the tensor": (
        table(lambda m: setattr(first_chunk(m), "sizes", torch.Size((9, 9, 9, 9)))),
        f"a part of {COEFFICIENT} lies outside of it",
    ),
    "part at a negative place": (
        table(lambda m: setattr(first_chunk(m), "offsets", torch.Size((0, 0, 0, -1)))),
        f"a part of {COEFFICIENT} lies outside of it",
    ),
    "coefficients gone": (table(lambda m: m.state_dict_metadata.pop(COEFFICIENT)), "has no decoder"),
    "coefficients of one layer gone": (
        table(lambda m: m.state_dict_metadata[COEFFICIENT].chunks.pop(2)),
        f"only a part of {COEFFICIENT}",
    ),
    "format file gone": (move(f"{I4}/metadata.json"), "metadata.json is missing"),
    "format file empty": (write(f"{I4}/metadata.json", b""), "metadata.json cannot be read"),
    "format file deep": (write(f"{I4}/metadata.json", b"[" * 100_000), "metadata.json cannot be read"),
    "format file of another kind": (write(f"{I4}/metadata.json", b"[]"), "metadata.json cannot be read"),
    "another format": (write(f"{I4}/metadata.json", b'{"sharded_backend": "zarr"}'), "its format is zarr"),
    "an argument of another kind": (
        arguments(seq_length="long"),
        f"the arguments in {{}}/{I4} cannot be read (seq_length is 'long')",
    ),
    "an argument below zero": (arguments(padded_vocab_size=-1), "cannot be read (padded_vocab_size is -1)"),
    "a base of another kind": (arguments(rotary_base="10k"), "cannot be read (rotary_base is '10k')"),
    "arguments are no namespace": (
        lambda folder: torch.save({"args": {}}, folder / I4 / "common.pt"),
        "cannot be read (TypeError: they are a dict)",
    ),
    "no arguments": (lambda folder: torch.save({}, folder / I4 / "common.pt"), "stores no arguments"),
    "arguments are a list": (
        lambda folder: torch.save([1], folder / I4 / "common.pt"),
        f"the arguments in {{}}/{I4} cannot be read",
    ),
    "arguments are noise": (flipped, f"the arguments in {{}}/{I4} cannot be read"),
}


@pytest.fixture
def run(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Run a command on the checkpoint ``c`` in the test's folder; the line of its refusal."""
    monkeypatch.setattr(launching, "_launch", lambda *_: pytest.fail("a process was started"))

    def run(command: str) -> str:
        words = COMMANDS[command].format(c=tmp_path / "c", d=text).split()
        with pytest.raises(SystemExit) as stop:
            main(*words)
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.count("\n") == 1 and error.startswith("megatron-fope: error: "), error
        assert not (tmp_path / "c-new").exists()
        return error

    return run


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(name: str, tmp_path: Path, run: Callable[[str], str]) -> None:
    SyntheticCheckpoint(tmp_path / "c", fope=FoPEConfig.from_profile(train_length=64), **RUN)
    damage, part = DAMAGES[name]
    damage(tmp_path / "c")
    for command in COMMANDS:
        assert part.format(tmp_path / "c") in run(command), command


class Hostile:
    """A checkpoint with code in one of its pickles."""

    def __init__(self, folder: Path, code: Code, *, old: bool = False) -> None:
        fope = FoPEConfig.from_profile(train_length=64)
        self.made = SyntheticCheckpoint(folder, fope=fope, old=old, **RUN)
        self.code = code

    def add_entry(self, name: str, data: bytes) -> None:
        """An entry that is no tensor, in a data file of its own."""
        (self.made.path / "__7_0.distcp").write_bytes(data)

        def change(metadata: Any) -> None:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name, None)] = _StorageInfo("__7_0.distcp", 0, len(data))

        table(change)(self.made.folder)

    def arguments(self) -> Any:
        changed = copy.copy(self.made.args)
        changed.more = self.code
        return changed


def saved(value: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def in_extra_state(hostile: Hostile, pickled: bytes) -> None:
    name = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4"
    hostile.add_entry(name, saved([torch.frombuffer(bytearray(pickled), dtype=torch.uint8)]))


PLACES: dict[str, Callable[[Hostile], object]] = {
    "table": lambda h: (h.made.path / ".metadata").write_bytes(pickle.dumps(h.code)),
    "table, beside what belongs there": lambda h: table(lambda m: setattr(m, "planner_data", h.code))(
        h.made.folder
    ),
    "common.pt": lambda h: torch.save({"args": h.arguments()}, h.made.path / "common.pt"),
    "arguments in the table": lambda h: h.add_entry(COMMON, saved([{"args": h.arguments()}])),
    "entry": lambda h: h.add_entry("rng_state/shard_0_1", saved([h.code])),
    "entry of the model": lambda h: h.add_entry("decoder.x._extra_state/shard_0_4", saved(h.code)),
    "entry without a zip archive": lambda h: h.add_entry(
        "x/shard_0_1", saved([h.code], _use_new_zipfile_serialization=False)
    ),
    "entry with a new pickle": lambda h: h.add_entry("x/shard_0_1", saved([h.code], pickle_protocol=4)),
    "bare pickle": lambda h: h.add_entry("x/shard_0_1", pickle.dumps(h.code)),
    "extra state of a layer": lambda h: in_extra_state(h, pickle.dumps({"recipe": h.code})),
    "extra state, saved": lambda h: in_extra_state(h, saved({"recipe": h.code})),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_checkpoint(place: str, tmp_path: Path, run: Callable[[str], str]) -> None:
    """Evaluations refuse it, naming the class; the others refuse it or do not look there."""
    hostile = Hostile(tmp_path / "c", Code(tmp_path / "code ran"))
    PLACES[place](hostile)
    for command in EVALUATIONS:
        assert "posix.mkdir" in run(command)
    if "table" in place or place == "common.pt":
        for command in COMMANDS:
            assert "posix.mkdir" in run(command)
    else:
        assert main("inspect", tmp_path / "c") == 0
    assert not (tmp_path / "code ran").exists()


@pytest.mark.parametrize("where", ["arguments", "extra state", "another rank"])
def test_code_in_the_legacy_format(where: str, tmp_path: Path, run: Callable[[str], str]) -> None:
    made = SyntheticCheckpoint(tmp_path / "made", **RUN | {"tensor_model_parallel_size": 2})
    made.args.ckpt_format = "torch"
    folder = tmp_path / "c" / I4
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / LATEST).write_text("4")
    code = Code(tmp_path / "code ran")
    for rank in range(2):
        state: dict[str, Any] = {"args": made.args, "model": {}}
        if where == "arguments":
            state["more"] = code
        elif where == "extra state":
            data = bytearray(pickle.dumps(code))
            state["model"]["a._extra_state"] = torch.frombuffer(data, dtype=torch.uint8)
        elif rank == 1:
            state["optimizer"] = code
        (folder / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save(state, folder / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    for command in EVALUATIONS:
        assert "posix.mkdir" in run(command)
    if where == "arguments":
        assert "posix.mkdir" in run("inspect")
    assert not (tmp_path / "code ran").exists()


def test_a_file_of_a_rank_is_missing(tmp_path: Path, run: Callable[[str], str]) -> None:
    made = SyntheticCheckpoint(tmp_path / "made", **RUN | {"tensor_model_parallel_size": 2})
    made.args.ckpt_format = "torch"
    (tmp_path / "c" / I4 / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "c" / LATEST).write_text("4")
    torch.save({"args": made.args}, tmp_path / "c" / I4 / "mp_rank_00" / "model_optim_rng.pt")
    for command in EVALUATIONS:
        assert "mp_rank_01/model_optim_rng.pt is missing" in run(command)


def test_what_transformer_engine_stores_is_let_through(tmp_path: Path) -> None:
    """Scales of FP8 as its layers pickle them, and what Megatron's own checkpoints hold."""
    hostile = Hostile(tmp_path / "c", Code(tmp_path / "code ran"))
    in_extra_state(hostile, pickle.dumps({"scale_fwd": torch.ones(3), "extra": {"fp8": True, "n": [1.0]}}))
    open_checkpoint(tmp_path / "c", name="c").check_classes("c")


def test_part_of_a_tensor(tmp_path: Path) -> None:
    """Never the memory that happens to be there."""
    made = SyntheticCheckpoint(tmp_path / "c", fope=FoPEConfig.from_profile(train_length=64))
    name = "embedding.word_embeddings.weight"
    table(lambda m: m.storage_data.pop(place_of(m, name)))(made.folder)
    with pytest.raises(UserError, match=f"has only a part of {name}"):
        open_checkpoint(made.folder, name="c").read_tensor(name)
