"""Running a ladder's stages one after another."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_fope.checkpoint.files import tracked_iteration
from megatron_fope.common.errors import UserError
from megatron_fope.tools.ladder.plan import StagePlan, check_saved


def saved_iteration(stage: StagePlan) -> int:
    """How far a stage is: the iteration of its latest complete checkpoint, 0 without one.

    Raises:
        UserError: its folder holds something else.
    """
    step = tracked_iteration(stage.folder)
    if step is None:
        return 0
    from megatron_fope.checkpoint.reader import open_checkpoint

    where = f"stage {stage.number}: its folder"
    if isinstance(step, str):
        raise UserError(f"{where} is {str(stage.folder)!r}: it holds a {step}; give the stage another name")
    check_saved(stage, open_checkpoint(stage.folder, step, name=where).args)
    return step


def run(plans: Sequence[StagePlan], chosen: Sequence[StagePlan]) -> int:
    """Run what is not finished, in order, and stop at the first stage that does not finish.

    Args:
        plans: the whole ladder.
        chosen: the stages to run.

    Returns:
        0, the exit code of a command that failed, or 1 when one ended well before its last iteration,
        as with ``--exit-duration-in-mins``; the same call goes on then.

    Raises:
        UserError: the stage before the first one chosen is not finished.
    """
    done = {stage.number: saved_iteration(stage) for stage in plans}  # what is refused is refused first
    first = chosen[0].number
    for stage in plans[: first - 1][-1:]:
        if done[stage.number] < stage.iterations and not done[first]:
            raise UserError(
                f"--stage is {first}, but stage {stage.number} ({stage.folder}) is at iteration "
                f"{done[stage.number]} of {stage.iterations}; finish it first"
            )
    for stage in chosen:
        name = f"stage {stage.number} of {len(plans)} ({stage.name})"
        if done[stage.number] >= stage.iterations:
            _say(f"{name} is finished: iteration {done[stage.number]} in {stage.folder}")
            continue
        how = f"goes on from iteration {done[stage.number]}" if done[stage.number] else "starts"
        _say(f"{name} {how}, {stage.iterations} iterations in all")
        code = _call(stage.argv)
        if code:
            _say(f"{name} ended with exit code {code}; the same command goes on")
            return code
        now = saved_iteration(stage)
        if now < stage.iterations:
            _say(f"{name} stopped at iteration {now} of {stage.iterations}; the same command goes on")
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
