"""Rotating queries and keys in one differentiable step that keeps almost nothing for the backward pass.

Computes exactly what :mod:`megatron_fope.functional` says. Autograd on those functions would keep the tables
of every layer, ``[s, H, half]`` twice in float32, and make several temporaries as large as the queries. Here
only what all layers share anyway is kept (the basis and the coefficients); the backward pass mixes the tables
again, which is a small matrix product, and rotates the gradients by the transposed block. Queries and keys
are kept only when the coefficients learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from megatron_fope.config import FoPEConfig

_CPU_BLOCK = 1 << 18
"""Elements handled at a time on the CPU, so that a block stays in the cache between its four passes."""


def rotate(
    query: Tensor,
    key: Tensor,
    sin_basis: Tensor,
    cos_basis: Tensor,
    coefficients: dict[str, Tensor],
    config: FoPEConfig,
) -> tuple[Tensor, Tensor]:
    """Mix the tables and rotate queries and keys by them.

    Args:
        query: ``[s, b, query heads, head_dim]``, any float dtype and strides.
        key: ``[s, b, KV heads, head_dim]``.
        sin_basis: ``[s, D_in]`` from :func:`megatron_fope.functional.fourier_basis`.
        cos_basis: ``[s, D_in]``.
        coefficients: ``{name: [H, D_in, D_out]}`` for the KV heads of ``key`` (``[D_in, D_out]`` when heads
            share); float32.
        config: the settings that the tables depend on.

    Returns:
        Rotated query and key: new contiguous tensors of the same shapes and dtypes. Arithmetic in the
        coefficients' dtype, one rounding at the end.
    """
    return _Rotate.apply(
        query, key, sin_basis, cos_basis, config, tuple(coefficients), *coefficients.values()
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        sin_basis: Tensor,
        cos_basis: Tensor,
        config: FoPEConfig,
        names: tuple[str, ...],
        *coefficients: Tensor,
    ) -> tuple[Tensor, Tensor]:
        learning = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(sin_basis, cos_basis, *coefficients, *((query, key) if learning else ()))
        ctx.settings = (config, names)
        sin, cos = _series(config, sin_basis, cos_basis, names, coefficients)
        pad_sin, pad_cos = _padding(config)
        return _turn(query, sin, cos, pad_sin, pad_cos), _turn(key, sin, cos, pad_sin, pad_cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        config, names = ctx.settings
        sin_basis, cos_basis, *rest = ctx.saved_tensors
        coefficients, inputs = rest[: len(names)], rest[len(names) :]
        with torch.enable_grad():
            leaves = tuple(c.detach().requires_grad_(bool(inputs)) for c in coefficients)
            sin, cos = _series(config, sin_basis, cos_basis, names, leaves)
        grad_coefficients: tuple[Tensor | None, ...] = (None,) * len(names)
        if inputs:
            grads = [
                _series_gradients(x, g, sin) for x, g in zip(inputs, (grad_query, grad_key), strict=True)
            ]
            grad_series = [torch.add(*parts) for parts in zip(*grads, strict=True)]
            grad_coefficients = torch.autograd.grad((sin, cos), leaves, grad_series)
        # The transpose of [[cos, -sin], [sin, cos]] is the same block with the other sign of sin.
        pad_sin, pad_cos = _padding(config)
        sin, cos = -sin.detach(), cos.detach()
        grad_inputs = (
            _turn(g, sin, cos, -pad_sin, pad_cos) if needed else None
            for g, needed in zip((grad_query, grad_key), ctx.needs_input_grad[:2], strict=True)
        )
        return *grad_inputs, None, None, None, None, *grad_coefficients


def _series(
    config: FoPEConfig,
    sin_basis: Tensor,
    cos_basis: Tensor,
    names: tuple[str, ...],
    coefficients: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """The tables without padding, ``[s, H, D_out]`` each: padded pairs need no table."""
    by_name = dict(zip(names, coefficients, strict=True))
    return config.mix(sin_basis, cos_basis, by_name, 2 * coefficients[0].size(-1))


def _padding(config: FoPEConfig) -> tuple[float, float]:
    """(sin, cos) of the pairs without a series."""
    pad_sin, pad_cos = config.pad
    return pad_sin * config.attention_scaling, pad_cos * config.attention_scaling


def _turn(x: Tensor, sin: Tensor, cos: Tensor, pad_sin: float, pad_cos: float) -> Tensor:
    """:func:`megatron_fope.functional.apply_fourier_rotary` without autograd and with few temporaries.

    Args:
        x: ``[s, b, heads, head_dim]``.
        sin: ``[s, H, D_out]``.
        cos: ``[s, H, D_out]``.
        pad_sin: sin of the pairs from ``D_out`` on.
        pad_cos: their cos.
    """
    num_tokens, batch, heads, head_dim = x.shape
    groups, d_out, half = sin.size(1), sin.size(2), head_dim // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = num_tokens
    if x.device.type == "cpu":
        block = max(1, _CPU_BLOCK // max(1, batch * heads * head_dim))
    sin, cos = (table[:, None, :, None] for table in (sin, cos))
    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        pairs, turned = (t[rows].unflatten(-1, (2, half)) for t in (x, out))
        if d_out < half:
            _turn_padding(pairs[..., d_out:], turned[..., d_out:], pad_sin, pad_cos)
        pairs, turned = (t[..., :d_out].unflatten(2, (groups, heads // groups)) for t in (pairs, turned))
        _turn_series(pairs, turned, sin[rows], cos[rows])
    return out


def _turn_series(x: Tensor, out: Tensor, sin: Tensor, cos: Tensor) -> None:
    """``x`` and ``out`` ``[s, b, H, rep, 2, D_out]``; tables ``[s, 1, H, 1, D_out]``."""
    first, second = x.to(sin.dtype).unbind(-2)
    out_first, out_second = out.unbind(-2)
    if out.dtype == sin.dtype:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return
    # 16 bit: both products are summed in float32 and rounded once, by the copy.
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))


def _turn_padding(x: Tensor, out: Tensor, pad_sin: float, pad_cos: float) -> None:
    """``x`` and ``out`` ``[s, b, heads, 2, n]``; constants instead of tables."""
    if (pad_sin, pad_cos) == (0.0, 1.0):
        out.copy_(x)
        return
    first, second = x.unbind(-2)
    out_first, out_second = out.unbind(-2)
    if pad_cos == 1.0 and abs(pad_sin) == 1.0:  # one addition each, rounded once in any dtype
        torch.sub(first, second, alpha=pad_sin, out=out_first)
        torch.add(second, first, alpha=pad_sin, out=out_second)
        return
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    first, second = first.to(wide), second.to(wide)
    out_first.copy_((first * pad_cos).add_(second, alpha=-pad_sin))
    out_second.copy_((second * pad_cos).add_(first, alpha=pad_sin))


def _series_gradients(x: Tensor, grad: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sin and cos series, ``[s, H, D_out]``: summed over batch and the group's heads."""
    groups, d_out = sin.size(1), sin.size(2)
    rows = (groups, x.size(2) // groups)
    (first, second), (grad_first, grad_second) = (
        t.unflatten(-1, (2, -1))[..., :d_out].unflatten(2, rows).to(sin.dtype).unbind(-2) for t in (x, grad)
    )
    grad_sin = (grad_second * first - grad_first * second).sum(dim=(1, 3))
    grad_cos = (grad_first * first + grad_second * second).sum(dim=(1, 3))
    return grad_sin, grad_cos
