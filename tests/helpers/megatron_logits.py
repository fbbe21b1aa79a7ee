"""What Megatron computes with checkpoints, on one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from forks import Launcher
from torch import Tensor

Compute = Callable[[Tensor], Tensor]
"""Tokens ``[batch, tokens]`` to logits ``[batch, tokens, vocabulary with padding]``."""


def megatron_logits(
    launcher: Launcher, checkpoints: Sequence[Path], tokens: Tensor, folder: Path, *flags: str
) -> list[Tensor]:
    """Logits of every checkpoint for the same tokens, in one launch.

    Args:
        launcher: starts the rank.
        checkpoints: folders for ``--load``.
        tokens: ``[batch, tokens]``.
        folder: for files.
        *flags: more of Megatron's.
    """
    given, found = folder / "tokens.pt", folder / "megatron_logits.pt"
    torch.save(tokens, given)
    call = (_write_logits, [str(path) for path in checkpoints], str(given), str(found), flags)
    code, text = launcher.call(*call, log=folder / "log")
    assert code == 0, text[-6000:]
    return torch.load(found)


@contextmanager
def loaded(checkpoint: str, *flags: str) -> Iterator[Compute]:
    """In a rank: the model of a checkpoint."""
    sys.argv = ["megatron-fope", "--load", checkpoint, "--no-load-optim", "--no-load-rng"]
    sys.argv += [
        "--micro-batch-size",
        "1",
        "--tensor-model-parallel-size",
        "1",
        "--transformer-impl",
        "local",
    ]
    sys.argv += flags
    from megatron_fope.training.launch import prepare

    prepare(cpu=True)
    from megatron_fope.tools.evaluation.model import load_model, unload_models

    models = load_model(checkpoint)

    @torch.no_grad()
    def compute(tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1)).expand_as(tokens).contiguous()
        return models[0](tokens, positions, None)

    yield compute
    models.clear()
    unload_models()


def _write_logits(checkpoints: list[str], tokens: str, logits: str, flags: Sequence[str]) -> None:
    found = []
    for checkpoint in checkpoints:
        with loaded(checkpoint, *flags) as compute:
            found.append(compute(torch.load(tokens)))
    torch.save(found, logits)
