"""Documents out of text files, JSONL files and folders of them.

A document is its UTF-8 bytes, exactly as stored: line ends and a byte-order mark in a text file are kept, so
that the byte-level tokenizer loses nothing. What cannot be read comes out as a :class:`BadDocument`; whether
that ends the run is for the caller to decide.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_fope.common.errors import UserError

DEFAULT_INCLUDE = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl", "*.ndjson")
"""Which files of a folder are read when ``--include`` is not given."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
"""Read as JSONL if it is; otherwise ``--format`` has to say what it is."""
FORMATS = ("auto", "text", "jsonl")

_NOT_JSONL = (
    "holds no JSON object in its first line, so it is not JSON Lines; for an array: jq -c '.[]' FILE > "
    "FILE.jsonl; to take the whole file as one text: --format text"
)

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What a file that is not UTF-8 seems to be, by how it begins."""


@dataclass(frozen=True, slots=True)
class Source:
    """One input file.

    Attributes:
        path: where it is.
        size: bytes.
        is_jsonl: one document per line, rather than the whole file.
    """

    path: Path
    size: int
    is_jsonl: bool


@dataclass(frozen=True, slots=True)
class BadDocument:
    """Something in the input that is not a document.

    Attributes:
        where: ``file`` or ``file:line``.
        reason: what is wrong, with the byte offset where there is one.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def find_sources(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = DEFAULT_INCLUDE,
    exclude: Sequence[str] = (),
    input_format: str = "auto",
) -> tuple[list[Source], list[BadDocument]]:
    """List the files to read, in an order that does not depend on the file system.

    Inputs keep the order given; inside a folder the files are sorted by relative path. Hidden folders
    (``.git``, ``.venv``) are not entered. A file reached twice is read once: a second copy would put the same
    text on both sides of a held-out split.

    Args:
        inputs: files or folders. A file named here is read whatever its name.
        include: glob patterns; in a folder, only files whose name or relative path matches one are read.
        exclude: glob patterns on the name or relative path; ``*`` also matches ``/``, so ``test/*`` leaves
            out everything below ``test``.
        input_format: one of :data:`FORMATS`; ``auto`` goes by :data:`JSONL_SUFFIXES`, and takes a ``.json``
            file for JSONL if its first line is an object.

    Raises:
        UserError: an input does not exist, or a folder holds no matching file.
    """
    sources: list[Source] = []
    bad: list[BadDocument] = []
    seen: set[str] = set()
    for given in inputs:
        if not os.fspath(given):
            raise UserError("--input: '' given; give files or folders")
        root = Path(given)
        if root.is_dir():
            paths = _walk(root, include, exclude, bad)
            if not paths and not bad:
                raise UserError(
                    f"--input: no file in {root} matches --include {' '.join(include)}"
                    + (f" after --exclude {' '.join(exclude)}" if exclude else "")
                )
        elif os.path.lexists(root):
            paths = [root]
        else:
            raise UserError(f"--input: {root} does not exist; give files or folders")
        for path in paths:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                found = _source(path, input_format)
                if isinstance(found, Source):
                    sources.append(found)
                else:
                    bad.append(found)
    return sources, bad


def read_documents(source: Source, json_key: str = "text") -> Iterator[tuple[bytes | BadDocument, int]]:
    """Yield each document, or what is wrong with it, and how many bytes of the file it took up.

    Args:
        source: the file.
        json_key: which field of each JSONL line holds the text.

    Yields:
        ``(document, consumed)``; the document is valid UTF-8 and may be empty.
    """
    path = source.path
    try:
        with path.open("rb") as file:
            if not source.is_jsonl:
                data = file.read()
                yield _document(str(path), _check_text(data)), len(data)
                return
            for number, line in enumerate(file, start=1):
                # A blank line separates nothing and holds nothing: most JSONL files end with one.
                if line.strip():
                    parsed = _parse_line(line, json_key, first=number == 1)
                    yield _document(f"{path}:{number}", parsed), len(line)
    except OSError as error:
        yield _unreadable(path, error), 0


def _source(path: Path, input_format: str) -> Source | BadDocument:
    suffix = path.suffix.lower()
    try:
        info = path.stat()
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(info.st_mode):
            return BadDocument(str(path), "is not a regular file")
        if input_format == "auto" and suffix == JSON_SUFFIX:
            return Source(path, info.st_size, True) if _is_jsonl(path) else BadDocument(str(path), _NOT_JSONL)
    except OSError as error:
        return _unreadable(path, error)
    jsonl = input_format == "jsonl" or (input_format == "auto" and suffix in JSONL_SUFFIXES)
    return Source(path, info.st_size, jsonl)


def _is_jsonl(path: Path) -> bool:
    """Whether a file holds an object in its first line, or nothing."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip(b"\xef\xbb\xbf \t\r\n")), b"{}")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _document(where: str, parsed: bytes | str) -> bytes | BadDocument:
    return BadDocument(where, parsed) if isinstance(parsed, str) else parsed


def _check_text(data: bytes) -> bytes | str:
    """A whole file as bytes, or as ``str`` the reason that it is no document."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error, "of the file", first=True)
    return data


def _parse_line(line: bytes, json_key: str, *, first: bool) -> bytes | str:
    """The document of one JSONL line as bytes, or as ``str`` the reason that there is none."""
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error, "of the line", first=first)
    except json.JSONDecodeError as error:
        return f"not JSON at column {error.colno} ({error.msg})"
    except (RecursionError, ValueError) as error:
        return f"not readable as JSON ({error})"
    if not isinstance(record, dict):
        return f"a JSON object is needed, this is a {type(record).__name__}"
    if json_key not in record:
        return f"has no key {json_key!r} (--json-key); it has {', '.join(map(repr, record)) or 'none'}"
    text = record[json_key]
    if not isinstance(text, str):
        return f"the value of {json_key!r} is a {type(text).__name__}, not a string"
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
        return f"a lone surrogate at character {error.start}"


def _not_utf8(error: UnicodeDecodeError, of: str, *, first: bool) -> str:
    """A message for the file or line; what begins a file may tell what it is instead."""
    data = error.object
    kind = next((kind for start, kind in _PACKED.items() if first and data.startswith(start)), None)
    hint = f" (it looks like {kind}: make text or JSONL of it first)" if kind else ""
    return f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} {of}{hint}"


def _unreadable(path: Path, error: OSError) -> BadDocument:
    return BadDocument(str(path), f"cannot be read ({error.strerror})")


def _walk(root: Path, include: Sequence[str], exclude: Sequence[str], bad: list[BadDocument]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        bad.append(BadDocument(str(error.filename), f"cannot be listed ({error.strerror})"))

    found: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        at = Path(folder)
        relative = at.relative_to(root)
        # A pattern that matches "test/" matches all below it too, so the folder need not be entered.
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not _matches((relative / name).as_posix() + "/", "", exclude)
        ]
        for name in names:
            path = (relative / name).as_posix()
            if _matches(path, name, include) and not _matches(path, name, exclude):
                found.append((path, at / name))
    return [path for _, path in sorted(found)]


def _matches(path: str, name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) or fnmatchcase(name, pattern) for pattern in patterns)
