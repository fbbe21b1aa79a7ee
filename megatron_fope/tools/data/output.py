"""Where a dataset is written: under a hidden name first, so that no half-made one ever loads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_fope.common import staging
from megatron_fope.common.errors import UserError

logger = logging.getLogger(__name__)

_SUFFIXES = (".json", ".bin", ".idx")
"""What makes up a dataset, in the order of moving into place: nothing loads before the index is there."""


_LONGEST_NAME = 255 - len("_heldout.json")


def output_prefixes(output_prefix: str | os.PathLike[str], heldout: bool) -> list[str]:
    """The prefix of every dataset to write.

    Raises:
        UserError: not the name of a file, or one with a suffix.
    """
    prefix = os.fspath(output_prefix)
    if not prefix or prefix.endswith(("/", os.sep)):
        raise UserError(f"--output-prefix: {prefix!r} given; the path needs a file name at its end")
    if prefix.endswith(_SUFFIXES):
        raise UserError(f"--output-prefix: {prefix!r} given; leave out the suffix, .bin and .idx are added")
    name = os.path.basename(prefix)
    if name in (".", ".."):
        raise UserError(f"--output-prefix: {prefix!r} given; the path needs a file name at its end")
    if not name.isprintable():
        raise UserError(f"--output-prefix: {prefix!r} given; use a name of printable characters")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UserError(
            f"--output-prefix has a name of {len(os.fsencode(name))} bytes; allowed: up to {_LONGEST_NAME}"
        )
    return [f"{prefix}_train", f"{prefix}_heldout"] if heldout else [prefix]


def _outputs(prefixes: Sequence[str]) -> Iterator[Path]:
    return (Path(prefix + suffix) for prefix in prefixes for suffix in _SUFFIXES)


def refuse_existing(prefixes: Sequence[str], overwrite: bool) -> None:
    """Stop before a dataset is replaced.

    Raises:
        UserError: a file of it exists and ``overwrite`` is off.
    """
    for path in _outputs(prefixes):
        if path.is_dir():
            raise UserError(f"--output-prefix: {path} is a folder; give another prefix")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"--output-prefix: {path} exists; give another prefix, or --overwrite")


def refuse_output_over_input(prefixes: Sequence[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Stop before something that is read is replaced, even by ``overwrite``.

    Raises:
        UserError: an output is an input.
    """
    read = {os.path.realpath(path) for path in inputs}
    for path in _outputs(prefixes):
        if os.path.realpath(path) in read:
            raise UserError(f"--output-prefix: {path} would replace an input file; give another prefix")


@contextmanager
def staging_folder(prefix: Path) -> Iterator[Path]:
    """A hidden folder on the output's file system, gone afterwards; so are the folders made for it, if empty.

    Raises:
        UserError: writing in it failed.
    """
    for folder in staging.leftovers(prefix):
        logger.warning(
            "%s: another run works there, or one that was killed left it; delete it if none is running",
            folder,
        )
    missing = [folder for folder in prefix.parents if not folder.exists()]
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with staging.staging_folder(prefix) as folder:
            yield folder
    except BaseException as error:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        if not isinstance(error, OSError):
            raise
        # The readers turn their own OSError into a BadDocument, so this one is about the output.
        raise UserError(f"--output-prefix: cannot write {prefix} ({error.strerror or error})") from error


def move_into_place(staged: Sequence[str], prefixes: Sequence[str]) -> None:
    """Give finished files their names; an old index is never next to new data."""
    for prefix in prefixes:
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for stage, prefix in zip(staged, prefixes, strict=True):
        for suffix in _SUFFIXES:
            os.replace(stage + suffix, prefix + suffix)
