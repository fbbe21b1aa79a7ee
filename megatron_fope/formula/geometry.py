"""Which frequencies a configuration keeps, scaled as it says."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_fope.formula import functional

if TYPE_CHECKING:
    from megatron_fope.formula.config import FoPEConfig


@functools.lru_cache(maxsize=32)
def inv_freq(config: FoPEConfig, head_dim: int) -> Tensor:
    """The basis: ``[D_in]`` on CPU, float32, or float64 under ``exact_angles``. Not to be written to."""
    dim = max(head_dim, config.basis_dim)
    dtype = torch.float64 if config.exact_angles else torch.float32
    every = functional.inverse_frequencies(dim, config.rotary_base, dtype)
    keep = kept(config, head_dim)
    if config.scaling_before_clip:
        every = torch.where(keep, _scaled(config, every, dim), 0)
    else:
        every = _scaled(config, torch.where(keep, every, 0), dim)
    return every[keep] if config.drop_clipped else every


def rotary(config: FoPEConfig, head_dim: int) -> Tensor:
    """All frequencies of the RoPE model with the same base and scaling, none of them clipped.

    ``[head_dim / 2]``, dtype as :func:`inv_freq`.
    """
    dtype = torch.float64 if config.exact_angles else torch.float32
    every = functional.inverse_frequencies(head_dim, config.rotary_base, dtype)
    return _scaled(config, every, head_dim)


def kept(config: FoPEConfig, head_dim: int) -> Tensor:
    """``[dim / 2]`` bool; always decided in float32, so that exact angles do not change shapes."""
    dim = max(head_dim, config.basis_dim)
    every = functional.inverse_frequencies(dim, config.rotary_base)
    if config.scaling_before_clip:
        every = _scaled(config, every, dim)
    floor = functional.floor_frequency(config.train_length, config.floor_ratio)
    return functional.frequency_mask(
        every,
        floor if config.clip else None,
        strict=config.strict_floor,
        num_inv_freq=config.num_inv_freq,
    )


def _scaled(config: FoPEConfig, inv_freq: Tensor, dim: int) -> Tensor:
    match config.scaling:
        case "pi":
            return functional.interpolate_frequencies(inv_freq, config.original_length / config.train_length)
        case "linear":
            return inv_freq / config.scaling_factor
        case "yarn":
            return functional.yarn_frequencies(
                inv_freq,
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
                inv_freq, original_length=config.original_length, scale=config.scaling_factor
            )
    return inv_freq
