"""Writing a checkpoint whose data files come from another one: copied, cloned or linked.

The new folder is built beside its final place and renamed when it is whole, so that at no moment something
half-made has the final name.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from megatron_fope.checkpoint import inert
from megatron_fope.checkpoint.files import TRACKER, find_problem, iteration_folder
from megatron_fope.checkpoint.metadata import METADATA
from megatron_fope.checkpoint.reader import COMMON_ENTRY, COMMON_FILE, Checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_space, new_folder, sync
from megatron_fope.tools.conversion.layers import Part

LINKS = ("copy", "hard", "symbolic")
"""How data files get into the new folder. Only copies, which are clones where the file system can make them,
are safe from whoever writes into the new folder later."""

_FICLONE = 0x40049409
"""Linux's request for a file that shares its blocks with another one until either is written."""

_FILE_SIZE = 5 * 2**30
"""Bytes after which a new checkpoint gets another data file."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_OWN_FILES = {METADATA, COMMON_FILE, "metadata.json"}
"""Files that every checkpoint has for itself."""


@dataclass
class Written:
    """What a new folder consists of."""

    links: str
    """How the data files got there: "copy", "clone" (a copy that shares its blocks until either file is
    written), "hard" or "symbolic"."""
    linked_files: int = 0
    linked_bytes: int = 0
    """Apparent size of the copied or linked files."""
    written_bytes: int = 0
    coefficients: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every tensor that was written, by name."""


def write(
    source: Checkpoint,
    target: Path,
    args: Any,
    removed: Iterable[str],
    parts: Iterable[Part],
    *,
    link: str = "copy",
) -> Written:
    """Write a new checkpoint folder with one iteration.

    Args:
        source: where everything else comes from.
        target: the new folder; must not exist.
        args: the new arguments.
        removed: names of tensors that the new checkpoint does not have.
        parts: tensors that it has in addition, in pieces.
        link: one of :data:`LINKS`.

    Raises:
        UserError: the disk is full, files cannot be linked, or the source changed meanwhile. Nothing is left.
    """
    before = _state_of_files(source)
    with new_folder("TARGET", target) as folder:
        written = _build(source, folder, args, set(removed), parts, link)
        if _state_of_files(source) != before:
            raise UserError(f"SOURCE {str(source.folder)!r} was changed while it was converted; try again")
    return written


def create(target: Path, common: dict[str, Any], parts: Iterable[Part], empty: Iterable[str]) -> None:
    """Write a checkpoint that has no source; its iteration is "release".

    Args:
        target: the new folder; must not exist.
        common: what is no tensor, by Megatron's names.
        parts: every tensor, in pieces.
        empty: names of further entries, which hold nothing.

    Raises:
        UserError: the disk is full. Nothing is left.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    with new_folder("CHECKPOINT", target) as folder:
        path = folder / iteration_folder("release")
        path.mkdir()
        metadata = Metadata(state_dict_metadata={}, storage_data={})
        data = _DataFile(path, metadata)
        for part in parts:
            if data.size > _FILE_SIZE:
                data.close()
                data = _DataFile(path, metadata)
            data.add(part)
        for name in empty:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            data.replace(name, [None])
        data.close()
        _finish("CHECKPOINT", folder, "release", metadata, common, json.dumps(_FORMAT).encode())


def _build(
    source: Checkpoint, folder: Path, args: Any, removed: set[str], parts: Iterable[Part], link: str
) -> Written:
    new = folder / iteration_folder(source.iteration)
    new.mkdir()
    written = _bring_files(source.path, new, link)
    metadata = copy.copy(source.metadata)
    metadata.state_dict_metadata = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if name not in removed
    }
    metadata.storage_data = {
        index: place for index, place in metadata.storage_data.items() if index.fqn not in removed
    }
    # How the source's ranks split their tensors, kept by Megatron for the saves to come: no longer true.
    vars(metadata).pop("all_local_plans", None)
    common = {**source.common, "args": args}
    data = _DataFile(new, metadata)
    for part in parts:
        data.add(part)
    if source.common_in_table:
        data.replace(COMMON_ENTRY, [common])
    written.coefficients = data.tensors
    written.written_bytes += data.close()
    written.written_bytes += _finish(
        "TARGET",
        folder,
        source.iteration,
        metadata,
        None if source.common_in_table else common,
        (source.path / "metadata.json").read_bytes(),
    )
    return written


def _finish(
    name: str, folder: Path, iteration: int | str, metadata: Any, common: dict[str, Any] | None, kind: bytes
) -> int:
    """Write what goes with the data files of an iteration; returns the number of bytes.

    Args:
        name: how messages call the folder.
        folder: the checkpoint's.
        iteration: number or "release".
        metadata: the table of contents.
        common: what is no tensor; None where the table has it.
        kind: of ``metadata.json``.
    """
    path = folder / iteration_folder(iteration)
    size = 0
    if common is not None:
        buffer = io.BytesIO()
        inert.save(common, buffer)
        size += _write(path / COMMON_FILE, buffer.getvalue())
    size += _write(path / METADATA, pickle.dumps(metadata))
    size += _write(path / "metadata.json", kind)
    sync(path)
    if problem := find_problem(path):
        raise UserError(f"{name} would not be whole: {problem}")
    size += _write(folder / TRACKER, str(iteration).encode())
    sync(folder)
    return size


class _DataFile:
    """One new data file of a checkpoint, with its entries in the table of contents."""

    def __init__(self, folder: Path, metadata: Any) -> None:
        number = 0
        while (folder / f"__fope_{number}.distcp").exists():
            number += 1
        self._name = f"__fope_{number}.distcp"
        self._file = open(folder / self._name, "xb")  # noqa: SIM115
        self._metadata = metadata
        self._position = 0
        self.tensors: dict[str, tuple[int, ...]] = {}

    def add(self, part: Part) -> None:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        size, offset = torch.Size(part.size), torch.Size(part.offset)
        entry = self._metadata.state_dict_metadata.setdefault(
            part.name, TensorStorageMetadata(TensorProperties(dtype=part.value.dtype), size, [])
        )
        entry.chunks.append(ChunkStorageMetadata(offset, part.value.shape))
        buffer = io.BytesIO()
        torch.save(part.value.clone(), buffer)  # without the rest of a memory that it may share
        self._store(part.name, offset, buffer)
        self.tensors[part.name] = part.size

    def replace(self, name: str, value: Any) -> None:
        """Replace an entry that is no tensor."""
        buffer = io.BytesIO()
        inert.save(value, buffer)
        self._store(name, None, buffer)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._position

    def close(self) -> int:
        """Write the file to disk; returns its size in bytes."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._position

    def _store(self, name: str, offset: torch.Size | None, buffer: io.BytesIO) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        with buffer.getbuffer() as data:
            self._file.write(data)
            self._metadata.storage_data[MetadataIndex(name, offset)] = _StorageInfo(
                self._name, self._position, data.nbytes
            )
            self._position += data.nbytes


