"""Running a ladder's stages one after another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_fope.checkpoint.files import tracked_iteration
from megatron_fope.common.errors import UserError
from megatron_fope.tools.ladder.plan import Rung, check_saved


def saved_iteration(rung: Rung) -> int:
    """How far a stage is: the iteration of its latest complete checkpoint, 0 without one.

    Raises:
        UserError: its folder holds something else.
    """
    step = tracked_iteration(rung.folder)
    if step is None:
        return 0
    from megatron_fope.tools.conversion.source import open_checkpoint

    where = f"stage {rung.number}: its folder"
    if isinstance(step, str):
        raise UserError(f"{where} is {str(rung.folder)!r}: it holds a {step}; give the stage another name")
    check_saved(rung, open_checkpoint(rung.folder, step, name=where).args)
    return step


def run(rungs: Sequence[Rung], chosen: Sequence[Rung]) -> int:
    """Run what is not finished, in order, and stop at the first stage that does not finish.

    Args:
        rungs: the whole ladder.
        chosen: the stages to run.

    Returns:
        0, the exit code of a command that failed, or 1 when one ended well before its last iteration,
        as with ``--exit-duration-in-mins``; the same call goes on then.

    Raises:
        UserError: the stage before the first one chosen is not finished.
    """
    done = {rung.number: saved_iteration(rung) for rung in rungs}  # what is refused is refused first
    first = chosen[0].number
    for rung in rungs[: first - 1][-1:]:
        if done[rung.number] < rung.iterations and not done[first]:
            raise UserError(
                f"--stage is {first}, but stage {rung.number} ({rung.folder}) is at iteration "
                f"{done[rung.number]} of {rung.iterations}; finish it first"
            )
    for rung in chosen:
        name = f"stage {rung.number} of {len(rungs)} ({rung.stage.name})"
        if done[rung.number] >= rung.iterations:
            _say(f"{name} is finished: iteration {done[rung.number]} in {rung.folder}")
            continue
        how = f"goes on from iteration {done[rung.number]}" if done[rung.number] else "starts"
        _say(f"{name} {how}, {rung.iterations} iterations in all")
        code = _call(rung.argv)
        if code:
            _say(f"{name} ended with exit code {code}; the same command goes on")
            return code
        now = saved_iteration(rung)
        if now < rung.iterations:
            _say(f"{name} stopped at iteration {now} of {rung.iterations}; the same command goes on")
            return 1
    return 0


def _call(argv: list[str]) -> int:
    """Run a command; a request to end (SIGTERM) goes to it, so that it can save."""
    try:
        process = subprocess.Popen(argv)
    except OSError as error:
        raise UserError(f"launcher starts with {argv[0]!r}: {error.strerror}") from None

    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return 128 - code if code < 0 else code


def _say(text: str) -> None:
    print(f"> ladder: {text}", file=sys.stderr, flush=True)
