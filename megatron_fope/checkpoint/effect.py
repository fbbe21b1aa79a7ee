"""What the starts from RoPE do to a model that is trained already, in words for logs."""

from __future__ import annotations

import math

from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry

PAGE = "docs/from-rope.md"
"""Where the measurements are, in the repository."""

_MEASURED = {(True, "0,1"): "1.87 to 2.04", (False, "0,1"): "1.80 to 4.67",
             (True, "1,1"): "1.87 to 4.75", (False, "1,1"): "1.80 to 6.38"}  # fmt: skip
"""Loss of SmolLM2-135M, trained at 8192 tokens, in windows of 2048 before and right after an immediate
conversion; by whether every kept frequency has a series, and by ``pad_value``."""

_FAR = "1.90 to 5.25"
"""The same at positions 4096 to 8191 of one long window, with the clip alone."""


def start_effect(way: str, geometry: Geometry) -> str:
    """What a start that changes the function does to it, with what was measured.

    Args:
        way: "immediate" or "clip-only".
        geometry: FoPE's, of the model that starts.
    """
    config = geometry.config
    if not geometry.num_clipped and geometry.d_out == geometry.head_dim // 2:
        return f"{way} clips nothing here; only the noise of the series changes what the model computes"
    pad = config.pad_value if config.drop_clipped else "0,1"  # frequencies of zero turn nothing
    if config.fold_padding:
        pad = "0,1"  # which it is the function of
    near = _MEASURED[geometry.d_out >= geometry.d_in, pad]
    return (
        f"{way} changes what a trained model computes: with settings like these the loss of SmolLM2-135M "
        f"went from {near} in windows of 2048 tokens, and by the clip alone from {_FAR} at positions 4k to "
        f"8k; --fope-start-from-rope function-preserving does not jump ({PAGE})"
    )


def describe_folding(geometry: Geometry) -> str:
    """What folding the padding did to the weights, in one line."""
    half = geometry.head_dim // 2
    return (
        f"the padding is folded: query and key weights of {half - geometry.d_out} of {half} channel pairs "
        "are divided by the square root of 2, so that padding 1,1 is the function of 0,1"
    )


def describe_scaling(config: FoPEConfig) -> str:
    """A length extension with its numbers."""
    parts = []
    if config.scaling == "pi":
        parts.append(f"from {config.original_length} to {config.train_length} tokens")
    elif config.scaling != "none":
        parts.append(f"factor {config.scaling_factor:g}")
        if config.scaling != "linear":
            parts.append(f"from {config.original_length} tokens")
    parts.append(f"sin and cos times {config.attention_scaling:g}")
    text = f"{config.scaling} ({', '.join(parts)})"
    if config.scaling == "yarn" and config.attention_scaling == 1.0:
        own = 0.1 * math.log(config.scaling_factor) + 1.0
        text += f" without YaRN's temperature, which would be --fope-attention-scaling {own:.6f}"
    return text
