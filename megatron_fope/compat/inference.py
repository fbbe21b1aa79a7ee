"""Inference contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def token_positions(context: Any) -> Tensor:
    """Position of each token of a dynamic batch in its own request, on the device that computes.

    0.17: a field of the context; 0.18 and later: at a fixed address in its ``gpu_view``, while the field of
    the context is bookkeeping on the host.

    Args:
        context: ``DynamicInferenceContext``.

    Returns:
        ``[max tokens]`` integer; only the first tokens of it are in use.
    """
    return (getattr(context, "gpu_view", None) or context).token_to_pos_ids
