"""``megatron-fope ladder``: the flags, and what the command prints."""

from __future__ import annotations

import argparse
import shlex

from megatron_fope.common.command_line import whole
from megatron_fope.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.usage = "megatron-fope ladder SCHEDULE [--run] [--stage N] [-- MEGATRON FLAGS]"
    parser.description = (
        "Several context lengths one after another. Prints every stage's complete Megatron command after "
        "checking that the stages fit each other, the model and the checkpoint that they start from; with "
        "--run also runs them. A finished stage is skipped, an interrupted one goes on from its last "
        "checkpoint. The format of SCHEDULE: python -m pydoc megatron_fope.tools.ladder.schedule"
    )
    add = parser.add_argument
    add("schedule", metavar="SCHEDULE", help="TOML file")
    add("--run", action="store_true", help="run the stages, each in its own processes")
    add("--stage", type=whole(), metavar="N", help="print or run only this one, from 1")


def run(args: argparse.Namespace, extra: list[str]) -> int:
    """Run the command.

    Args:
        args: its arguments.
        extra: Megatron's flags behind ``--``, for every stage.

    Returns:
        Exit code: 0, or what :func:`megatron_fope.tools.ladder.execution.run` says.

    Raises:
        UserError: bad input, before anything runs.
    """
    from megatron_fope.tools.ladder import execution
    from megatron_fope.tools.ladder.plan import plan
    from megatron_fope.tools.ladder.schedule import read_schedule

    schedule = read_schedule(args.schedule)
    count = len(schedule.stages)
    if args.stage is not None and not 1 <= args.stage <= count:
        raise UserError(f"--stage is {args.stage}; allowed: 1 to {count}")
    plans = plan(schedule, extra)
    chosen = [stage for stage in plans if args.stage in (None, stage.number)]
    if args.run:
        if not plans[0].source_read:
            raise UserError(
                f"--run is given, but there is no checkpoint in {schedule.start['checkpoint']!r}; use a "
                "folder made by --save"
            )
        return execution.run(plans, chosen)
    for stage in chosen:
        done = execution.saved_iteration(stage)
        state = f"iteration {done} of {stage.iterations} is in {stage.folder}" if done else "not started"
        lines = [f"stage {stage.number} of {count} ({stage.name})", *stage.notes, state]
        print("\n".join(f"# {line}" for line in lines))
        print(_shell(stage.launcher, stage.flags), end="\n\n")
    return 0


def _shell(launcher: list[str], flags: list[str]) -> str:
    """A command for a shell, with a flag and its values on each line."""
    lines = [shlex.join(launcher)]
    for word in flags:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)
