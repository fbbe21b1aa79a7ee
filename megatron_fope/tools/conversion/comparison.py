"""How two checkpoints of one model differ."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_fope.checkpoint.reader import COMMON_ENTRY, Checkpoint, open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.tools.conversion.inspection import shape_and_type

_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_experts",
    "padded_vocab_size",
    "multi_latent_attention",
)
"""Arguments that make another model."""

NOT_SET = "not set"


@dataclass
class Comparison:
    """What :func:`diff` found. Numbers are compared of coefficients only."""

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Arguments and the iteration, first and second value; :data:`NOT_SET` where one side has none."""
    only_first: list[str] = field(default_factory=list)
    """Names of entries that only the first one has."""
    only_second: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Tensors of other shapes or types: both as text."""
    coefficients: dict[str, float] = field(default_factory=dict)
    """Largest absolute difference of coefficients that differ."""
    same_file: int = 0
    """Entries whose data is the same bytes of the same file."""
    not_compared: int = 0
    """Entries of the same shape and type in different files."""

    @property
    def different(self) -> bool:
        """Whether anything differs that was compared."""
        return bool(self.settings or self.only_first or self.only_second or self.tensors or self.coefficients)

    def __str__(self) -> str:
        lines = [f"{name}: {a!r} -> {b!r}" for name, (a, b) in self.settings.items()]
        lines += [f"only in A: {name}" for name in self.only_first]
        lines += [f"only in B: {name}" for name in self.only_second]
        lines += [f"{name}: {a} -> {b}" for name, (a, b) in self.tensors.items()]
        lines += [f"{name}: differs by up to {value:.3g}" for name, value in self.coefficients.items()]
        lines.append(f"{self.same_file} entries are in the same file in A and B")
        if self.not_compared:
            lines.append(
                f"{self.not_compared} entries are alike; their data, in different files, is not compared"
            )
        return "\n".join(lines)


def diff(
    first: str | Path,
    second: str | Path,
    *,
    iterations: tuple[int | str | None, int | str | None] = (None, None),
) -> Comparison:
    """Compare the settings, tables of contents and coefficients of two ``torch_dist`` checkpoints.

    Args:
        first: folder made by Megatron's ``--save``.
        second: another one, or the same with another iteration.
        iterations: of the first and the second; None: the latest.

    Raises:
        UserError: no checkpoint, a damaged one, or checkpoints of different models.
    """
    a = open_checkpoint(first, iterations[0], name="A")
    b = open_checkpoint(second, iterations[1], name="B")
    for name, checkpoint in (("A", a), ("B", b)):
        if checkpoint.metadata is None:
            raise UserError(
                f"{name} is {str(checkpoint.folder)!r} with the legacy format torch; requires torch_dist"
            )
    _check_same_model(a, b)
    comparison = Comparison()
    if a.iteration != b.iteration:
        comparison.settings["iteration"] = (a.iteration, b.iteration)
    mine, theirs = vars(a.args), vars(b.args)
    for name in sorted({*mine, *theirs}):
        values = mine.get(name, NOT_SET), theirs.get(name, NOT_SET)
        if values[0] != values[1]:
            comparison.settings[name] = values
    _compare_entries(a, b, comparison)
    return comparison


def _check_same_model(a: Checkpoint, b: Checkpoint) -> None:
    for name in _SHAPE:
        mine, theirs = getattr(a.args, name, None), getattr(b.args, name, None)
        if mine != theirs:
            raise UserError(
                f"B {str(b.folder)!r} is a checkpoint of another model: {name} is {theirs}, in A {mine}"
            )


def _compare_entries(a: Checkpoint, b: Checkpoint, comparison: Comparison) -> None:
    mine, theirs = a.metadata.state_dict_metadata, b.metadata.state_dict_metadata
    comparison.only_first = sorted(mine.keys() - theirs.keys() - {COMMON_ENTRY})
    comparison.only_second = sorted(theirs.keys() - mine.keys() - {COMMON_ENTRY})
    places_a, places_b = _places(a), _places(b)
    tensors_a, tensors_b, coefficients = a.tensors, b.tensors, a.coefficients
    for name in sorted(mine.keys() & theirs.keys() - {COMMON_ENTRY}):
        if name in tensors_a and name in tensors_b:
            kinds = shape_and_type(tensors_a[name]), shape_and_type(tensors_b[name])
            if kinds[0] != kinds[1]:
                first, second = (f"{shape} {dtype}" for shape, dtype in kinds)
                comparison.tensors[name] = (first, second)
                continue
        if places_a[name] == places_b[name]:
            comparison.same_file += 1
        elif name in coefficients:
            x, y = a.read_tensor(name), b.read_tensor(name)
            if not torch.equal(x, y):
                comparison.coefficients[name] = (x - y).abs().max().item()
        else:
            comparison.not_compared += 1


def _places(checkpoint: Checkpoint) -> dict[str, set[tuple[int, ...]]]:
    """Where every entry's data is: device, inode, offset, length of its pieces."""
    places: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    files: dict[str, os.stat_result] = {}
    for index, storage in checkpoint.metadata.storage_data.items():
        file = files.get(storage.relative_path)
        if file is None:
            file = files[storage.relative_path] = os.stat(checkpoint.path / storage.relative_path)
        places[index.fqn].add((file.st_dev, file.st_ino, storage.offset, storage.length))
    return places