def _bring_files(old: Path, new: Path, link: str) -> Written:
    """Bring every file of an iteration into a new folder, except those that the new one has for itself."""
    written = Written(link)
    files = []
    for folder, folders, names in os.walk(old):
        place = new / os.path.relpath(folder, old)
        for name in folders:
            (place / name).mkdir()
        own = _OWN_FILES if place == new else set()
        files += [((Path(folder) / name).resolve(), place / name) for name in names if name not in own]
    if link == "copy" and files and _clones(*files[0]):
        written.links = "clone"  # they are all on one file system
    if written.links == "copy":
        _check_space(files, new)
    size = sum(file.stat().st_size for file, _ in files)
    hidden = True if link != "copy" else None  # None: where nobody looks at a terminal
    with tqdm(total=size, unit="B", unit_scale=True, desc="copying data files", disable=hidden) as bar:
        for file, place in files:
            _bring(file, place, link)
            bar.update(file.stat().st_size)
    written.linked_files, written.linked_bytes = len(files), size
    return written


def _bring(file: Path, place: Path, link: str) -> None:
    if link == "hard":
        os.link(file, place)
    elif link == "symbolic":
        place.symlink_to(file)
    else:
        with open(file, "rb") as old, open(place, "xb") as copy:
            if not _clone(old, copy):
                _copy_data(old, copy)
            os.fsync(copy.fileno())
        shutil.copystat(file, place)


def _clones(file: Path, place: Path) -> bool:
    """Whether the file system can make one file share the blocks of another."""
    with open(file, "rb") as old, tempfile.TemporaryFile(dir=place.parent) as copy:
        return _clone(old, copy)


def _clone(old: IO[bytes], copy: IO[bytes]) -> bool:
    try:
        fcntl.ioctl(copy.fileno(), _FICLONE, old.fileno())
    except OSError:
        return False  # file systems refuse it with half a dozen errors; copying finds those that matter
    return True


def _copy_data(old: IO[bytes], copy: IO[bytes]) -> None:
    """Copy all but the holes of a file."""
    size, end = os.fstat(old.fileno()).st_size, 0
    os.truncate(copy.fileno(), size)
    while end < size:
        try:
            start = os.lseek(old.fileno(), end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                return
            raise
        end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
        os.lseek(copy.fileno(), start, os.SEEK_SET)
        while start < end:
            count = os.sendfile(copy.fileno(), old.fileno(), start, min(end - start, 1 << 30))
            if not count:
                raise OSError(errno.EIO, "a data file became shorter")
            start += count


def _check_space(files: list[tuple[Path, Path]], folder: Path) -> None:
    check_space(
        "TARGET",
        folder,
        sum(file.stat().st_blocks * 512 for file, _ in files),
        purpose=" for copies of SOURCE's data files",
        advice="use another disk, or --link hard or symbolic, which share the files",
    )


def _write(file: Path, data: bytes) -> int:
    with open(file, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return len(data)


def _state_of_files(source: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change of every file of an iteration."""
    return {
        str(file): (state.st_ino, state.st_size, state.st_mtime_ns)
        for file in source.path.rglob("*")
        for state in [file.stat()]
    }
