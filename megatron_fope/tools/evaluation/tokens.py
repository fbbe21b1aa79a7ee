"""The tokens of an evaluation: read and checked before any process starts, and read again by every rank."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError
from megatron_fope.common.log import quiet_imports
from megatron_fope.tools.data import read_sidecar


def read_tokens(prefix: str | Path, count: int) -> Any:
    """The first tokens of a dataset, documents joined in order.

    Args:
        prefix: of a ``.bin``/``.idx`` pair.
        count: of tokens.

    Returns:
        numpy array ``[count]``, int64; shorter when the dataset is.

    Raises:
        UserError: a file is missing or damaged, or there are no tokens.
    """
    import numpy as np

    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
    try:
        with quiet_imports():  # Megatron warns that it runs on one rank
            _check_index(prefix, DType)
            dataset = IndexedDataset(str(prefix))
            dtype = np.dtype(dataset.index.dtype)
            parts, total = [np.empty(0, dtype)], 0
            for i in range(len(dataset)):
                parts.append(np.asarray(dataset[i]))
                total += len(parts[-1])
                if total >= count:
                    break
            tokens = np.concatenate(parts)[:count]
    except Exception as error:  # whatever a damaged index makes Megatron and numpy do
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"--data-path is {str(prefix)!r}, which cannot be read ({text})") from None
    if dtype.kind not in "iu":
        raise UserError(
            f"--data-path is {str(prefix)!r}, which holds {dtype.name}; use data of whole numbers"
        )
    if not len(tokens):
        raise UserError(f"--data-path is {str(prefix)!r}, which holds no tokens")
    return tokens.astype(np.int64)


def _check_index(prefix: str | Path, types: Any) -> None:
    """Refuse an index that is cut, or that says more than the data holds, before Megatron maps it.

    Raises:
        OSError, ValueError, struct.error, KeyError: what is wrong with it.
    """
    import numpy as np

    index = Path(f"{prefix}.idx")
    with open(index, "rb") as file:
        magic, _, code, sequences, documents = struct.unpack("<9sQBQQ", file.read(34))
        if magic != b"MMIDIDX\x00\x00":
            raise ValueError(f"{index} is no index of Megatron's")
        if index.stat().st_size < 34 + sequences * 12 + documents * 8:
            raise ValueError(f"{index} is cut off")
        itemsize = np.dtype(types.dtype_from_code(code)).itemsize
        sizes = np.fromfile(file, np.int32, sequences).astype(np.int64) * itemsize
        ends = np.fromfile(file, np.int64, sequences) + sizes
    if sequences and (sizes.min() < 0 or (ends - sizes).min() < 0):
        raise ValueError(f"{index} is damaged")
    if sequences and ends.max() > Path(f"{prefix}.bin").stat().st_size:
        raise ValueError(f"{prefix}.bin is cut off")


def check_data(data_path: str | Path) -> None:
    """Refuse data that is not there.

    Raises:
        UserError: a file of it is missing.
    """
    for suffix in (".bin", ".idx"):
        if not Path(f"{data_path}{suffix}").is_file():
            raise UserError(f"--data-path is {str(data_path)!r}: {data_path}{suffix} does not exist")


def check_vocabulary(data_path: str | Path, tokens: Any, checkpoints: Iterable[Any]) -> None:
    """Refuse data of another vocabulary, of which a model would compute a number like any other.

    Args:
        data_path: prefix of the data.
        tokens: from :func:`read_tokens`.
        checkpoints: with ``folder`` and ``args``.

    Raises:
        UserError: an id is no token of a checkpoint's tokenizer, or the data was made for more tokens.
    """
    largest, smallest = int(tokens.max()), int(tokens.min())
    if smallest < 0:
        raise UserError(
            f"--data-path is {str(data_path)!r}, which holds the id {smallest}; use token ids >= 0"
        )
    tokenizer = (read_sidecar(data_path) or {}).get("tokenizer") or {}
    made_for = tokenizer.get("vocab_size") or 0
    for checkpoint in checkpoints:
        size, what = vocabulary(checkpoint.args)
        if size is not None and largest >= size:
            raise UserError(
                f"--data-path is {str(data_path)!r}, which holds the id {largest}, but {what} of "
                f"{checkpoint.folder} has {size} ids; use data of its tokenizer"
            )
        if size is not None and made_for > size:
            raise UserError(
                f"--data-path is {str(data_path)!r}, made with a tokenizer of {made_for} ids, but {what} of "
                f"{checkpoint.folder} has {size}; use data of its tokenizer"
            )


def vocabulary(stored: Any) -> tuple[int | None, str]:
    """How many ids a checkpoint's model knows, as far as its arguments tell, and what they are the ids of."""
    padded, own = getattr(stored, "padded_vocab_size", None), getattr(stored, "vocab_size", None)
    if getattr(stored, "tokenizer_type", None) == "NullTokenizer" and own:
        # Megatron through 0.17 adds an id for the end of documents.
        return min(own + 1, padded or own + 1), "the tokenizer"
    return padded or own, "the vocabulary"
