"""The tokenizers of ``prepare-data``: bytes, or files in Hugging Face's formats.

Nothing here imports Megatron or torch at module level: worker processes load this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fope.common.errors import UserError

BYTES = "bytes"
BYTE_EOD = 256
BYTE_VOCAB_SIZE = 257

_CHUNK_BYTES = 1 << 20
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
    """

    kind = BYTES
    path: str | None = None
    vocab_size = BYTE_VOCAB_SIZE
    eod_id: int | None = BYTE_EOD
    eod_token: str | None = None
    sha256: str | None = None

    def __init__(self, *, append_eod: bool = True) -> None:
        self.append_eod = append_eod

    def ids(self, text: bytes) -> NDArray[Any]:
        """Token ids of UTF-8 bytes, shape ``[tokens]``, any integer dtype, without the end of document."""
        return np.frombuffer(text, dtype=np.uint8)

    def encode(self, text: bytes, dtype: Any) -> NDArray[Any]:
        """Token ids of UTF-8 bytes, shape ``[tokens]``, with the end of document if asked for."""
        ids = self.ids(text)
        # Some Hugging Face tokenizers end every text with their EOS; a second one would be a lie.
        if not self.append_eod or (self.kind != BYTES and len(ids) and ids[-1] == self.eod_id):
            return ids.astype(dtype)
        out = np.empty(len(ids) + 1, dtype=dtype)
        out[:-1] = ids
        out[-1] = self.eod_id
        return out

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
        """What Megatron's training would do otherwise than the user may expect, one line each."""
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
        where = Path(path)
        if not os.fspath(path) or not where.exists():
            raise UserError(
                f"--tokenizer: {str(path)!r} is neither 'bytes' nor an existing tokenizer.json or folder "
                "of a Hugging Face tokenizer"
            )
        self.path = str(where)
        encode, vocabulary, own_eos = _load_folder(where) if where.is_dir() else _load_file(where)
        self._encode = encode
        self.own_eod_token = own_eos
        self.eod_token = eod_token if eod_token is not None else own_eos
        if self.eod_token is None:
            if append_eod:
                raise UserError(
                    f"--tokenizer: {where} names no EOS token to end documents with; name one with "
                    "--eod-token or pass --no-append-eod"
                )
        elif self.eod_token not in vocabulary:
            flag = "--eod-token" if eod_token is not None else "--tokenizer"
            raise UserError(f"{flag}: {self.eod_token!r} is not in the vocabulary of {where}")
        self.eod_id = vocabulary.get(self.eod_token)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.sha256 = _sha256(where)

    def ids(self, text: bytes) -> NDArray[Any]:
        return np.asarray(self._encode(text.decode()), dtype=np.int64)

    def files(self) -> list[Path]:
        return _files(Path(self.path))

    def megatron_flags(self) -> list[str]:
        path = Path(self.path)
        # Megatron reads the EOS token from tokenizer_config.json, which it only looks for in a folder.
        model = path.parent if path.name == "tokenizer.json" else path
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]

    def megatron_notes(self) -> list[str]:
        path = Path(self.path)
        notes = []
        if path.is_file() and path.name != "tokenizer.json":
            notes.append(f"{path} has to be named tokenizer.json for Megatron's HuggingFaceTokenizer")
        if self.eod_token != self.own_eod_token:
            notes.append(
                f"documents end with {self.eod_token!r}, but Megatron takes the eos_token of "
                f"tokenizer_config.json, which is {self.own_eod_token!r}, for the end of a document"
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
        workers: processes; with 1, or with bytes (where copying costs more than encoding), this one.

    Yields:
        Ids of each document, shape ``[tokens]``.
    """
    if workers == 1 or tokenizer.kind == BYTES:
        for text in documents:
            yield tokenizer.encode(text, dtype)
        return

    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork would copy the threads' locks that torch and the tokenizer hold.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (tokenizer.path, tokenizer.eod_token, tokenizer.append_eod),
    )
    waiting: deque[Future[list[NDArray[Any]]]] = deque()
    try:
        for chunk in _chunks(documents):
            waiting.append(pool.submit(_encode_chunk, chunk, np.dtype(dtype).str))
            # A bounded queue: the corpus need not fit in memory.
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--workers: one of the {workers} processes was killed, as the system does when memory is short; "
            "nothing was written; use fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(path: str, eod_token: str | None, append_eod: bool) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the workers
    _worker_tokenizer = load_tokenizer(path, eod_token=eod_token, append_eod=append_eod)


def _encode_chunk(texts: list[bytes], dtype: str) -> list[NDArray[Any]]:
    return [_worker_tokenizer.encode(text, np.dtype(dtype)) for text in texts]


def _chunks(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_Loaded = tuple[Callable[[str], list[int]], dict[str, int], str | None]
"""Text to ids, token to id, and the EOS token if the files name one."""


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
    vocabulary = fast.get_vocab(with_added_tokens=True)
    return lambda text: fast.encode(text).ids, vocabulary, _declared_eos(path.parent)


def _load_folder(path: Path) -> _Loaded:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(_missing(path, "transformers")) from None
    try:
        slow = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # Which one it is depends on the files and on the library's version.
        raise UserError(f"--tokenizer: transformers cannot load {path} ({_line(error)})") from None

    def encode(text: str) -> list[int]:
        return slow(text, truncation=False, padding=False, verbose=False)["input_ids"]

    return encode, slow.get_vocab(), slow.eos_token


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


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted({file for pattern in _HF_FILES for file in path.glob(pattern) if file.is_file()})
    return [path]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _missing(path: Path, library: str) -> str:
    return f"--tokenizer: {path} needs the {library} library; pip install 'megatron-fope[hf]'"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
