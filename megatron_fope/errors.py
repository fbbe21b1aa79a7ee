"""The one error type for things a user can fix, and how a command shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message is one line naming the flag, what was given and what is allowed.

    Library users see an ordinary ``ValueError``; the commands turn it into that one line on standard
    error and exit code 2, without a stack trace (see :func:`exit_on_user_error`).
    """


@contextmanager
def exit_on_user_error(program: str = "megatron-fope", *, any_rank: bool = False) -> Iterator[None]:
    """Turn a :class:`UserError` into one line and exit code 2.

    Under ``torchrun`` every rank finds the same mistake; only rank 0 prints it.

    Args:
        program: what the line starts with.
        any_rank: one rank may be alone in finding this mistake, a damaged file of its own for example: the
            first rank that gets here prints it.
    """
    try:
        yield
    except UserError as error:
        if _first_of_all_ranks() if any_rank else os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _first_of_all_ranks() -> bool:
    """Ask the store that the ranks share; before there is one, rank 0 speaks."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return distributed.distributed_c10d._get_default_store().add("megatron-fope/error", 1) == 1
    except RuntimeError:
        return False  # the rank that holds the store has left, and said why
