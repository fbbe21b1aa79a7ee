"""The tokenizers of ``prepare-data``: bytes, or files in Hugging Face's formats."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fope.common.errors import UserError

logger = logging.getLogger(__name__)

BYTES = "bytes"
BYTE_EOD = 256
BYTE_VOCAB_SIZE = 257

_CHUNK_BYTES = 1 << 20
"""Texts that are encoded at once, so that a corpus need not fit in memory."""

_HF_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.tiktoken")


class Tokenizer:
    """Text to token ids, with the end-of-document id appended.

    Attributes:
        kind: ``"bytes"`` or ``"huggingface"``.
        path: the tokenizer's file or folder; ``None`` for bytes.
        vocab_size: one more than the largest id.
        eod_id: the end-of-document id; ``None`` if there is none.
        eod_token: its text, for Hugging Face tokenizers.
        append_eod: whether :meth:`encode` appends it.
        sha256: of the tokenizer's files, to tell two tokenizers apart; ``None`` for bytes.
        in_threads: whether it can encode several texts at once.
    """

    kind = BYTES
    path: str | None = None
    vocab_size = BYTE_VOCAB_SIZE
    eod_id: int | None = BYTE_EOD
    eod_token: str | None = None
    sha256: str | None = None
    in_threads = True

    def __init__(self, *, append_eod: bool = True) -> None:
        self.append_eod = append_eod

    def ids(self, text: bytes) -> NDArray[Any]:
        """Token ids of UTF-8 bytes, shape ``[tokens]``, any integer dtype, without the end of document."""
        return next(self._batch([text]))

    def encode(self, texts: list[bytes], dtype: Any) -> Iterator[NDArray[Any]]:
        """Token ids of each text, shape ``[tokens]``, with the end of document if asked for."""
        for ids in self._batch(texts):
            # Some Hugging Face tokenizers end every text with their EOS; a second one would be a lie.
            if not self.append_eod or (self.kind != BYTES and len(ids) and ids[-1] == self.eod_id):
                yield ids.astype(dtype)
            else:
                yield np.append(ids.astype(dtype), np.array(self.eod_id, dtype))

    def _batch(self, texts: list[bytes]) -> Iterator[NDArray[Any]]:
        return (np.frombuffer(text, dtype=np.uint8) for text in texts)

    def files(self) -> list[Path]:
        """The files that it is made of."""
        return []

    def describe(self) -> dict[str, Any]:
        """What identifies this tokenizer, as plain JSON values."""
        keys = ("kind", "path", "sha256", "vocab_size", "eod_id", "eod_token", "append_eod")
        return {key: getattr(self, key) for key in keys}

    def megatron_flags(self) -> list[str]:
        """The flags that make Megatron's training use this vocabulary and this end-of-document id."""
        from megatron_fope.compat import null_tokenizer_flags

        return null_tokenizer_flags(self.vocab_size)

    def megatron_notes(self) -> list[str]:
        """Where Megatron's training may not do what the user expects, one line each."""
        return []


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` file (by the ``tokenizers`` library) or a folder (by ``transformers``).

    Texts are encoded as the tokenizer's own files say, including a BOS that its post-processor adds; so does
    Megatron's ``HuggingFaceTokenizer``. Truncation or padding stored in the file is turned off.

    Args:
        path: the file or folder.
        eod_token: the token to end documents with; default is the tokenizer's EOS token.
        append_eod: whether documents are ended with it.

    Raises:
        UserError: the path does not exist or does not load, the library for it is missing, or there is no
            end-of-document token.
    """

    kind = "huggingface"

    def __init__(
        self, path: str | os.PathLike[str], *, eod_token: str | None = None, append_eod: bool = True
    ) -> None:
        super().__init__(append_eod=append_eod)
        self._where = where = Path(path)
        if not os.fspath(path) or not where.exists():
            raise UserError(
                f"--tokenizer: {str(path)!r} is neither 'bytes' nor an existing tokenizer.json or folder "
                "of a Hugging Face tokenizer"
            )
        self.path = str(where)
        load = _load_folder if where.is_dir() else _load_file
        self._encode, vocabulary, self._own_eod_token, self.in_threads = load(where)
        self.eod_token = eod_token if eod_token is not None else self._own_eod_token
        if self.eod_token is None:
            if append_eod:
                raise UserError(
                    f"--tokenizer: {where} names no EOS token to end documents with; name one with "
                    "--eod-token or pass --no-append-eod"
                )
            self.eod_id = None
        elif self.eod_token not in vocabulary:
            flag = "--eod-token" if eod_token is not None else "--tokenizer"
            raise UserError(f"{flag}: {self.eod_token!r} is not in the vocabulary of {where}")
        else:
            self.eod_id = vocabulary[self.eod_token]
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in self.files())).hexdigest()

    def _batch(self, texts: list[bytes]) -> Iterator[NDArray[Any]]:
        return (np.asarray(ids, np.int64) for ids in self._encode([text.decode() for text in texts]))

    def files(self) -> list[Path]:
        if self._where.is_file():
            return [self._where]
        found = {file for pattern in _HF_FILES for file in self._where.glob(pattern)}
        return sorted(file for file in found if file.is_file())

    def megatron_flags(self) -> list[str]:
        # Megatron reads the EOS token from tokenizer_config.json, which it only looks for in a folder.
        model = self._where.parent if self._where.name == "tokenizer.json" else self._where
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]

    def megatron_notes(self) -> list[str]:
        notes = []
        if self._where.is_file() and self._where.name != "tokenizer.json":
            notes.append(f"{self.path} has to be named tokenizer.json for Megatron's HuggingFaceTokenizer")
        if self.eod_token != self._own_eod_token:
            notes.append(
                f"documents end with {self.eod_token!r}, but Megatron takes the eos_token of "
                f"tokenizer_config.json, which is {self._own_eod_token!r}, for the end of a document"
            )
        return notes


def load_tokenizer(
    tokenizer: str | os.PathLike[str], *, eod_token: str | None = None, append_eod: bool = True
) -> Tokenizer:
    """Load what ``--tokenizer`` names: ``bytes``, or a Hugging Face ``tokenizer.json`` or folder.

    Raises:
        UserError: see :class:`HuggingFaceTokenizer`; or ``eod_token`` given for bytes.
    """
    if str(tokenizer) != BYTES:
        return HuggingFaceTokenizer(tokenizer, eod_token=eod_token, append_eod=append_eod)
    if eod_token is not None:
        raise UserError(
            f"--eod-token: {eod_token!r} given, but --tokenizer bytes ends documents with id {BYTE_EOD}"
        )
    return Tokenizer(append_eod=append_eod)


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[bytes], dtype: Any, *, workers: int = 1
) -> Iterator[NDArray[Any]]:
    """Encode documents in order.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        documents: UTF-8 bytes each.
        dtype: numpy dtype of the ids.
        workers: threads of the ``tokenizers`` library, which makes them once in a process.

    Yields:
        Ids of each document, shape ``[tokens]``.
    """
    if workers > 1 and not tokenizer.in_threads:
        logger.warning("--workers is %d, but %s is a tokenizer for one thread", workers, tokenizer.path)
    variables = {"TOKENIZERS_PARALLELISM": str(workers > 1).lower(), "RAYON_NUM_THREADS": str(workers)}

    def encode(chunk: list[bytes]) -> list[NDArray[Any]]:
        # Not around a yield: a generator that is left half-way ends at any time, in the middle of another.
        with _environment(variables):
            return list(tokenizer.encode(chunk, dtype))

    chunk: list[bytes] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield from encode(chunk)
            chunk, size = [], 0
    yield from encode(chunk)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


_Loaded = tuple[Callable[[list[str]], Iterable[list[int]]], dict[str, int], str | None, bool]
"""Texts to ids, token to id, the EOS token if the files name one, and whether it encodes in threads."""


def _load_file(path: Path) -> _Loaded:
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise UserError(_missing(path, "tokenizers")) from None
    try:
        fast = Fast.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise UserError(
            f"--tokenizer: {path} is not a tokenizer.json of Hugging Face ({_line(error)})"
        ) from None
    fast.no_truncation()
    fast.no_padding()

    def encode(texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in fast.encode_batch(texts))

    return encode, fast.get_vocab(with_added_tokens=True), _declared_eos(path.parent), True


def _load_folder(path: Path) -> _Loaded:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(_missing(path, "transformers")) from None
    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Which one it is depends on the files and on the library's version.
        raise UserError(f"--tokenizer: transformers cannot load {path} ({_line(error)})") from None

    def encode(texts: list[str]) -> list[list[int]]:
        return loaded(texts, truncation=False, padding=False, verbose=False)["input_ids"] if texts else []

    return encode, loaded.get_vocab(), loaded.eos_token, loaded.is_fast


def _declared_eos(folder: Path) -> str | None:
    """The EOS token that the files next to a ``tokenizer.json`` declare; it has no such field itself."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _missing(path: Path, library: str) -> str:
    return f"--tokenizer: {path} needs the {library} library; pip install 'megatron-fope[hf]'"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
