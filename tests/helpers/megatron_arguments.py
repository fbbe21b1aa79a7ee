"""Command lines in Megatron's own parser and validation, for tests that run on a rank."""

from __future__ import annotations

import argparse
import contextlib
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
from megatron_fope.common.errors import exit_on_user_error

TINY_MODEL = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "1", "--lr", "1e-3"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
]
"""16 channels per head and 4 KV heads."""
FOPE = ["--position-embedding-type", "fope"]
ROPE = ["--position-embedding-type", "rope"]


def outcome(action: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run something that may exit.

    Returns:
        Exit ``code``, None if it did not exit; ``error``, the traceback of anything else; what it wrote to
        ``stderr``; and its result as ``args``.
    """
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


def validated(ranks: int, flags: list[str]) -> argparse.Namespace:
    """Megatron's arguments as rank 0 of a complete launch has them before it initialises anything."""
    from megatron.training import arguments

    from megatron_fope.training.pretrain import check_args

    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["train", *cpu.add_argument_defaults(flags)]
    args = arguments.parse_args()
    arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    with exit_on_user_error():
        check_args(args)
    return args


def validate_all(cases: dict[str, dict[str, Any]], answer: str) -> None:
    """Write ``{name: outcome}`` of :func:`validated` as JSON, with the arguments that it can hold."""
    from megatron_fope import register

    register()
    outcomes = {name: outcome(lambda case=case: validated(**case)) for name, case in cases.items()}
    for found in outcomes.values():
        if found["args"] is not None:
            found["args"] = {
                name: value
                for name, value in vars(found["args"]).items()
                if isinstance(value, int | float | str | bool | None)
            }
    Path(answer).write_text(json.dumps(outcomes))


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments without FoPE's own, comparable."""
    return {name: repr(value) for name, value in vars(args).items() if not name.startswith("fope_")}


def fope_values(args: argparse.Namespace) -> dict[str, Any]:
    """FoPE's own arguments without their prefix."""
    return {name.removeprefix("fope_"): v for name, v in vars(args).items() if name.startswith("fope_")}
