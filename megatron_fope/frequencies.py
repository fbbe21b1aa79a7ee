"""Which frequencies a configuration keeps, scaled as it says."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_fope import functional

if TYPE_CHECKING:
    from megatron_fope.config import FoPEConfig


@functools.lru_cache(maxsize=32)
def inv_freq(config: FoPEConfig, head_dim: int) -> Tensor:
    """The basis: ``[D_in]`` on CPU, float32, or float64 under ``exact_angles``. Not to be written to."""
    dim = max(head_dim, config.basis_dim)
    dtype = torch.float64 if config.exact_angles else torch.float32
    rotary = functional.inverse_frequencies(dim, config.rotary_base, dtype)
    keep = kept(config, head_dim)
    if config.scaling_before_clip:
        rotary = torch.where(keep, _scaled(config, rotary, dim), 0)
    else:
        rotary = _scaled(config, torch.where(keep, rotary, 0), dim)
    return rotary[keep] if config.drop_clipped else rotary


def kept(config: FoPEConfig, head_dim: int) -> Tensor:
    """``[dim / 2]`` bool; always decided in float32, so that exact angles do not change shapes."""
    dim = max(head_dim, config.basis_dim)
    rotary = functional.inverse_frequencies(dim, config.rotary_base)
    if config.scaling_before_clip:
        rotary = _scaled(config, rotary, dim)
    floor = functional.floor_frequency(config.train_length, config.floor_ratio)
    return functional.frequency_mask(
        rotary,
        floor if config.clip else None,
        strict=config.strict_floor,
        num_inv_freq=config.num_inv_freq,
    )


def _scaled(config: FoPEConfig, rotary: Tensor, dim: int) -> Tensor:
    match config.scaling:
        case "pi":
            return functional.interpolate_frequencies(rotary, config.original_length / config.train_length)
        case "linear":
            return rotary / config.scaling_factor
        case "yarn":
            return functional.yarn_frequencies(
                rotary,
                dim,
                config.rotary_base,
                original_length=config.original_length,
                scale=config.scaling_factor,
                beta_fast=config.yarn_beta_fast,
                beta_slow=config.yarn_beta_slow,
                extrapolation_factor=config.yarn_extrapolation_factor,
            )
        case "llama3":
            return functional.llama3_frequencies(
                rotary, original_length=config.original_length, scale=config.scaling_factor
            )
    return rotary
