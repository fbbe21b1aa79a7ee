"""Where a dataset is written: under a hidden name first, so that no half-made one ever loads."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope import __version__
from megatron_fope.common import staging
from megatron_fope.common.errors import UserError

logger = logging.getLogger(__name__)

SIDECAR_VERSION = 1

_SUFFIXES = (".json", ".bin", ".idx")
"""What makes up a dataset, in the order of moving into place: nothing loads before the index is there."""

_LONGEST_NAME = 255 - len("_heldout.json")


@dataclass(frozen=True, slots=True)
class WrittenDataset:
    """One ``.bin``/``.idx``/``.json`` triple.

    Attributes:
        prefix: what Megatron's ``--data-path`` takes.
        documents: how many it holds.
        tokens: how many it holds, ends of documents included.
    """

    prefix: str
    documents: int
    tokens: int


def output_prefixes(
    output_prefix: str | os.PathLike[str], *, overwrite: bool, heldout: bool = False
) -> list[str]:
    """The prefix of every dataset to write.

    Raises:
        UserError: not the name of a file, one with a suffix, or a dataset that exists without ``overwrite``.
    """
    prefix = os.fspath(output_prefix)
    name = os.path.basename(prefix)
    if name in ("", ".", ".."):
        raise UserError(f"--output-prefix: {prefix!r} given; the path needs a file name at its end")
    if prefix.endswith(_SUFFIXES):
        raise UserError(f"--output-prefix: {prefix!r} given; leave out the suffix, .bin and .idx are added")
    if not name.isprintable():
        raise UserError(f"--output-prefix: {prefix!r} given; use a name of printable characters")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise UserError(
            f"--output-prefix has a name of {len(os.fsencode(name))} bytes; allowed: up to {_LONGEST_NAME}"
        )
    prefixes = [f"{prefix}_train", f"{prefix}_heldout"] if heldout else [prefix]
    _refuse_existing(prefixes, overwrite)
    return prefixes


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
def staging_folder(output_prefix: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder on the output's file system, gone afterwards; so are the folders made for it, if empty.

    Raises:
        UserError: writing in it failed.
    """
    prefix = Path(output_prefix)
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


def publish(
    staged: Sequence[str],
    datasets: Sequence[WrittenDataset],
    sidecars: Sequence[dict[str, Any]],
    *,
    overwrite: bool,
) -> None:
    """Write the ``.json`` of finished datasets and give all files their names.

    An old index is never next to new data.

    Args:
        staged: prefixes of the ``.bin`` and ``.idx`` in the staging folder.
        datasets: what they become.
        sidecars: what the ``.json`` of each says besides the versions.
        overwrite: replace existing datasets.

    Raises:
        UserError: a dataset was made there meanwhile.
    """
    for stage, sidecar in zip(staged, sidecars, strict=True):
        described = {"format_version": SIDECAR_VERSION, "megatron_fope": __version__} | sidecar
        Path(f"{stage}.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    prefixes = [dataset.prefix for dataset in datasets]
    _refuse_existing(prefixes, overwrite)
    for prefix in prefixes:
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for stage, prefix in zip(staged, prefixes, strict=True):
        for suffix in _SUFFIXES:
            os.replace(stage + suffix, prefix + suffix)


def read_sidecar(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what a dataset's ``.json`` says about it; ``None`` without one.

    Raises:
        UserError: ``PREFIX.json`` is there but is not such a file.
    """
    path = Path(f"{os.fspath(prefix)}.json")
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as the description of a dataset ({error})") from None
    if not isinstance(sidecar, dict) or sidecar.get("format_version") != SIDECAR_VERSION:
        raise UserError(f"{path}: is not a description that prepare-data of this version wrote")
    return sidecar


def _outputs(prefixes: Sequence[str]) -> Iterator[Path]:
    return (Path(prefix + suffix) for prefix in prefixes for suffix in _SUFFIXES)


def _refuse_existing(prefixes: Sequence[str], overwrite: bool) -> None:
    for path in _outputs(prefixes):
        if path.is_dir():
            raise UserError(f"--output-prefix: {path} is a folder; give another prefix")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"--output-prefix: {path} exists; give another prefix, or --overwrite")
