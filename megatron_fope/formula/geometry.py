"""The numbers that follow from FoPE's settings and the size of a model's heads."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import WIDEST, FoPEConfig


@dataclass(frozen=True)
class Geometry:
    """Frequencies and coefficients of a model.

    Raises:
        UserError: odd head dimension, no frequency left, or ``num_inv_freq`` beyond head_dim / 2.
    """

    config: FoPEConfig
    head_dim: int
    """Channels of a head that are rotated."""
    num_kv_heads: int = 1
    """KV heads of the whole model, not of a tensor-parallel rank; without effect on the frequencies."""

    def __post_init__(self) -> None:
        config, head_dim = self.config, self.head_dim
        if not 4 <= head_dim <= WIDEST or head_dim % 2:
            raise UserError(
                f"--kv-channels (head dimension) is {head_dim}; FoPE rotates channel pairs and needs an even "
                f"number >= 4, at most {WIDEST}"
            )
        width = max(head_dim, config.basis_dim)
        if config.num_inv_freq is not None and not 1 <= config.num_inv_freq <= width // 2:
            raise UserError(f"--fope-num-inv-freq is {config.num_inv_freq}; allowed: 1 to {width // 2}")
        num_kept = int(self._kept.sum())
        if not num_kept:
            floor = functional.floor_frequency(config.train_length, config.floor_ratio)
            raise UserError(
                f"--fope-train-length is {config.train_length}: no frequency completes "
                f"{config.floor_ratio:g} cycle(s) in it (floor {floor:.3g}, fastest frequency 1 radian per "
                f"token); use at least {int(2 * math.pi * config.floor_ratio) + 1} tokens"
            )
        if config.drop_clipped and config.square and num_kept > head_dim // 2:
            raise UserError(
                f"--fope-basis-dim is {config.basis_dim}: a wider basis needs --fope-profile paper, whose "
                "coefficients need not be square"
            )

    # Frequencies --------------------------------------------------------------------------------------

    @property
    def inv_freq(self) -> Tensor:
        """The basis: ``[D_in]`` on the CPU, float32, or float64 under ``exact_angles``. A new tensor."""
        return self._inv_freq.clone()

    @property
    def d_in(self) -> int:
        """Number of frequencies in the basis."""
        return self._inv_freq.numel()

    @property
    def d_out(self) -> int:
        """Number of channel pairs that get a Fourier series; the others are padded."""
        half = self.head_dim // 2
        if not self.config.drop_clipped:
            return half
        return min(self.d_in, half if self.config.square else self.head_dim // 4)

    @property
    def num_clipped(self) -> int:
        """How many of the rotary frequencies are clipped."""
        return int((~self._kept).sum())

    @property
    def leaving(self) -> range:
        """Channel pairs that lose their own frequency: clipped ones, and others without a series."""
        return range(min(self.d_out, int(self._kept.sum())), self.head_dim // 2)

    @cached_property
    def _inv_freq(self) -> Tensor:
        config, dim, keep = self.config, self._dim, self._kept
        every = functional.inverse_frequencies(dim, config.rotary_base, _angle_dtype(config))
        if config.scaling_before_clip:
            every = torch.where(keep, _scaled(config, every, dim), 0)
        else:
            every = _scaled(config, torch.where(keep, every, 0), dim)
        return every[keep] if config.drop_clipped else every

    @cached_property
    def _kept(self) -> Tensor:
        """``[dim / 2]`` bool; always decided in float32, so that exact angles do not change shapes."""
        config, dim = self.config, self._dim
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

    @property
    def _dim(self) -> int:
        """Channels that the frequencies are spread over."""
        return max(self.head_dim, self.config.basis_dim)

    # Coefficients -------------------------------------------------------------------------------------

    @property
    def coefficient_shape(self) -> tuple[int, int, int]:
        """``(num_kv_heads, D_in, D_out)``, with one head when heads share. For the whole model.

        Always three dimensions: optimizers that orthogonalise weights (Muon) take two for a matrix.
        """
        return (self.num_kv_heads if self.config.separate_heads else 1, self.d_in, self.d_out)

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """The dimensions that random coefficients are drawn with, as published: no head when heads share.
        The spread of Xavier's rules depends on them."""
        return self.coefficient_shape if self.config.separate_heads else self.coefficient_shape[1:]

    def make_coefficients(self, *, layer: int, stack: str = "decoder") -> dict[str, Tensor]:
        """Fresh coefficients of one layer, the same on every rank of every layout.

        Args:
            layer: Megatron's global ``layer_number``, from 1.
            stack: "decoder" or "mtp"; multi-token-prediction layers are numbered from 1 again.

        Returns:
            ``sin_coef`` and ``cos_coef``, or one ``fourier_coef`` for both, each float32 of
            :attr:`coefficient_shape` on the CPU. With ``shared_layers`` and seed 123 this is XTuner's CPU
            stream bit for bit.
        """
        config, generator = self.config, self.generator(layer, stack)
        return {
            name: functional.init_coefficients(self.drawn_shape, config.init, config.gain, generator).view(
                self.coefficient_shape
            )
            for name in config.coefficient_names
        }

    def generator(self, layer: int, stack: str = "decoder", purpose: str = "") -> torch.Generator:
        """Random numbers of one layer's coefficients, from the seed alone.

        Args:
            layer: Megatron's global ``layer_number``, from 1; without effect where layers share.
            stack: "decoder" or "mtp".
            purpose: other words, other numbers; none: those of fresh coefficients.
        """
        seed = self.config.seed
        words = [] if self.config.shared_layers else [stack, str(layer)]
        if purpose:
            words.append(purpose)
        if words:
            digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
            seed = int.from_bytes(digest[:8], "big") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)

    def tables(
        self, sin_basis: Tensor, cos_basis: Tensor, coefficients: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """sin and cos tables, by the formula.

        Args:
            sin_basis: ``[..., D_in]`` from :func:`megatron_fope.formula.functional.fourier_basis`.
            cos_basis: same shape.
            coefficients: as from :meth:`make_coefficients`, possibly fewer heads.

        Returns:
            ``(sin, cos)``, each ``[..., H, head_dim / 2]`` in the coefficients' dtype.
        """
        config = self.config
        sin_coef, cos_coef = (coefficients[config.coefficient_names[i]] for i in (0, -1))
        pad_sin, pad_cos = config.pad
        return functional.fourier_tables(
            sin_basis.to(sin_coef.dtype),
            cos_basis.to(cos_coef.dtype),
            sin_coef,
            cos_coef,
            self.head_dim // 2,
            pad_sin=pad_sin,
            pad_cos=pad_cos,
            normalize=config.normalize,
            attention_scaling=config.attention_scaling,
        )


def effective_coefficients(config: FoPEConfig, coefficients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices that mix the series of sin and of cos, with everything per column folded in.

    Args:
        config: the settings that the coefficients belong to.
        coefficients: as from :meth:`Geometry.make_coefficients`, possibly fewer heads.

    Returns:
        ``(sin, cos)``, each ``[H, D_in, D_out]`` (``H = 1`` when heads share); the same tensor twice when
        both share one basis. Differentiable.
    """
    effective = []
    for name in config.coefficient_names:
        value = coefficients[name]
        if config.normalize:
            value = functional.normalize_coefficients(value)
        if config.attention_scaling != 1.0:
            value = value * config.attention_scaling
        effective.append(value)
    return effective[0], effective[-1]


def rotary_frequencies(config: FoPEConfig, head_dim: int) -> Tensor:
    """All frequencies of the RoPE model with the same base and scaling, none of them clipped.

    Returns:
        ``[head_dim / 2]`` on the CPU, float32, or float64 under ``exact_angles``.
    """
    every = functional.inverse_frequencies(head_dim, config.rotary_base, _angle_dtype(config))
    return _scaled(config, every, head_dim)


def _angle_dtype(config: FoPEConfig) -> torch.dtype:
    return torch.float64 if config.exact_angles else torch.float32


def _scaled(config: FoPEConfig, inv_freq: Tensor, dim: int) -> Tensor:
    match config.scaling:
        case "pi":
            return inv_freq * (config.original_length / config.train_length)
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
