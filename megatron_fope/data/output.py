"""Where a dataset is written: under a hidden name first, so that no half-made one ever loads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_fope import staging
from megatron_fope.data.readers import Source
from megatron_fope.errors import UserError

_SUFFIXES = (".json", ".bin", ".idx")
"""What makes up a dataset, in the order of moving into place: nothing loads before the index is there."""


def output_prefixes(output_prefix: str | os.PathLike[str], heldout: bool) -> list[str]:
    """The prefix of every dataset to write.

    Raises:
        UserError: not the name of a file, or one with a suffix.
    """
    prefix = os.fspath(output_prefix)
    if not prefix or prefix.endswith(("/", os.sep)):
        raise UserError(f"--output-prefix: {prefix!r} given; the path needs a file name at its end")
    if prefix.endswith((".bin", ".idx")):
        raise UserError(f"--output-prefix: {prefix!r} given; leave out the suffix, .bin and .idx are added")
    return [f"{prefix}_train", f"{prefix}_heldout"] if heldout else [prefix]


def _outputs(prefixes: Sequence[str]) -> Iterator[Path]:
    return (Path(prefix + suffix) for prefix in prefixes for suffix in _SUFFIXES)


def refuse_existing(prefixes: Sequence[str], overwrite: bool) -> None:
    """Stop before a dataset is replaced.

    Raises:
        UserError: a file of it exists and ``overwrite`` is off.
    """
    for path in _outputs(prefixes):
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"--output-prefix: {path} exists; give another prefix, or --overwrite")


def refuse_output_over_input(prefixes: Sequence[str], sources: Sequence[Source]) -> None:
    """Stop before an input is replaced, even by ``overwrite``.

    Raises:
        UserError: an output is an input.
    """
    read = {os.path.realpath(source.path) for source in sources}
    for path in _outputs(prefixes):
        if os.path.realpath(path) in read:
            raise UserError(f"--output-prefix: {path} would replace an input file; give another prefix")


@contextmanager
def staging_folder(prefix: Path) -> Iterator[Path]:
    """A hidden folder on the output's file system, gone afterwards.

    Raises:
        UserError: writing in it failed.
    """
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with staging.staging_folder(prefix) as folder:
            yield folder
    except OSError as error:
        # The readers turn their own OSError into a BadDocument, so this one is about the output.
        raise UserError(f"--output-prefix: cannot write {prefix} ({error.strerror or error})") from error


def move_into_place(staged: Sequence[str], prefixes: Sequence[str]) -> None:
    """Give finished files their names; an old index is never next to new data."""
    for prefix in prefixes:
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for stage, prefix in zip(staged, prefixes, strict=True):
        for suffix in _SUFFIXES:
            os.replace(stage + suffix, prefix + suffix)
