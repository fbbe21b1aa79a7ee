"""Files and folders that get their name when they are whole, and disturb nobody else's."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_fope.common.errors import UserError


def leftovers(target: Path) -> list[Path]:
    """Staging folders of the same target that are there already.

    An interrupted run left them, or another one is at work. Only their owner knows which, so they are named
    to the user and never removed.
    """
    return sorted(target.parent.glob(f"{glob.escape(_prefix(target))}*"))


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder beside a file or folder to be made, gone afterwards with all that is left in it.

    No other process has its name, in another container or on another machine either. Move what is finished
    out of it with ``rename``; both are on one file system.

    Raises:
        OSError: the target's folder cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new_folder(name: str, target: Path) -> None:
    """Refuse a name that is taken; ``name`` is how messages call the folder, for example "TARGET".

    Raises:
        UserError: naming it.
    """
    if os.path.lexists(target):
        raise UserError(f"{name} is {str(target)!r}, which exists; use a new folder")


def check_space(
    name: str, folder: Path, needed: int, *, purpose: str = "", advice: str = "use another disk"
) -> None:
    """Refuse a disk that has no room, before anything is written.

    Args:
        name: how messages call what is to be written, for example "TARGET".
        folder: where; it may not be there yet.
        needed: bytes.
        purpose: behind the number.
        advice: what to do.

    Raises:
        UserError: naming what is needed and what is free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{name} needs {needed / 1e9:.1f} GB{purpose}, {free / 1e9:.1f} GB are free; {advice}"
        )


@contextmanager
def new_folder(name: str, target: Path) -> Iterator[Path]:
    """A new folder to fill, which gets its name when it is whole; missing folders above it are made with it.

    Args:
        name: how messages call it, for example "TARGET".
        target: the folder.

    Raises:
        UserError: it cannot be written, or another process has made it meanwhile. Nothing is left.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(target) as folder:
            new = folder / target.name
            new.mkdir()
            yield new
            if os.path.lexists(target):
                raise UserError(f"{name} is {str(target)!r}: it was made meanwhile; use a new folder")
            new.rename(target)
        missing.clear()
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"{name} is {str(target)!r}: it cannot be written ({error.strerror or error}); nothing was left "
            "there"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):  # somebody else uses it meanwhile
                folder.rmdir()


def sync(folder: Path) -> None:
    """Make names in a folder durable; some network file systems cannot, and need not."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that is never seen half written; a file that was there stays when this fails.

    Symbolic links are followed; other names of the same file (hard links) keep what they have. Devices and
    pipes are written to.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    with staging_folder(path) as folder:
        whole = folder / "whole"
        whole.write_text(text)
        if path.exists():
            shutil.copymode(path, whole)
        whole.replace(path)


def check_output_file(flag: str, path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose result it shall hold.

    Missing folders above it are made; a file that is there stays as it is.

    Raises:
        UserError: naming the flag.
    """
    real = Path(os.path.realpath(path))
    try:
        if real.is_fifo():
            return  # opening it would wait for its reader
        if real.exists():
            with open(real, "ab", buffering=0) as file:
                file.write(b"")  # a device that is full refuses even that
        if real.is_file() or not real.exists():
            real.parent.mkdir(parents=True, exist_ok=True)
            with staging_folder(real):
                pass
    except OSError as error:
        raise UserError(
            f"{flag} is {os.fspath(path)!r}, which cannot be written ({error.strerror or error})"
        ) from None


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}.partial-"  # names have at most 255 bytes
