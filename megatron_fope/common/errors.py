"""The one error type for things a user can fix, and how a command shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fope.common.log import is_rank0


class UserError(ValueError):
    """Bad input: the message is one line naming the flag, what was given and what is allowed.

    Library users see an ordinary ``ValueError``; the commands turn it into that one line on standard
    error and exit code 2, without a stack trace (see :func:`exit_on_user_error`).
    """


@contextmanager
def exit_on_user_error(program: str = "megatron-fope") -> Iterator[None]:
    """Turn a :class:`UserError` into one line and exit code 2.

    Under ``torchrun`` every rank finds the same mistake; only rank 0 prints it.
    """
    try:
        yield
    except UserError as error:
        if is_rank0():
            line = " ".join(str(error).splitlines())  # names of files may hold line breaks
            print(f"{program}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
