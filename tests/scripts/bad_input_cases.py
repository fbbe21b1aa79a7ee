"""Feed command lines to Megatron's argument handling with FoPE registered, many in one process.

Reads ``{"folder", "checkpoints": {name: {"flags", "format"}}, "cases": {name: {...}}}`` from standard input
and prints ``{name: outcome}`` as the last line of standard output. An outcome holds ``code`` (exit code, None
when nothing was refused), ``error`` (the traceback of anything else), ``stderr`` and ``args``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fope import cpu

TINY_MODEL = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "1", "--lr", "1e-3"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
]
"""16 channels per head and 4 KV heads."""


def outcome(action: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run something that may exit; see the module's docstring."""
    code, error, result = None, None, None
    stderr, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        try:
            result = action(*arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            error = traceback.format_exc()
    return {"code": code, "error": error, "stderr": stderr.getvalue(), "args": result}


def start(flags: list[str], *, complete: bool = True, extra: list[str] | None = None) -> argparse.Namespace:
    """What Megatron does with a command line before it initialises anything, in Megatron's order.

    Args:
        flags: added to :data:`TINY_MODEL`; later ones win.
        complete: add the flags that a CPU needs.
        extra: switches that a training script adds to Megatron's parser.
    """

    def add_extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for switch in extra or []:
            parser.add_argument(switch, action="store_true")
        return parser

    from megatron.training import arguments, checkpointing

    argv = [*TINY_MODEL, *flags]
    sys.argv = ["train", *(cpu.add_argument_defaults(argv) if complete else argv)]
    args = arguments.parse_args(add_extra)
    if args.use_checkpoint_args:
        checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args, {})
    if args.load:
        checkpointing._load_base_checkpoint(args.load, args, rank0=True)
    return args


def save_checkpoint(folder: Path, args: argparse.Namespace, form: str) -> None:
    """A checkpoint with arguments and no weights, as far as Megatron looks at it before it loads weights."""
    import torch
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from torch.distributed.checkpoint.metadata import Metadata

    state = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    iteration = folder / "iter_0000001"
    rank = iteration / "mp_rank_00"
    rank.mkdir(parents=True)
    if form == "torch_dist":
        torch.save(state, iteration / "common.pt")
        save_config(CheckpointingConfig("torch_dist"), str(iteration))
        (iteration / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    else:
        torch.save(state, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def command(argv: list[str]) -> None:
    """``megatron-fope argv``."""
    from megatron_fope.tools.cli import main

    sys.exit(main(argv))


def scalars(args: argparse.Namespace | None) -> dict[str, Any] | None:
    """The arguments that JSON can hold."""
    if args is None:
        return None
    return {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | bool | None)}


def main() -> None:
    """Make the checkpoints, run the cases, print the outcomes."""
    request = json.load(sys.stdin)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    cpu.enable()
    from megatron_fope import register

    register()
    folder = Path(request["folder"])
    for name, checkpoint in request["checkpoints"].items():
        with contextlib.redirect_stdout(io.StringIO()):
            args = start(checkpoint["flags"])
        save_checkpoint(folder / name, args, checkpoint["format"])
    outcomes = {}
    for name, case in request["cases"].items():
        if case["command"] is not None:
            outcomes[name] = outcome(command, case["command"])
        else:
            outcomes[name] = outcome(
                functools.partial(start, case["flags"], complete=case["complete"], extra=case["extra"])
            )
        outcomes[name]["args"] = scalars(outcomes[name]["args"])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
