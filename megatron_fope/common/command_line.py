"""What all commands share: a parser whose mistakes are one line, types of flags, how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from megatron_fope.common.errors import UserError, exit_on_user_error
from megatron_fope.common.log import is_rank0

_LARGEST = 2**63 - 1
"""Beyond it whole numbers do not fit the tensors and files that they describe."""

_ARGPARSE = (
    (r"argument (.+?): (is .+)", r"\1 \2"),  # from the types below
    (r"argument (.+?): invalid int value: (.+)", r"\1 is \2; allowed: whole numbers"),
    (r"argument (.+?): invalid float value: (.+)", r"\1 is \2; allowed: numbers"),
    (r"argument (.+?): expected (.+?) argument(s?)", r"\1 requires \2 value\3"),
    (r"argument (.+?): ignored explicit argument (.+)", r"\1 takes no value, but \2 is given"),
    (r"argument (.+?): not allowed with argument (.+)", r"\1 and \2 are both given; use one of them"),
    (r"the following arguments are required: (.+)", r"required, but missing: \1"),
    (r"(unrecognized arguments: .+)", r"\1; use those that --help lists"),
)
"""argparse's messages, and ours."""
_CHOICE = r"argument (.+?): invalid choice: (.+) \(choose from (.+)\)"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose mistakes are a :class:`UserError` instead of the whole usage.

    Flags cannot be abbreviated: a new flag would change what an old command line means.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        """Called by argparse; sub-commands are parsers of this class, too."""
        raise UserError(_plain(message))


def one_line_errors(parser: argparse.ArgumentParser) -> None:
    """Let somebody else's parser, Megatron's, end with one line instead of hundreds of usage."""

    def error(message: str) -> None:
        with exit_on_user_error():
            raise UserError(_plain(message))

    if not isinstance(parser, OneLineParser):
        parser.error = error  # type: ignore[method-assign, assignment]


def _plain(message: str) -> str:
    """argparse's message in the words of all others."""
    if found := re.fullmatch(_CHOICE, message, re.DOTALL):
        name, value, choices = found.groups()
        return f"{name} is {value}; allowed: {choices.replace("'", '')}"
    for pattern, words in _ARGPARSE:
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return found.expand(words)
    return message


# Types of flags -----------------------------------------------------------------------------------


def whole(least: int = -_LARGEST, most: int = _LARGEST) -> Callable[[str], int]:
    """A flag's ``type``: whole numbers of a range."""
    text = f" from {least} to {most}" if most < _LARGEST else f" >= {least}" if least > -_LARGEST else ""
    return _parser(int, lambda value: least <= value <= most, f"whole numbers{text}")


def number(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """A flag's ``type``: finite numbers; ``above`` and ``below`` do not belong to the range."""

    def allowed(value: float) -> bool:
        return math.isfinite(value) and least <= value <= most and above < value < below

    ends = ((">", above), (">=", least), ("<=", most), ("<", below))
    given = [f"{sign} {end:g}" for sign, end in ends if math.isfinite(end)]
    return _parser(float, allowed, f"numbers {' and '.join(given)}" if given else "finite numbers")


def separated[T](kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A flag's ``type``: values of another type separated by commas."""

    def parse(text: str) -> list[T]:
        try:
            return [kind(word) for word in text.split(",")]
        except argparse.ArgumentTypeError as error:
            allowed = str(error).partition("; allowed: ")[2]
            raise argparse.ArgumentTypeError(
                f"is {text!r}; allowed: {allowed}, separated by commas"
            ) from None

    return parse


def variable[T](name: str, default: str, kind: Callable[[str], T]) -> T:
    """A setting of a program that takes environment variables instead of flags.

    Raises:
        UserError: another value than ``kind`` lets through.
    """
    try:
        return kind(os.environ.get(name, default))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name} {error}") from None


def _parser[T](kind: Callable[[str], T], is_allowed: Callable[[T], bool], allowed: str) -> Callable[[str], T]:
    def parse(text: str) -> T:
        shown = text
        try:
            value = kind(text)
            if is_allowed(value):
                return value
        except ValueError:
            shown = repr(text)
        raise argparse.ArgumentTypeError(f"is {shown}; allowed: {allowed}")

    return parse


# How a command ends -------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM, so that a command cleans up as after Ctrl-C."""


@contextmanager
def command(program: str = "megatron-fope") -> Iterator[None]:
    """The frame of a command: whatever a user or the machine does to it ends it with one line.

    Bad input, and files that cannot be read or written: exit code 2; Ctrl-C: 130; SIGTERM: 143; a reader
    that closes standard output (``| head``): 141, without a word.
    """
    with interruptible(program), _terminable(), exit_on_user_error(program):
        failed: OSError | None = None
        try:
            yield
        except OSError as error:
            failed = error
        finally:
            gone, broken = _reader_is_gone(), _flush()
        if gone and (failed or broken):
            sys.exit(128 + signal.SIGPIPE)
        if broken:
            raise UserError(f"standard output: {broken.strerror}")
        if failed:
            raise UserError(describe_os_error(failed))


@contextmanager
def interruptible(program: str = "megatron-fope") -> Iterator[None]:
    """Ctrl-C ends with one line of rank 0 and the exit code of shells, 130."""
    try:
        yield
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        if is_rank0():
            print(f"{program}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))


def describe_os_error(error: OSError) -> str:
    """An error of a file in one line, with the names that the system tells."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*(names or ["input or output"]), error.strerror or str(error) or type(error).__name__])


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no file, or closed
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _flush() -> OSError | None:
    """Write out standard output; where it takes no more, drop the rest, of which Python would complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return error
    return None


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM, in this process only: forks end as they always do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
