"""What a checkpoint holds."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.arguments.flags import FOPE
from megatron_fope.checkpoint.files import is_coefficient, newer_than
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer, open_checkpoint
from megatron_fope.layers import anneal

_FOPE = (
    "train_length",
    "profile",
    "scaling",
    "kept_frequencies",
    "clipped_frequencies",
    "series",
    "learnable",
)
"""FoPE's settings that are shown."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found; None where a checkpoint does not say."""

    folder: str
    iteration: int | str
    iterations: list[str]
    """Folders of all iterations, also of saves that did not finish."""
    format: str
    """"torch_dist", or "torch" (legacy)."""
    megatron: str | None
    """What the layout of the files tells of the Megatron that saved it, which does not store its version."""
    position_embedding_type: str
    seq_length: int
    """Tokens."""
    train_length: int | None
    """FoPE's train length in tokens."""
    profile: str | None
    rotary_base: float | None
    scaling: str | None
    kept_frequencies: int | None
    clipped_frequencies: int | None
    series: int | None
    """Channel pairs with a Fourier series."""
    learnable: bool | None
    anneal: tuple[int, int] | None
    """Iterations of a function-preserving start from RoPE: done, and all; see
    :mod:`megatron_fope.layers.anneal`."""
    coefficients: dict[str, dict[str, Any]]
    """``{name: {"shape": [...], "dtype": "float32"}}``."""
    parameters: int | None
    """Numbers in the model's tensors, with the vocabulary's padding and without coefficients; None in the
    legacy format, whose files are bound to ranks."""
    dtypes: dict[str, int]
    """How many of them by type."""
    optimizer: bool
    files: int
    apparent_bytes: int
    """Sum of the sizes of the iteration's files."""
    linked_files: int
    """How many of them are symbolic links, or have another name elsewhere."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        base = "" if self.rotary_base is None else f", rotary base {self.rotary_base:g}"
        lines = [
            f"{self.folder}, iteration {self.iteration} (there: {', '.join(self.iterations) or 'no others'})",
            f"format               {self.format}" + (f", Megatron {self.megatron}" if self.megatron else ""),
            f"position embedding   {self.position_embedding_type}{base}",
            f"sequence length      {self.seq_length} tokens",
        ]
        if self.position_embedding_type == FOPE:
            lines += [
                f"FoPE                 profile {self.profile}, train length {self.train_length} tokens, "
                f"scaling {self.scaling}, {'learnable' if self.learnable else 'frozen'}",
                f"frequencies          {self.kept_frequencies} kept, {self.clipped_frequencies} clipped, "
                f"{self.series} channel pairs with a series",
            ]
        if self.anneal is not None:
            lines.append(f"start from RoPE      {self.anneal[0]} of {self.anneal[1]} iterations annealed")
        for name, entry in self.coefficients.items():
            lines.append(f"coefficients         {name} {entry['shape']} {entry['dtype']}")
        if self.parameters is not None:
            types = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            lines.append(f"parameters           {self.parameters} ({types})")
        lines.append(f"optimizer states     {'yes' if self.optimizer else 'no'}")
        lines.append(
            f"files                {self.files} with {self.apparent_bytes} bytes, {self.linked_files} linked"
        )
        return "\n".join(lines)


def inspect(folder: str | Path, *, iteration: int | str | None = None) -> Inspection:
    """Read what a checkpoint holds, from its tables, arguments and file sizes.

    Args:
        folder: made by Megatron's ``--save``, ``torch_dist`` or legacy format.
        iteration: number or "release"; None: the latest.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    checkpoint = open_checkpoint(folder, iteration, name="FOLDER")
    args = checkpoint.args
    fope = checkpoint.position_embedding_type == FOPE
    files = [file for file in checkpoint.path.rglob("*") if file.is_file()]
    dtypes = _numbers_by_type(checkpoint)
    megatron = None
    if checkpoint.metadata is not None:
        megatron = "0.19 or later" if checkpoint.common_in_table else "through 0.18"
    return Inspection(
        folder=str(checkpoint.folder),
        iteration=checkpoint.iteration,
        iterations=newer_than(checkpoint.folder, -1),
        format=checkpoint.format,
        megatron=megatron,
        position_embedding_type=checkpoint.position_embedding_type,
        seq_length=args.seq_length,
        rotary_base=getattr(args, "rotary_base", None),
        **{name: getattr(args, f"fope_{name}", None) if fope else None for name in _FOPE},
        anneal=_annealed(checkpoint) if fope else None,
        coefficients=_coefficients(checkpoint),
        parameters=None if checkpoint.metadata is None else sum(dtypes.values()),
        dtypes=dtypes,
        optimizer=checkpoint.has_optimizer,
        files=len(files),
        apparent_bytes=sum(file.stat().st_size for file in files),
        linked_files=sum(file.is_symlink() or file.stat().st_nlink > 1 for file in files),
    )


def shape_and_type(entry: Any) -> tuple[list[int], str]:
    """Shape and type of a tensor's entry in the table of contents."""
    return list(entry.size), str(entry.properties.dtype).removeprefix("torch.")


def _coefficients(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    if checkpoint.metadata is None:  # those of the first rank, which are the whole model's without pipelines
        return {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in checkpoint.common["model"].items()
            if is_coefficient(name)
        }
    entries = {name: shape_and_type(entry) for name, entry in checkpoint.coefficients.items()}
    return {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in entries.items()}


def _annealed(checkpoint: Checkpoint) -> tuple[int, int] | None:
    iterations = getattr(checkpoint.args, "fope_anneal_iters", None)
    if not iterations:
        return None
    now = checkpoint.iteration if isinstance(checkpoint.iteration, int) else 0
    return anneal.annealed_iterations(checkpoint.args, now), iterations


def _numbers_by_type(checkpoint: Checkpoint) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, entry in checkpoint.tensors.items():
        if not is_optimizer(name) and not is_coefficient(name):
            shape, dtype = shape_and_type(entry)
            counts[dtype] += math.prod(shape)
    return dict(counts.most_common())
