"""Differences between Megatron's and transformers' logits, kept for the table of ``tests/agreement.py``."""

from __future__ import annotations

import json
import os

from torch import Tensor

VARIABLE = "MEGATRON_FOPE_AGREEMENT"
"""Names the file that rows are added to; without it nothing is kept."""


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def keep(family: str, direction: str, layout: str, transformers: str, difference: float | None) -> None:
    """A row of the table.

    Args:
        family: the model.
        direction: "in", "out" or "in and out".
        layout: of the checkpoint's ranks.
        transformers: its version.
        difference: see :func:`relative_difference`; None: the weights were equal bit for bit.
    """
    if file := os.environ.get(VARIABLE):
        with open(file, "a") as stream:
            stream.write(json.dumps([family, direction, layout, transformers, difference]) + "\n")
