"""``megatron-fope`` and ``python -m megatron_fope``."""

from __future__ import annotations

import argparse
import sys

from megatron_fope import __version__
from megatron_fope.errors import UserError, exit_on_user_error

_USAGE = """\
megatron-fope [--cpu] SCRIPT.py [Megatron's arguments]   run a Megatron training script with FoPE available
megatron-fope [--cpu] pretrain [Megatron's arguments]    GPT pre-training from the megatron-core wheel alone
megatron-fope prepare-data ...                           text to Megatron's .bin/.idx
megatron-fope make-recall-data ...                       associative recall to train on, as .bin/.idx
megatron-fope evaluate-perplexity ...                    perplexity of checkpoints over context lengths
megatron-fope evaluate-retrieval ...                     what checkpoints find in long contexts
megatron-fope convert SOURCE TARGET ...                  RoPE checkpoint to FoPE, or FoPE to a longer FoPE
megatron-fope inspect FOLDER | diff A B                  what checkpoints hold, how two differ
megatron-fope ladder SCHEDULE [--run]                    several context lengths, stage by stage
megatron-fope plan --gpus N ... -- [Megatron's arguments]
                                                         memory of a rank, and parallel layouts that fit
megatron-fope env                                        versions, GPUs and back ends, for bug reports
megatron-fope bench ...                                  speed, memory and communication beside RoPE
"""
_DESCRIPTION = """\
Training runs one process per rank: torchrun --nproc-per-node N -m megatron_fope ...
Switch FoPE on with --position-embedding-type fope; `megatron-fope pretrain --help` lists the --fope-* flags.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command.

    Args:
        argv: arguments without the program's name; None takes them from ``sys.argv``.

    Returns:
        Exit code; bad input exits with 2 after one line on standard error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        return _dispatch(argv)


def _dispatch(argv: list[str]) -> int:
    cpu = bool(argv) and argv[0] == "--cpu"
    if cpu:
        argv = argv[1:]
    if argv and argv[0].endswith(".py"):
        from megatron_fope.launch import run_script

        run_script(argv[0], argv[1:], cpu=cpu)
        return 0
    if argv and argv[0] == "pretrain":
        from megatron_fope.launch import run_pretraining

        run_pretraining([a for a in argv[1:] if a != "--cpu"], cpu=cpu or "--cpu" in argv)
        return 0
    if cpu:
        if not argv or argv[0] not in ("evaluate-perplexity", "evaluate-retrieval"):
            raise UserError(
                "--cpu goes in front of a training script, 'pretrain', 'evaluate-perplexity' or "
                f"'evaluate-retrieval', not {argv[0] if argv else 'nothing'!r}"
            )
        argv = [argv[0], "--cpu", *argv[1:]]
    parser = argparse.ArgumentParser(
        prog="megatron-fope",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-fope {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="megatron-fope")
    from megatron_fope import environment
    from megatron_fope.bench import command as bench
    from megatron_fope.conversion import command as conversion
    from megatron_fope.data import command as preparation
    from megatron_fope.data import recall_command as recall
    from megatron_fope.evaluation import command as evaluation
    from megatron_fope.evaluation import retrieval_command as retrieval
    from megatron_fope.ladder import command as ladder
    from megatron_fope.planning import command as planning

    preparation.add_arguments(commands.add_parser("prepare-data", help="text to Megatron's .bin/.idx"))
    recall.add_arguments(commands.add_parser("make-recall-data", help="associative recall to train on"))
    evaluation.add_arguments(
        commands.add_parser("evaluate-perplexity", help="perplexity of checkpoints over context lengths")
    )
    retrieval.add_arguments(
        commands.add_parser("evaluate-retrieval", help="what checkpoints find in long contexts")
    )
    ladder.add_arguments(commands.add_parser("ladder", help="several context lengths, stage by stage"))
    planning.add_arguments(commands.add_parser("plan", help="memory of a rank, and layouts that fit"))
    environment.add_arguments(commands.add_parser("env", help="versions, GPUs and back ends"))
    bench.add_arguments(commands.add_parser("bench", help="speed, memory and communication beside RoPE"))
    for name, text in conversion.COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv[:1]:  # its flags take an import of torch
            conversion.add_arguments(name, command)
    behind: list[str] = []
    # argparse takes a positional and such words together only
    if argv[:1] in (["ladder"], ["plan"]) and "--" in argv:
        argv, behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments = parser.parse_args(argv)
    if arguments.command in conversion.COMMANDS:
        return conversion.run(arguments.command, arguments)
    if arguments.command in ("ladder", "plan"):
        return {"ladder": ladder, "plan": planning}[arguments.command].run(arguments, behind)
    commands_alone = {
        "prepare-data": preparation,
        "make-recall-data": recall,
        "evaluate-perplexity": evaluation,
        "evaluate-retrieval": retrieval,
        "env": environment,
        "bench": bench,
    }
    if arguments.command in commands_alone:
        return commands_alone[arguments.command].run(arguments)
    parser.print_help()
    return 2
