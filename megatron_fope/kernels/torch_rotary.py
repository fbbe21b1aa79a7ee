"""Rotating queries and keys in one differentiable step that keeps almost nothing for the backward pass.

Computes what :mod:`megatron_fope.formula.functional` says, block by block over the tokens: a block's
tables are
mixed, used for its queries and keys, and forgotten. Autograd on those functions would keep the tables of
every layer, ``[s, H, half]`` twice in float32, and make several temporaries as large as the queries. Here
only what all layers share anyway is kept (the basis and the coefficients); the backward pass mixes the tables
again and rotates the gradients by the transposed block. Queries and keys are kept only when the coefficients
learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import effective_coefficients
from megatron_fope.kernels.inputs import FLOATS, WIDE, check_tensors

_DTYPES = (*FLOATS, torch.float64)

_CPU_BLOCK = 1 << 17
"""Elements of the larger of query and key that one CPU thread handles at a time: a block's float32 copy, its
result and its tables stay in the second-level cache."""

_GPU_BLOCK = 1 << 26
"""The same for a GPU, where it only bounds the temporary memory (float32 copies: 512 MiB)."""

_ROW = 32
"""Tables are widened to a multiple of this many pairs: PyTorch's vectorised CPU loops take 32 float32 at a
time and fall back to single elements for the rest of a row."""


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
        sin_basis: ``[s, D_in]`` from :func:`megatron_fope.formula.functional.fourier_basis`.
        cos_basis: ``[s, D_in]``.
        coefficients: ``{name: [H, D_in, D_out]}`` for the KV heads of ``key`` (one when heads share);
            float32.
        config: the settings that the tables depend on.

    Returns:
        Rotated query and key: new contiguous tensors of the same shapes and dtypes. Arithmetic in the
        coefficients' dtype, one rounding at the end.

    Raises:
        ValueError: arguments that do not fit together.
    """
    sin_coef, cos_coef = effective_coefficients(config, coefficients)
    check_tensors(query, key, sin_basis, cos_basis, sin_coef, cos_coef, dtypes=_DTYPES, coef_dtypes=WIDE)
    sin_basis, cos_basis = sin_basis.to(sin_coef.dtype), cos_basis.to(cos_coef.dtype)
    return _Rotate.apply(query, key, sin_basis, cos_basis, sin_coef, cos_coef, *config.scaled_pad)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        sin_basis: Tensor,
        cos_basis: Tensor,
        sin_coef: Tensor,
        cos_coef: Tensor,
        pad_sin: float,
        pad_cos: float,
    ) -> tuple[Tensor, Tensor]:
        learning = any(ctx.needs_input_grad[4:6])
        ctx.save_for_backward(sin_basis, cos_basis, sin_coef, cos_coef, *((query, key) if learning else ()))
        ctx.padding = (pad_sin, pad_cos)
        series = _Series(sin_basis, cos_basis, sin_coef, cos_coef, pad_sin, pad_cos)
        query, key = _rotate_blocks((query, key), series)
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        sin_basis, cos_basis, sin_coef, cos_coef, *inputs = ctx.saved_tensors
        pad_sin, pad_cos = ctx.padding
        needed = ctx.needs_input_grad
        grads = [g for g, wanted in zip((grad_query, grad_key), needed[:2], strict=True) if wanted]
        # The transpose of [[cos, -sin], [sin, cos]] is the same block with the other sign of sin.
        series = _Series(sin_basis, cos_basis, -sin_coef, cos_coef, -pad_sin, pad_cos)
        rotated = iter(_rotate_blocks(tuple(grads), series)) if grads else iter(())
        grad_inputs = [next(rotated) if wanted else None for wanted in needed[:2]]
        grad_sin = grad_cos = None
        if inputs:
            grad_sin, grad_cos = _coefficient_gradients(inputs, (grad_query, grad_key), series)
        return *grad_inputs, None, None, grad_sin, grad_cos, None, None


@dataclass(frozen=True)
class _Series:
    """The Fourier series of a call: what mixes a block's tables, and what its other pairs rotate by."""

    sin_basis: Tensor
    """``[s, D_in]``."""
    cos_basis: Tensor
    """``[s, D_in]``."""
    sin_coef: Tensor
    """``[H, D_in, D_out]``."""
    cos_coef: Tensor
    """``[H, D_in, D_out]``."""
    pad_sin: float
    pad_cos: float


def _mixer(coef: Tensor, width: int, pad: float) -> tuple[Tensor | None, Tensor]:
    """(constants, matrix), ``[H * width]`` and ``[D_in, H * width]``.

    ``constants + basis @ matrix`` are the tables of ``width >= D_out`` pairs per head: pairs without a series
    get a column of zeros and the padding as constant; without such pairs there are no constants.
    """
    groups, d_in, d_out = coef.shape
    matrix = coef.new_zeros(d_in, groups, width)
    matrix[..., :d_out] = coef.transpose(0, 1)
    if width == d_out:
        return None, matrix.flatten(1)
    constants = coef.new_zeros(groups, width)
    constants[:, d_out:] = pad
    return constants.flatten(), matrix.flatten(1)


