"""Text to Megatron's ``.bin``/``.idx`` through Megatron's own builder."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError
from megatron_fope.common.log import quiet_imports
from megatron_fope.tools.data.output import (
    WrittenDataset,
    output_prefixes,
    publish,
    refuse_output_over_input,
    staging_folder,
)
from megatron_fope.tools.data.readers import (
    DEFAULT_INCLUDE,
    FORMATS,
    BadDocument,
    Source,
    find_sources,
    read_documents,
)
from megatron_fope.tools.data.tokenizers import BYTES, Tokenizer, encode_documents, load_tokenizer

logger = logging.getLogger(__name__)

ON_BAD_FILE = ("refuse", "skip")

_MOST_WORKERS = 1024

_MAX_DOCUMENT_TOKENS = 2**31 - 1
"""Megatron's index holds lengths as 32-bit integers."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What :func:`prepare_data` did.

    Attributes:
        train: the dataset to train on; all documents, unless some were held out.
        heldout: the held-out dataset, if one was asked for.
        documents: documents written, over both.
        tokens: tokens written, over both.
        text_bytes: UTF-8 bytes of those documents.
        files: files read.
        empty_documents: documents left out because they hold only white space.
        skipped: every bad file, or line as ``file:line``, and what is wrong with it.
        vocab_size: one more than the largest token id.
        eod_id: the end-of-document id; ``None`` if the tokenizer has none.
        dtype: of the ids in the ``.bin``.
        train_flags: the flags of Megatron's training that go with the data.
        seconds: how long it took.
    """

    train: WrittenDataset
    heldout: WrittenDataset | None
    documents: int
    tokens: int
    text_bytes: int
    files: int
    empty_documents: int
    skipped: tuple[BadDocument, ...]
    vocab_size: int
    eod_id: int | None
    dtype: str
    train_flags: tuple[str, ...]
    seconds: float


def prepare_data(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = BYTES,
    include: Sequence[str] = DEFAULT_INCLUDE,
    exclude: Sequence[str] = (),
    input_format: str = "auto",
    json_key: str = "text",
    append_eod: bool = True,
    eod_token: str | None = None,
    shuffle_seed: int | None = None,
    holdout_fraction: float = 0.0,
    holdout_seed: int = 0,
    on_bad_file: str = "refuse",
    workers: int = 1,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> PreparedData:
    """Write text as one Megatron dataset, or two with a held-out part.

    The files are written in a hidden folder next to the output and moved into place at the end, so a run that
    fails or is interrupted leaves nothing that loads, and an existing dataset as it was.

    Documents are held out by their text: the same text, seed and corpus always go to the same side whatever
    the tokenizer or the order of the files, and copies of one text are never on both sides.

    Args:
        inputs: files or folders, see :func:`~megatron_fope.tools.data.readers.find_sources`.
        output_prefix: ``PREFIX`` of ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json``; with a held-out part,
            of ``PREFIX_train`` and ``PREFIX_heldout``.
        tokenizer: ``"bytes"`` or a Hugging Face ``tokenizer.json`` or folder.
        include: glob patterns of the files of a folder that are read.
        exclude: glob patterns of those that are not, on the path relative to the folder.
        input_format: ``"auto"``, ``"text"`` or ``"jsonl"``.
        json_key: the field of a JSONL line that holds its text.
        append_eod: whether to end each document with the end-of-document id.
        eod_token: that token's text, for a Hugging Face tokenizer; default is its EOS token.
        shuffle_seed: put the documents in an order drawn from this seed; default keeps the reading order.
        holdout_fraction: part of the documents, in [0, 1), that goes to the held-out dataset.
        holdout_seed: which documents that are.
        on_bad_file: ``"refuse"`` to stop at the first bad file or line, ``"skip"`` to warn and go on.
        workers: processes that encode with a Hugging Face tokenizer.
        overwrite: replace an existing dataset.
        show_progress: a progress bar on standard error; default is only on a terminal.

    Raises:
        UserError: a bad argument, a bad file (by ``on_bad_file``), a corpus with no document in it, or an
            output that exists or cannot be written.
    """
    started = time.monotonic()
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    for flag, given, allowed in (
        ("--on-bad-file", on_bad_file, ON_BAD_FILE),
        ("--format", input_format, FORMATS),
    ):
        if given not in allowed:
            raise UserError(f"{flag} is {given!r}; allowed: {', '.join(allowed)}")
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"--holdout-fraction is {holdout_fraction}; allowed: 0 to less than 1")
    if not 1 <= workers <= _MOST_WORKERS:
        raise UserError(f"--workers is {workers}; allowed: 1 to {_MOST_WORKERS}")
    for flag, seed in (("--shuffle-seed", shuffle_seed), ("--holdout-seed", holdout_seed)):
        if seed is not None and seed < 0:  # Python's generators take a seed and its negative for the same
            raise UserError(f"{flag} is {seed}; allowed: 0 or more")
    prefixes = output_prefixes(output_prefix, overwrite=overwrite, heldout=bool(holdout_fraction))
    encoder = load_tokenizer(tokenizer, eod_token=eod_token, append_eod=append_eod)

    sources, unreadable = find_sources(inputs, include=include, exclude=exclude, input_format=input_format)
    refuse_output_over_input(prefixes, [*(source.path for source in sources), *encoder.files()])
    corpus = _Corpus(sources, json_key, skip_bad=on_bad_file == "skip", identify=bool(holdout_fraction))
    for problem in unreadable:
        corpus.refuse_or_skip(problem)

    # Only now: this imports torch, which takes seconds, and the mistakes above are told at once.
    with quiet_imports():
        from megatron_fope.compat import megatron_version

        megatron = str(megatron_version())
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(encoder.vocab_size)

    with staging_folder(output_prefix) as staging:
        everything = str(staging / "all")
        builder = IndexedDatasetBuilder(f"{everything}.bin", dtype=dtype)
        try:
            with _progress(sum(source.size for source in sources), show_progress) as advance:
                encoded = encode_documents(encoder, corpus.documents(advance), dtype, workers=workers)
                kept = _add_documents(builder, encoded)
        finally:
            builder.data_file.close()
        if not kept:
            raise UserError(f"--input: no document in {_shown(inputs)}{corpus.why_empty()}")
        builder.finalize(f"{everything}.idx")

        parts, staged = [list(range(len(kept)))], [everything]
        lengths = builder.sequence_lengths
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(parts[0])
        if holdout_fraction:
            identities = [corpus.identities[index] for index in kept]
            parts = _hold_out(parts[0], identities, holdout_fraction, holdout_seed)
        if shuffle_seed is not None or holdout_fraction:
            staged = [str(staging / str(number)) for number in range(len(parts))]
            for part, stage in zip(parts, staged, strict=True):
                _copy_documents(everything, part, stage, dtype)

        written = [
            WrittenDataset(prefix, len(part), sum(lengths[document] for document in part))
            for prefix, part in zip(prefixes, parts, strict=True)
        ]
        flags = encoder.megatron_flags()
        empty = corpus.empty + corpus.read - len(kept)
        common = {
            "megatron_core": megatron,
            "tokenizer": encoder.describe(),
            "dtype": dtype.__name__,
            "train_flags": flags,
            "shuffle_seed": shuffle_seed,
            "holdout_fraction": holdout_fraction,
            "holdout_seed": holdout_seed if holdout_fraction else None,
            "sources": {
                "files": len(sources),
                "text_bytes": corpus.text_bytes,
                "sha256": corpus.digest.hexdigest(),
                "empty_documents": empty,
                "skipped": len(corpus.skipped),
            },
        }
        sides = ("train", "heldout") if holdout_fraction else ("all",)
        sidecars = [
            common | {"split": side, "documents": dataset.documents, "tokens": dataset.tokens}
            for side, dataset in zip(sides, written, strict=True)
        ]
        publish(staged, written, sidecars, overwrite=overwrite)

    for note in _training_notes(encoder, prefixes):
        logger.warning(note)
    return PreparedData(
        train=written[0],
        heldout=written[1] if holdout_fraction else None,
        documents=len(kept),
        tokens=sum(dataset.tokens for dataset in written),
        text_bytes=corpus.text_bytes,
        files=len(sources),
        empty_documents=empty,
        skipped=tuple(corpus.skipped),
        vocab_size=encoder.vocab_size,
        eod_id=encoder.eod_id,
        dtype=dtype.__name__,
        train_flags=tuple(flags),
        seconds=time.monotonic() - started,
    )


@dataclass
class _Corpus:
    """The documents of the sources, in order, with what was met on the way."""

    sources: Sequence[Source]
    json_key: str
    skip_bad: bool
    identify: bool
    skipped: list[BadDocument] = field(default_factory=list)
    """Bad files and lines."""
    empty: int = 0
    """Documents of white space only."""
    read: int = 0
    """Documents handed out."""
    text_bytes: int = 0
    """Of those."""
    digest: Any = field(default_factory=hashlib.sha256)
    """Over them, each preceded by its length as 8 bytes little-endian."""
    identities: list[bytes] = field(default_factory=list)
    """A digest of each, if asked for."""

    def documents(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        """Yield each document's bytes; ``advance`` is told how many bytes of the files were read."""
        for source in self.sources:
            for document, consumed in read_documents(source, self.json_key):
                if isinstance(document, BadDocument):
                    self.refuse_or_skip(document)
                elif not document.strip():
                    self.empty += 1
                else:
                    self.read += 1
                    self.text_bytes += len(document)
                    self.digest.update(len(document).to_bytes(8, "little"))
                    self.digest.update(document)
                    if self.identify:
                        self.identities.append(hashlib.sha256(document).digest())
                    yield document
                advance(consumed)

    def refuse_or_skip(self, problem: BadDocument) -> None:
        if not self.skip_bad:
            raise UserError(f"--input: {problem}; mend it, or leave such out with --on-bad-file skip")
        self.skipped.append(problem)
        logger.warning("skipped %s", problem)

    def why_empty(self) -> str:
        reasons = []
        if self.empty or self.read:
            reasons.append(f"{self.empty + self.read} empty")
        if self.skipped:
            reasons.append(f"{len(self.skipped)} skipped, the first: {self.skipped[0]}")
        return f" ({'; '.join(reasons)})" if reasons else ""


