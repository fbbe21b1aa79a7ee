"""A patched Megatron: what parsing does without the package, and trainings with it. Prints JSON.

The patched tree must come first on ``PYTHONPATH``. All runs are forks of one process.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS / "helpers"))

from forks import import_megatron, run_ranks  # noqa: E402
from launch import TINY_MODEL, losses  # noqa: E402

PLAIN = TESTS / "scripts" / "plain_pretrain.py"
TYPE = "--position-embedding-type"


def ending(action: Callable[[], Any]) -> str:
    """What an action says when it ends the program; empty if it does not."""
    try:
        action()
    except SystemExit as error:
        return str(error.code)
    return ""


def without_the_package() -> dict[str, Any]:
    """Parsing and validating where ``import megatron_fope`` fails."""
    from megatron.training import arguments

    from megatron_fope import cpu

    def parse(*flags: str) -> Any:
        sys.argv = ["script.py", *cpu.add_argument_defaults(TINY_MODEL), *flags]
        return arguments.parse_args()

    def validate_fope_from_a_checkpoint() -> None:
        args = parse(TYPE, "rope")
        args.position_embedding_type = "fope"
        arguments.validate_args(args)

    package, sys.modules["megatron_fope"] = sys.modules["megatron_fope"], None
    try:
        return {
            "rope": ending(lambda: parse(TYPE, "rope", "--save", "fope")),
            "fope": ending(lambda: parse(TYPE, "fope")),
            "fope=": ending(lambda: parse(f"{TYPE}=fope")),
            "fope flag": ending(lambda: parse("--fope-gain", "0.5")),
            "checkpoint": ending(validate_fope_from_a_checkpoint),
        }
    finally:
        sys.modules["megatron_fope"] = package


def train(action: Callable[[], Any]) -> dict[str, Any]:
    """Losses and log of a forked run."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = run_ranks(1, action, log, timeout=300)
        text = log.read_text(errors="replace")
    return {"code": code, "losses": losses(text), "log": text}


def plain(*flags: str) -> dict[str, Any]:
    """A script that only calls Megatron, as ``torchrun script.py`` would start it."""
    from megatron_fope import cpu

    def action() -> None:
        sys.argv = [str(PLAIN), *cpu.add_argument_defaults([*TINY_MODEL, *flags])]
        runpy.run_path(str(PLAIN), run_name="__main__")

    return train(action)


def launched(*flags: str) -> dict[str, Any]:
    """The same run by this package's launcher."""

    def action() -> int:
        from megatron_fope.tools.cli import main

        return main(["--cpu", "pretrain", *TINY_MODEL, *flags])

    return train(action)


if __name__ == "__main__":
    import_megatron()
    import megatron.training.arguments

    outcomes = {
        "file": megatron.training.arguments.__file__,
        "without the package": without_the_package(),
        "fope": plain(TYPE, "fope", "--fope-gain", "0.6"),
        "launched": launched(TYPE, "fope", "--fope-gain", "0.6"),
        "rope": plain(TYPE, "rope"),
    }
    print(json.dumps(outcomes))