def _block_size(tensors: tuple[Tensor, ...]) -> int:
    """Tokens handled at a time."""
    per_token = max(1, max(t[0].numel() if t.size(0) else 1 for t in tensors))
    limit = _GPU_BLOCK
    if tensors[0].device.type == "cpu":
        limit = _CPU_BLOCK * torch.get_num_threads()
    return max(1, min(tensors[0].size(0), limit // per_token))


def _rotate_blocks(tensors: tuple[Tensor, ...], series: _Series) -> tuple[Tensor, ...]:
    """Rotate ``[s, b, heads, head_dim]`` tensors (heads may differ) by the same series, without autograd.

    A block is copied to float32 as one contiguous piece, rotated there, and copied out as one piece, which
    rounds once. Working on the halves of each head in place would touch every cache line several times.
    """
    outs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
    num_tokens, half = tensors[0].size(0), tensors[0].size(-1) // 2
    if not num_tokens:
        return outs
    groups, _, d_out = series.sin_coef.shape
    wide = series.sin_coef.dtype
    width = min(half, -(-d_out // _ROW) * _ROW)
    size = _block_size(tensors)
    sin_constants, sin_matrix = _mixer(series.sin_coef, width, series.pad_sin)
    cos_constants, cos_matrix = _mixer(series.cos_coef, width, series.pad_cos)
    tables = _empty_pair((size, groups * width), wide, outs[0].device)
    buffers = {t.shape[1:]: _empty_pair((size, *t.shape[1:]), wide, t.device) for t in tensors}
    bases = zip(series.sin_basis.split(size), series.cos_basis.split(size), strict=True)
    blocks = zip(*(t.split(size) for t in tensors), strict=True)
    out_blocks = zip(*(t.split(size) for t in outs), strict=True)
    length = 0
    for (sin_basis, cos_basis), block, out_block in zip(bases, blocks, out_blocks, strict=True):
        if sin_basis.size(0) != length:  # the first block and a shorter last one
            length = sin_basis.size(0)
            sin, cos = (table[:length] for table in tables)
            shape = (length, 1, groups, 1, width)
            work = [(a[:length], b[:length]) for a, b in (buffers[t.shape[1:]] for t in tensors)]
            parts = [_Parts(*pair, sin.view(shape), cos.view(shape)) for pair in work]
        functional.multiply(sin_basis, sin_matrix, add=sin_constants, out=sin)
        functional.multiply(cos_basis, cos_matrix, add=cos_constants, out=cos)
        for x, out, (wide_in, wide_out), part in zip(block, out_block, work, parts, strict=True):
            wide_in.copy_(x)
            part.rotate(series.pad_sin, series.pad_cos)
            out.copy_(wide_out)
    return outs


def _empty_pair(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)


class _Parts:
    """Views of one block in float32: halves of the pairs with a table and of those without.

    Args:
        x: ``[n, b, heads, head_dim]``.
        out: same shape, receives the result.
        sin: ``[n, 1, H, 1, width]``.
        cos: same shape.
    """

    def __init__(self, x: Tensor, out: Tensor, sin: Tensor, cos: Tensor) -> None:
        self.sin, self.cos = sin, cos
        groups, width = sin.size(2), sin.size(-1)
        self.series, self.padded = [], []
        for tensor in (x, out):
            pairs = tensor.unflatten(-1, (2, -1))
            self.series += pairs[..., :width].unflatten(2, (groups, -1)).unbind(-2)
            if width < pairs.size(-1):
                self.padded += pairs[..., width:].unbind(-2)

    def rotate(self, pad_sin: float, pad_cos: float) -> None:
        """Write the rotated block."""
        first, second, out_first, out_second = self.series
        torch.mul(first, self.cos, out=out_first).addcmul_(second, self.sin, value=-1)
        torch.mul(second, self.cos, out=out_second).addcmul_(first, self.sin)
        if not self.padded:
            return
        first, second, out_first, out_second = self.padded
        if pad_cos == 1.0:
            torch.sub(first, second, alpha=pad_sin, out=out_first)
            torch.add(second, first, alpha=pad_sin, out=out_second)
            return
        torch.mul(first, pad_cos, out=out_first).add_(second, alpha=-pad_sin)
        torch.mul(second, pad_cos, out=out_second).add_(first, alpha=pad_sin)


def _coefficient_gradients(
    inputs: list[Tensor], grads: tuple[Tensor, Tensor], series: _Series
) -> tuple[Tensor, Tensor]:
    """Gradients of both coefficient tensors, ``[H, D_in, D_out]``, summed over tokens, batch and heads."""
    groups, d_in, d_out = series.sin_coef.shape
    sums = [series.sin_coef.new_zeros(d_in, groups * d_out) for _ in range(2)]
    size = _block_size(grads)
    blocks = zip(*(t.split(size) for t in (series.sin_basis, series.cos_basis, *inputs, *grads)), strict=True)
    for sin_basis, cos_basis, query, key, grad_query, grad_key in blocks:
        of_query, of_key = (
            _series_gradients(x, g, groups, d_out, sin_basis.dtype)
            for x, g in ((query, grad_query), (key, grad_key))
        )
        for total, basis, a, b in zip(sums, (sin_basis, cos_basis), of_query, of_key, strict=True):
            functional.multiply(basis.transpose(0, 1), (a + b).flatten(1), add=total, out=total)
    sin_grad, cos_grad = (total.view(d_in, groups, d_out).transpose(0, 1) for total in sums)
    return sin_grad, cos_grad


def _series_gradients(
    x: Tensor, grad: Tensor, groups: int, d_out: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of a block's sin and cos series, ``[n, H, D_out]``."""
    rows = (groups, x.size(2) // groups)
    (first, second), (grad_first, grad_second) = (
        t.unflatten(-1, (2, -1))[..., :d_out].unflatten(2, rows).to(dtype).unbind(-2) for t in (x, grad)
    )
    grad_sin = (grad_second * first - grad_first * second).sum(dim=(1, 3))
    grad_cos = (grad_first * first + grad_second * second).sum(dim=(1, 3))
    return grad_sin, grad_cos
