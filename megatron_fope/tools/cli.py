"""``megatron-fope`` and ``python -m megatron_fope``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from megatron_fope import __version__
from megatron_fope.common.command_line import OneLineParser, command, interruptible
from megatron_fope.common.errors import UserError, exit_on_user_error

_USAGE = """\
megatron-fope [--cpu] SCRIPT.py [Megatron's arguments]   run a Megatron training script with FoPE available
megatron-fope [--cpu] pretrain [Megatron's arguments]    GPT pre-training from the megatron-core wheel alone
megatron-fope COMMAND ...                                one of those below; COMMAND --help explains it
"""
_DESCRIPTION = """\
Training runs one process per rank: torchrun --nproc-per-node N -m megatron_fope ...
Switch FoPE on with --position-embedding-type fope; `megatron-fope pretrain --help` lists the --fope-* flags.
"""


@dataclass(frozen=True)
class Command:
    """One of :data:`COMMANDS`; its module is imported when the command is asked for."""

    module: str
    """Below ``megatron_fope``."""
    help: str
    add: str = "add_arguments"
    """The module's function that adds the flags to a parser."""
    run: str = "run"
    """The module's function that takes the arguments and returns the exit code."""
    takes_words: bool = False
    """``run`` also takes the words behind ``--``, Megatron's flags."""

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the module."""
        return getattr(import_module(f"megatron_fope.{self.module}"), name)


_CONVERSION = "tools.conversion.command"
_HUGGING_FACE = "tools.huggingface.command"
COMMANDS = {
    "prepare-data": Command("tools.data.command", "text to Megatron's .bin/.idx"),
    "make-recall-data": Command("tools.data.recall_command", "associative recall to train on"),
    "evaluate-perplexity": Command(
        "tools.evaluation.perplexity_command", "perplexity of checkpoints over context lengths"
    ),
    "evaluate-retrieval": Command(
        "tools.evaluation.retrieval_command", "what checkpoints find in long contexts"
    ),
    "convert": Command(
        _CONVERSION,
        "RoPE checkpoint to FoPE, FoPE to a longer FoPE, or back, without rewriting the data",
        add="add_convert",
        run="run_convert",
    ),
    "import": Command(
        _HUGGING_FACE, "a model of Hugging Face as a checkpoint", add="add_import", run="run_import"
    ),
    "export": Command(
        _HUGGING_FACE, "a checkpoint as a model of Hugging Face", add="add_export", run="run_export"
    ),
    "inspect": Command(_CONVERSION, "what a checkpoint holds", add="add_inspect", run="run_inspect"),
    "diff": Command(_CONVERSION, "how two checkpoints differ", add="add_diff", run="run_diff"),
    "ladder": Command("tools.ladder.command", "several context lengths, stage by stage", takes_words=True),
    "plan": Command("tools.planning.command", "memory of a rank, and layouts that fit", takes_words=True),
    "env": Command("tools.environment", "versions, GPUs and back ends"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        argv: arguments without the program's name; None takes them from ``sys.argv``.

    Returns:
        Exit code; what a user can mend exits with 2 after one line on standard error, see
        :func:`megatron_fope.common.command_line.command` for the others.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    cpu = argv[:1] == ["--cpu"]
    argv = argv[cpu:]
    if argv and (argv[0] == "pretrain" or argv[0].endswith(".py")):
        with interruptible(), exit_on_user_error():  # other errors of a training are not ours to shorten
            _train(argv, cpu)
            return 0
    with command():
        return _run(argv, cpu)


def _train(argv: list[str], cpu: bool) -> None:
    from megatron_fope.training import launch

    if argv[0] == "pretrain":
        from megatron_fope.tools.planning.host import check_host_memory

        cpu = cpu or "--cpu" in argv
        words = [word for word in argv[1:] if word != "--cpu"]
        launch.run_pretraining(words, cpu=cpu, check=check_host_memory if cpu else None)
    else:
        launch.run_script(argv[0], argv[1:], cpu=cpu)


def _run(argv: list[str], cpu: bool) -> int:
    if cpu:
        if not argv or argv[0] not in ("evaluate-perplexity", "evaluate-retrieval"):
            raise UserError(
                "--cpu goes in front of a training script, 'pretrain', 'evaluate-perplexity' or "
                f"'evaluate-retrieval', not {argv[0] if argv else 'nothing'!r}"
            )
        argv = [argv[0], "--cpu", *argv[1:]]
    parser = OneLineParser(
        prog="megatron-fope",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-fope {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", prog="megatron-fope")
    asked = COMMANDS.get(argv[0]) if argv else None
    for name, one in COMMANDS.items():
        own = commands.add_parser(name, help=one.help)
        if one is asked:  # some flags take an import of torch
            one.function(one.add)(own)
    behind: list[str] = []
    # argparse takes a positional and such words together only
    if asked and asked.takes_words and "--" in argv:
        argv, behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments = parser.parse_args(argv)
    if asked is None:
        parser.print_help()
        return 2
    return asked.function(asked.run)(arguments, *([behind] if asked.takes_words else []))