def _add_documents(builder: Any, encoded: Iterable[Any]) -> list[int]:
    """Write every document that has tokens.

    Returns:
        The numbers of those documents.

    Raises:
        UserError: a document is too long for Megatron's index.
    """
    kept = []
    for index, ids in enumerate(encoded):
        if len(ids) > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"--input: a document has {len(ids)} tokens; Megatron's index allows "
                f"{_MAX_DOCUMENT_TOKENS}, so split it (JSONL holds many documents in a file)"
            )
        # Without an end of document, a text may come to no tokens at all.
        if len(ids):
            builder.add_document(ids, [len(ids)])
            kept.append(index)
    return kept


def _copy_documents(source: str, documents: Sequence[int], target: str, dtype: Any) -> None:
    """Write some documents of one dataset, in the order given, as another."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    dataset = IndexedDataset(source)
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(dataset[document], [len(dataset[document])])
    builder.finalize(f"{target}.idx")


def _hold_out(
    order: Sequence[int], identities: Sequence[bytes], fraction: float, seed: int
) -> list[list[int]]:
    """Divide documents into a part to train on and a held-out part, each in the order given.

    Args:
        order: document numbers.
        identities: a digest of each document's text, by number.
        fraction: of the documents to hold out; at least one is.
        seed: another seed holds out other documents.

    Raises:
        UserError: copies of a text belong together, and no such division leaves both parts some.
    """
    copies = Counter(identities)
    room = max(1, round(fraction * len(order)))
    heldout: set[bytes] = set()
    for identity in sorted(copies, key=lambda text: hashlib.sha256(b"%d:" % seed + text).digest()):
        if copies[identity] <= room:
            heldout.add(identity)
            room -= copies[identity]
    parts = [
        [number for number in order if identities[number] not in heldout],
        [number for number in order if identities[number] in heldout],
    ]
    if not all(parts):
        raise UserError(
            f"--holdout-fraction: {fraction} of {len(order)} documents ({len(copies)} different) leaves one "
            "side empty; give more documents or another fraction"
        )
    return parts


def _training_notes(encoder: Tokenizer, prefixes: Sequence[str]) -> Iterator[str]:
    """What the user must know before training on the data."""
    yield from encoder.megatron_notes()
    for prefix in prefixes:
        # Megatron names its cached sample indices after the path of the data, not after what is in it.
        cache = Path(prefix) / "cache"
        if cache.is_dir():
            yield f"{cache} holds Megatron's indices of the replaced data; delete it before training"


@contextmanager
def _progress(total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """A callable to tell of bytes read: a bar on a terminal, else a log line every ten seconds."""
    if sys.stderr.isatty() if show is None else show:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        bar = tqdm(total=total, unit="B", unit_scale=True, desc="prepare-data", file=sys.stderr)
        with logging_redirect_tqdm(), bar:
            yield bar.update
        return

    done, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            logger.info("read %.1f of %.1f MB (%.0f%%)", done / 1e6, total / 1e6, 100 * done / max(total, 1))

    yield advance


def _shown(inputs: Sequence[str | os.PathLike[str]]) -> str:
    shown = [os.fspath(path) for path in inputs[:3]]
    return ", ".join(shown) + (f" and {len(inputs) - 3} more" if len(inputs) > 3 else "")
