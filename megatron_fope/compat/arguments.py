"""Megatron's command line."""

from __future__ import annotations

import argparse
from types import ModuleType

from megatron_fope.compat.versions import megatron_version


def modules_that_import(name: str, home: ModuleType) -> list[ModuleType]:
    """Modules of ``megatron.training`` that call a function through a name of their own.

    0.17's ``initialize`` imports ``validate_args`` and ``load_args_from_checkpoint`` by value; 0.18 and later
    only use them through the module that defines them.

    Args:
        name: the function's name.
        home: the module that defines it.

    Returns:
        ``home`` and every further module that holds the same function.
    """
    from megatron.training import initialize

    function = getattr(home, name, None)
    holds = function is not None and getattr(initialize, name, None) is function
    return [home, initialize] if holds else [home]


def repair_help_texts(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--help`` print Megatron's flags.

    0.19 has a bare percent sign in the help of one flag, which argparse takes for a format and stops at.
    """
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help and action.help.replace("%", "%%")
    return parser


def null_tokenizer_flags(vocab_size: int) -> list[str]:
    """Flags for tokens that are numbers already, of which the last id ends a document.

    Through 0.17 ``NullTokenizer`` adds the end of document after ``--vocab-size`` ids; from 0.18 on it is
    the last of them.

    Args:
        vocab_size: number of ids, the end of document included.
    """
    size = vocab_size - null_tokenizer_adds()
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]


def null_tokenizer_adds() -> int:
    """Ids that ``NullTokenizer`` has beside the ``--vocab-size`` ones."""
    return int(megatron_version().release < (0, 18))
