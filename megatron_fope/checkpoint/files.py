"""Reading what a Megatron checkpoint says about itself, without building a model."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fope.checkpoint.metadata import METADATA, read_metadata
from megatron_fope.common.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
_COEFFICIENT = re.compile(r"\.fope\.(sin|cos|fourier)_coef$")


def read_legacy_args(folder: str | Path, step: int | str) -> Any | None:
    """The arguments that rank 0 stored with one iteration in the legacy format, or None if it stored none."""
    from megatron_fope.checkpoint import inert  # imports torch

    file = min((Path(folder) / iteration_folder(step)).glob("mp_rank_00*/model_optim_rng.pt"))
    return inert.load(str(file), mapped=True).get("args")


def tracked_iteration(folder: str | Path) -> int | str | None:
    """What the tracker file in a folder given to ``--save`` names: an iteration, "release", or nothing.

    Raises:
        UserError: the file says something else, for example nothing after an interrupted save.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file():
        return None
    try:
        word = tracker.read_text(errors="replace").strip()
    except OSError as error:
        raise UserError(f"{tracker} cannot be read ({error.strerror or error})") from None
    if word == "release":
        return word
    if word.isdecimal():
        return int(word)
    whole = _whole_iterations(Path(folder))
    there = f" (complete iterations: {whole})" if whole else ""
    raise UserError(f"{tracker} says {word[:40]!r}; allowed: the number of an iteration{there} or 'release'")


def newer_than(folder: str | Path, iteration: int) -> list[str]:
    """Names of the iterations in a folder that come after one, oldest first."""
    return [name for number, name in _iterations(Path(folder)) if number > iteration]


def find_damage(folder: str | Path, step: int | str, *, expected: Iterable[str] = ()) -> str | None:
    """What is wrong with the files of one iteration of a checkpoint.

    Everything but the metadata is judged by file sizes and tables of contents, so this is quick also for
    checkpoints of terabytes; numbers that changed in place are not noticed.

    Args:
        folder: a remote one is not looked at.
        step: number of the iteration, or "release".
        expected: names of tensors that must be there.

    Returns:
        One line that names the file and what can be done, or None if the files look whole.
    """
    if "://" in str(folder):
        return None
    iteration = Path(folder) / iteration_folder(step)
    problem = find_problem(iteration, expected)
    return None if problem is None else f"{problem}; {_way_out(iteration)}"


def find_problem(iteration: Path, expected: Iterable[str] = ()) -> str | None:
    """Like :func:`find_damage`, for the folder of one iteration and without what can be done."""
    if not iteration.is_dir():
        return f"{iteration} does not exist"
    legacy = sorted(iteration.glob("mp_rank_*/*.pt"))
    for file in [*legacy, iteration / "common.pt"]:
        # What torch.save writes is a zip archive, whose table of contents is its end.
        if file.exists() and not zipfile.is_zipfile(file):
            return f"{file} is damaged ({file.stat().st_size} bytes without an end)"
    if legacy:
        return None
    for name in ("metadata.json", METADATA):
        if not (iteration / name).exists():
            return f"{iteration / name} is missing: a save that did not finish, or files were deleted"
    try:
        metadata = read_metadata(iteration)
    except Exception as error:
        return f"{iteration / METADATA} cannot be read ({describe_error(error)})"
    return _problem_of_data(iteration, metadata) or _problem_of_coefficients(iteration, metadata, expected)


def is_legacy(folder: str | Path, step: int | str) -> bool:
    """Whether one iteration has the format of ``--ckpt-format torch``: files by rank, bound to a layout."""
    return any((Path(folder) / iteration_folder(step)).glob("mp_rank_*"))


def find_missing_legacy_file(folder: str | Path, step: int | str, tensor: int, pipeline: int) -> str | None:
    """Like :func:`find_damage`, for the files that the ranks of a layout read in the legacy format."""
    iteration = Path(folder) / iteration_folder(step)
    stages = [f"_{stage:03d}" for stage in range(pipeline)] if pipeline > 1 else [""]
    for rank in range(tensor):
        for stage in stages:
            name = f"mp_rank_{rank:02d}{stage}"
            # Expert-parallel ranks add another number to the name.
            if not any(iteration.glob(f"{name}*/model_optim_rng.pt")):
                return f"{iteration / name / 'model_optim_rng.pt'} is missing; {_way_out(iteration)}"
    return None


def load_errors() -> tuple[type[BaseException], ...]:
    """What Megatron may raise when it cannot load a checkpoint.

    PyTorch's own exception for it is no ``Exception``, and for the legacy format Megatron prints the error
    and exits with code 0.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    return (Exception, SystemExit, CheckpointException)


def describe_error(error: BaseException) -> str:
    """Class and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _problem_of_data(iteration: Path, metadata: Any) -> str | None:
    needed: dict[str, int] = {}
    for entry in (metadata.storage_data or {}).values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in sorted(needed.items()):
        file = iteration / name
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size < size:
            return f"{file} is cut off: {file.stat().st_size} of {size} bytes"
    return None


def _problem_of_coefficients(iteration: Path, metadata: Any, expected: Iterable[str]) -> str | None:
    entries = metadata.state_dict_metadata
    for name in expected:
        if name not in entries:
            return f"{iteration} has no {name}"
    for name, entry in entries.items():
        if not is_coefficient(name) or "optimizer" in name:
            continue
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        parts = {(index.fqn, tuple(index.offset)) for index in metadata.storage_data if index.fqn == name}
        if stored < math.prod(entry.size) or len(parts) < len(entry.chunks):
            return f"{iteration} has only a part of {name}"
    return None


def is_coefficient(name: str) -> bool:
    """Whether a tensor's name in a checkpoint is that of Fourier coefficients."""
    return _COEFFICIENT.search(name) is not None


def _way_out(iteration: Path) -> str:
    others = _whole_iterations(iteration.parent, without=iteration.name)
    if not others:
        return f"restore it from a copy, {iteration.parent} has no other iteration"
    return f"restore it from a copy, or load another iteration with --ckpt-step: {others}"


def _whole_iterations(folder: Path, without: str = "") -> str:
    """The last iterations that can still be loaded, for messages."""
    numbers = [
        str(number)
        for number, name in _iterations(folder)
        if name != without
        and ((folder / name / "metadata.json").exists() or any((folder / name).glob("mp_rank_*/*.pt")))
    ]
    return ", ".join(numbers[-3:])


def _iterations(folder: Path) -> list[tuple[int, str]]:
    names = [path.name for path in folder.glob("iter_*") if path.is_dir()]
    return sorted((int(name[5:]), name) for name in names if name[5:].isdecimal())


def iteration_folder(step: int | str) -> str:
    """Name of the folder of an iteration, or "release"."""
    return step if isinstance(step, str) else f"iter_{step:07d}"
