"""Checkpoints: what one holds, how two differ, and RoPE to FoPE and back without rewriting the model's data.

Nothing here needs a GPU, a process group or Megatron. The functions are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_EXPORTS = {
    "Comparison": "comparison",
    "Conversion": "converter",
    "Inspection": "inspection",
    "convert": "converter",
    "diff": "comparison",
    "inspect": "inspection",
}

__all__ = ["Comparison", "Conversion", "Inspection", "convert", "diff", "inspect"]

if TYPE_CHECKING:
    from megatron_fope.tools.conversion.comparison import Comparison, diff
    from megatron_fope.tools.conversion.converter import Conversion, convert
    from megatron_fope.tools.conversion.inspection import Inspection, inspect


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megatron_fope.tools.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_fope.tools.conversion.{_EXPORTS[name]}"), name)
