"""Whether a training on CPUs fits into this machine's memory, told before it starts."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron_fope.arguments.layout import Layout
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import announce
from megatron_fope.tools.planning.model import read_model, read_training
from megatron_fope.tools.planning.search import memory_of

_PROCESS = 0.6 * 2**30
"""Bytes of a rank without a model: Python, PyTorch and Megatron."""


def check_host_memory(args: Any) -> None:
    """Refuse a run on the CPU that this machine cannot hold; warn of one that it cannot hold now.

    Says nothing where the memory of such a model is not known.

    Args:
        args: Megatron's, validated.

    Raises:
        UserError: what the run needs, and what there is.
    """
    needed = host_bytes(args)
    if needed is None:
        return
    total, free = host_memory()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = (
        f"--seq-length {args.seq_length} with --micro-batch-size {args.micro_batch_size} takes about "
        f"{_gib(needed)} on this machine ({ranks} rank{'s' if ranks > 1 else ''})"
    )
    if needed > total:
        raise UserError(
            f"{text}, which has {_gib(total)}; use shorter sequences, or --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 1"
        )
    if needed > free:
        announce(f"warning: {text}, of which {_gib(free)} are free now", about="CPU runtime")


def host_bytes(args: Any) -> float | None:
    """What all ranks on this machine hold at the most, if each holds as much as the largest.

    The vocabulary of a tokenizer that is not open yet is not counted (``--vocab-size`` counts).

    Args:
        args: Megatron's, validated.

    Returns:
        Bytes; None for what ``megatron-fope plan`` does not know.
    """
    args = copy.copy(args)
    args.vocab_size = getattr(args, "padded_vocab_size", None) or args.vocab_size or 1
    try:
        model, training = read_model(args), read_training(args)
    except UserError:
        return None
    backend = getattr(args.attention_backend, "name", args.attention_backend)
    fused = backend == "auto" and not args.attention_dropout and not getattr(args, "window_size", None)
    fused = fused and getattr(args, "softmax_type", "vanilla") == "vanilla" and not training.mask
    training = dataclasses.replace(training, flash=fused)
    layout = Layout.of(args)
    rank = max(memory_of(model, training, layout, stage).total for stage in range(layout.pp))
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * (rank + _PROCESS)


def host_memory() -> tuple[float, float]:
    """Bytes of memory of this machine or container, and how many of them are free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():  # counts what the file cache would give back
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total, min(total, free)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
