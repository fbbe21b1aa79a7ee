"""Megatron's own flags, read without starting it: no GPU, no process group."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from megatron_fope import compat
from megatron_fope.arguments.flags import add_fope_arguments
from megatron_fope.common.command_line import OneLineParser
from megatron_fope.common.log import quiet_imports


def megatron_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the Megatron that is imported, with FoPE's flags; takes seconds.

    Args:
        prog: name of the command.

    Raises:
        UserError: there is no Megatron that is supported.
    """
    with quiet_imports():
        compat.require_supported_megatron()
        from megatron.training import arguments

        parser = OneLineParser(prog=prog)
        arguments.add_megatron_arguments(parser)
    return add_fope_arguments(parser)


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """What Megatron's parser makes of flags, before Megatron validates them.

    Raises:
        UserError: an unknown flag or a value of the wrong kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.parse_args(words)
