"""What FoPE says in a training log: lines of its own, once and not by every rank."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def is_rank0() -> bool:
    """Whether this process speaks for all; also true outside ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def announce(*lines: str, about: str = "FoPE") -> None:
    """Print lines on rank 0."""
    for line in lines if is_rank0() else ():
        print(f"> {about}: {line}", flush=True)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """For imports of libraries, which warn of others that only training needs."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
