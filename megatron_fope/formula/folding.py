"""Padding 1,1 as the function of padding 0,1: the factor that it has on the scores goes into the weights.

sin = cos = 1 turns the queries and the keys of a pair by the same 45 degrees, which their scores do not see,
and makes both longer by the square root of 2, which they do. So with 1/sqrt(2) in the weights that make these
channels of query and key, the scores are those of sin 0, cos 1. The weights are rows of the projections or,
where query and key are normalised behind them, the weights of that normalisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula.geometry import Geometry

FACTOR = 2**-0.5


def fold_factors(config: Any, geometry: Geometry, num_kv_heads: int) -> dict[str, Tensor]:
    """What every row of which weight of an attention layer is multiplied by.

    Args:
        config: a ``TransformerConfig``, or arguments with its fields.
        geometry: FoPE's.
        num_kv_heads: KV heads of the whole model; without effect under multi-latent attention.

    Returns:
        ``{name: [rows]}`` float32 on the CPU, for the weights of all tensor-parallel ranks together. Biases
        are listed whether the model has them or not.

    Raises:
        UserError: query and key are normalised without weights.
    """
    if getattr(config, "qk_l2_norm", False):
        raise UserError(
            "--fope-fold-padding is given with --qk-l2-norm, behind which no weight scales queries and keys; "
            "use --fope-pad-value 0,1"
        )
    if getattr(config, "multi_latent_attention", False):
        return _latent(config, _channels(geometry, interleaved=True))
    channels = _channels(geometry, interleaved=bool(getattr(config, "rotary_interleaved", False)))
    if getattr(config, "qk_layernorm", False):
        norms = ("q_layernorm", "k_layernorm")
        return {f"{norm}.{leaf}": channels for norm in norms for leaf in ("weight", "bias")}
    rest = torch.ones_like(channels)
    heads = config.num_attention_heads // num_kv_heads
    gates = heads if getattr(config, "attention_output_gate", False) else 0
    # Megatron's rows, group by group: its query heads, their gates, its key head, its value head.
    group = [channels] * heads + [rest] * gates + [channels, rest]
    rows = torch.cat(group).repeat(num_kv_heads)
    return {"linear_qkv.weight": rows, "linear_qkv.bias": rows}


def fold(name: str, value: Tensor, factors: Tensor, config: Any) -> Tensor:
    """One weight with the factors in it.

    Args:
        name: a key of :func:`fold_factors`.
        value: ``[rows, ...]``, any float dtype.
        factors: ``[rows]``.
        config: as there.

    Returns:
        A new tensor of the same shape and dtype.
    """
    factors = factors.to(value.device).view(-1, *[1] * (value.dim() - 1))
    centred = getattr(config, "layernorm_zero_centered_gamma", False) or getattr(
        config, "apply_layernorm_1p", False
    )
    if centred and name.endswith("layernorm.weight"):  # Megatron multiplies by 1 + weight
        return ((value.float() + 1.0) * factors - 1.0).to(value.dtype)
    return (value.float() * factors).to(value.dtype)


def _channels(geometry: Geometry, *, interleaved: bool) -> Tensor:
    """``[head_dim]``: the factor of every rotated channel."""
    pairs = torch.ones(geometry.head_dim // 2, device="cpu")
    pairs[geometry.d_out :] = FACTOR
    return pairs.repeat_interleave(2) if interleaved else pairs.repeat(2)


def _latent(config: Any, channels: Tensor) -> dict[str, Tensor]:
    """Only the positional channels; Megatron keeps their pairs interleaved, whatever the flag says."""
    head = torch.cat((torch.ones(config.qk_head_dim, device="cpu"), channels))
    query = "linear_q_up_proj" if config.q_lora_rank else "linear_q_proj"
    return {
        f"{query}.weight": head.repeat(config.num_attention_heads),
        "linear_kv_down_proj.weight": torch.cat((torch.ones(config.kv_lora_rank, device="cpu"), channels)),
    }
