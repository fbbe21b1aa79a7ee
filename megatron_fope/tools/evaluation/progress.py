"""How far an evaluation is: rank 0 counts tokens in a file, and the command that started it shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_SECONDS = 0.2

_file: Path | None = None
_done = 0


def count_in(file: str | Path) -> None:
    """Write the number of tokens done into a file, from now on and in this process."""
    global _file
    _file = Path(file)


def counted(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches; the tokens ``[b, s]`` of each count as done when the next one is asked for."""
    global _done
    told = 0.0
    for batch in batches:
        yield batch
        _done += batch["tokens"].numel()
        if _file is not None and time.monotonic() - told > _SECONDS:
            told = time.monotonic()
            _file.write_text(str(_done))


def tokens_done(file: Path) -> int:
    """What the ranks have counted so far."""
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0
