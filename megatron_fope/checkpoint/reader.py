"""A checkpoint as files: its table of contents, its arguments, and single tensors out of it."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fope.arguments.megatron import train_length_of
from megatron_fope.checkpoint import inert
from megatron_fope.checkpoint.files import (
    describe_error,
    find_problem,
    is_coefficient,
    is_legacy,
    iteration_folder,
    newer_than,
    tracked_iteration,
)
from megatron_fope.checkpoint.metadata import read_metadata
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import quiet_imports

COMMON_FILE = "common.pt"
"""Where Megatron through 0.18 keeps what is no tensor, the arguments among it."""

COMMON_ENTRY = "common_state/shard_0_1"
"""Entry of the table of contents that replaced the file in 0.19: a list with the same dictionary."""

_NUMBERS = (
    "seq_length",
    "fope_train_length",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "vocab_size",
    "padded_vocab_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
"""Arguments that are positive whole numbers where they are there."""

_NUMPY = ("numpy.core.multiarray.", "numpy._core.multiarray.")

_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")


@dataclass
class Checkpoint:
    """One iteration of a folder made by ``--save``; nothing is ever written there."""

    folder: Path
    iteration: int | str
    """Number, or "release"."""
    path: Path
    """The folder of the iteration."""
    metadata: Any
    """Table of contents (``torch.distributed.checkpoint`` ``Metadata``); None in the legacy format."""
    common: dict[str, Any]
    """What is no tensor, by Megatron's names; see :mod:`megatron_fope.checkpoint.inert`."""

    @property
    def args(self) -> Any:
        """Megatron's arguments as stored (``argparse.Namespace``)."""
        return self.common["args"]

    @property
    def position_embedding_type(self) -> str:
        return getattr(self.args, "position_embedding_type", "learned_absolute")

    @property
    def train_length(self) -> int:
        """See :func:`train_length_of`."""
        return train_length_of(self.args)

    @property
    def format(self) -> str:
        """Megatron's ``--ckpt-format``: "torch_dist", or "torch" (legacy)."""
        return "torch" if self.metadata is None else "torch_dist"

    @property
    def tensors(self) -> dict[str, Any]:
        """Every tensor's ``TensorStorageMetadata`` (size, dtype, chunks) by name."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        entries = {} if self.metadata is None else self.metadata.state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    @property
    def coefficients(self) -> dict[str, Any]:
        """Those of :attr:`tensors` that are Fourier coefficients, without the optimizer's."""
        return {k: v for k, v in self.tensors.items() if is_coefficient(k) and not is_optimizer(k)}

    @property
    def has_optimizer(self) -> bool:
        """Whether optimizer states are stored; in the legacy format, whether they were to be saved."""
        if self.metadata is None:
            return not getattr(self.args, "no_save_optim", False)
        return any(map(is_optimizer, self.metadata.state_dict_metadata))

    @property
    def common_in_table(self) -> bool:
        """Whether the arguments are an entry of the table of contents and not a file."""
        return not (self.path / COMMON_FILE).exists()

    def read_tensor(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor on the CPU; its parts are put together.

        Args:
            name: one of :attr:`tensors`.
            index: in the leading dimensions, for example a layer of stacked ones; nothing else is read.

        Raises:
            UserError: a part is missing or cannot be read, because its file is damaged.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        entry, leading = self.metadata.state_dict_metadata[name], len(index)
        value = torch.empty(entry.size[leading:], dtype=entry.properties.dtype)
        count = 0
        for chunk in entry.chunks:
            inside = tuple(i - o for i, o in zip(index, chunk.offsets, strict=False))
            if not all(0 <= i < n for i, n in zip(inside, chunk.sizes, strict=False)):
                continue
            place = self.metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                continue
            try:
                part = inert.load(_read_range(self.path, place))
                if part.shape != chunk.sizes or part.dtype != value.dtype:
                    raise ValueError(f"{list(part.shape)} {part.dtype} is not what the table says")
            except Exception as error:
                file = self.path / place.relative_path
                raise UserError(f"{file}: {name} cannot be read ({describe_error(error)})") from None
            part = part[inside]
            bounds = zip(chunk.offsets[leading:], chunk.sizes[leading:], strict=True)
            value[tuple(slice(o, o + n) for o, n in bounds)] = part
            count += part.numel()
        if count < value.numel():
            raise UserError(f"{self.path} has only a part of {name}")
        return value

    def check_classes(self, name: str) -> None:
        """Refuse a checkpoint of which Megatron, when it loads the model, would unpickle anything but data.

        Looks into every pickle there is: arguments, what else is no tensor, and in it the extra states of
        Transformer Engine's layers. Nothing of it runs. Megatron must be installed, whose list of classes
        counts.

        Args:
            name: how messages name the folder.

        Raises:
            UserError: naming the class.
        """
        with quiet_imports():
            from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        for where, file in self._pickles():
            try:
                for foreign in inert.foreign_classes(file):
                    if not foreign.startswith(_NUMPY):  # random states of another numpy, which are not loaded
                        raise pickle.UnpicklingError(f"{foreign} has no place in a checkpoint")
                if "_extra_state" in where:
                    inert.check_extra_state(inert.load(file))
                elif self.metadata is None:
                    inert.check_extra_state(_legacy_extra_states(inert.load(file, mapped=True)))
            except Exception as error:
                reason = describe_error(error)
                asked = [
                    c for c in inert.asked_classes(file) if c not in reason and not c.startswith("torch.")
                ]
                raise UserError(
                    f"{name} is {str(self.folder)!r}: {where} is refused, and nothing of it was run ({reason}"
                    + (f"; it asks for {asked[0]})" if asked else ")")
                ) from None

    def _pickles(self) -> Iterator[tuple[str, Any]]:
        """Everything that is no tensor: a name for messages, and a path or stream."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        if self.metadata is None:
            yield from (
                (str(file), str(file)) for file in sorted(self.path.glob("mp_rank_*/model_optim_rng.pt"))
            )
            return
        if (self.path / COMMON_FILE).exists():
            yield str(self.path / COMMON_FILE), str(self.path / COMMON_FILE)
        for index, place in self.metadata.storage_data.items():
            if isinstance(self.metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                yield f"{index.fqn} in {self.path / place.relative_path}", _read_range(self.path, place)


def open_checkpoint(folder: str | Path, iteration: int | str | None = None, *, name: str) -> Checkpoint:
    """Open a checkpoint and check that its files are whole.

    Of the data files only sizes are looked at, except for the bytes that hold the arguments.

    Args:
        folder: made by Megatron's ``--save``.
        iteration: number or "release"; None: the latest.
        name: how messages name the folder, for example "SOURCE".

    Raises:
        UserError: no checkpoint, a damaged one, or one without arguments.
    """
    folder = Path(folder)

    def refuse(reason: str) -> UserError:
        return UserError(f"{name} is {str(folder)!r}: {reason}")

    if not folder.is_dir():
        raise refuse("no such folder; use a folder made by --save")
    if iteration is None:
        iteration = _latest(folder, refuse)
    path = folder / iteration_folder(iteration)
    if not path.is_dir():
        there = ", ".join(newer_than(folder, -1)) or "nothing that Megatron saved"
        raise refuse(f"there is no iteration {iteration}; it holds: {there}")
    if problem := find_problem(path):
        raise refuse(problem)
    metadata = None
    if not is_legacy(folder, iteration):
        try:
            backend = json.loads((path / "metadata.json").read_text())["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise refuse(f"{path / 'metadata.json'} cannot be read ({describe_error(error)})") from None
        if backend != "torch_dist":
            raise refuse(f"its format is {backend}; allowed: torch_dist")
        metadata = read_metadata(path)
    checkpoint = Checkpoint(folder, iteration, path, metadata, _read_common(path, metadata, refuse))
    if metadata is None:
        return checkpoint
    if missing := _missing_coefficient(checkpoint):
        raise refuse(f"{path} has no {missing}")
    return checkpoint


def is_optimizer(name: str) -> bool:
    """Whether an entry belongs to the optimizer's states."""
    return _OPTIMIZER.search(name) is not None


def _latest(folder: Path, refuse: Any) -> int | str:
    if re.fullmatch(r"iter_\d+|release", folder.name) and not newer_than(folder, -1):
        raise refuse("this is one iteration; give the folder above it")
    try:
        latest = tracked_iteration(folder)
    except UserError as error:
        raise refuse(str(error)) from None
    if latest is None:
        raise refuse("no latest_checkpointed_iteration.txt there; use a folder made by --save")
    return latest


def _missing_coefficient(checkpoint: Checkpoint) -> str | None:
    """The name of a coefficient that some layer lacks; what all layers of a kind have, every one must."""
    if checkpoint.position_embedding_type != "fope":
        return None
    stored = getattr(checkpoint.args, "fope_separate_basis", None)
    leaves = ("fourier_coef",) if stored is False else ("sin_coef", "cos_coef")
    names = checkpoint.coefficients.keys()
    layers = {name.rpartition(".")[0] for name in names} or {"...fope"}
    return next(
        (f"{x}.{leaf}" for x in sorted(layers) for leaf in leaves if f"{x}.{leaf}" not in names), None
    )


def _legacy_extra_states(state: dict[str, Any]) -> list[Any]:
    """Of the model on one rank, in one part or one for every virtual stage."""
    parts = [value for key, value in state.items() if key.startswith("model") and isinstance(value, dict)]
    return [value for part in parts for key, value in part.items() if "_extra_state" in key]


def _read_common(path: Path, metadata: Any, refuse: Any) -> dict[str, Any]:
    """What is no tensor; in the legacy format also the first rank's model."""
    file = path / COMMON_FILE
    legacy = sorted(path.glob("mp_rank_00*/model_optim_rng.pt")) if metadata is None else []
    if metadata is None and not legacy:
        raise refuse(f"{path} has no file of the first rank")
    where = legacy[0] if legacy else path
    try:
        if legacy:
            state = inert.load(str(where), mapped=True)
            common = {"args": state.get("args"), "model": state.get("model", {})}
        elif file.exists():
            common = inert.load(str(file))
        else:
            parts = [s for index, s in metadata.storage_data.items() if index.fqn == COMMON_ENTRY]
            common = inert.load(_read_range(path, parts[0]))[0] if parts else {}
        stored = common.get("args")
        if stored is not None and not isinstance(stored, argparse.Namespace):
            raise TypeError(f"they are a {type(stored).__name__}")
    except Exception as error:
        raise refuse(f"the arguments in {where} cannot be read ({describe_error(error)})") from None
    if getattr(stored, "seq_length", None) is None:
        raise refuse(f"{where} stores no arguments; use a checkpoint saved by Megatron's training")
    # Arguments that are there, but of another kind than Megatron's.
    kinds: dict[str, Any] = dict.fromkeys(_NUMBERS, int)
    kinds |= {"rotary_base": (int, float), "position_embedding_type": str}
    for name, kind in kinds.items():
        value = getattr(stored, name, None)
        if value is not None and (not isinstance(value, kind) or (kind is not str and value <= 0)):
            raise refuse(f"the arguments in {where} cannot be read ({name} is {value!r})")
    return common


def _read_range(path: Path, storage: Any) -> io.BytesIO:
    """The bytes of one entry; nothing else of the file is read."""
    if getattr(storage, "transform_descriptors", None):
        raise ValueError(f"entries of {storage.relative_path} are compressed or encrypted")
    with open(path / storage.relative_path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), storage.length, storage.offset)
    return io.BytesIO(data)
