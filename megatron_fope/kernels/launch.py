"""Launching the kernels: what happens on the host between the checked arguments and the grid."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fope.formula import functional
from megatron_fope.kernels.cache import VersionedCache

PRECISIONS = {"tables": "ieee", "fused": "ieee", "fused_tf32x3": "tf32x3"}
"""How each variant multiplies; plain TF32 is not among the choices."""

_ENOUGH_PROGRAMS = 1024
"""From here on a program handles its tokens of the whole batch, before that one sequence: eight programs for
each of an H200's 132 multiprocessors."""

TABLES: VersionedCache[tuple[Tensor, Tensor]] = VersionedCache()
"""Tables that all layers and both passes share; a basis made for a single call leaves none behind."""


class Call(NamedTuple):
    """Everything but queries and keys: the arguments of the custom operators, in their order."""

    sin_basis: Tensor
    """``[s, D_in]``."""
    cos_basis: Tensor
    """``[s, D_in]``."""
    sin_coef: Tensor
    """``[H, D_in, D_out]`` float32."""
    cos_coef: Tensor
    """``[H, D_in, D_out]`` float32."""
    pad_sin: float
    pad_cos: float
    variant: str
    """One of :data:`PRECISIONS`."""
    keep_tables: bool
    """Tables may be kept between calls. Not where coefficients learn: optimizers' writes are not counted."""


def forward(query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Rotate ``[s, b, heads, head_dim]`` tensors whose last stride is 1."""
    out = (_empty(query.shape, query), _empty(key.shape, key))
    _rotate(query, key, out, call, sign=1.0)
    return out


def backward(
    grad_query: Tensor, grad_key: Tensor, query: Tensor | None, key: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, sin_coef and cos_coef.

    Args:
        grad_query: gradient of the rotated query, any strides.
        grad_key: gradient of the rotated key.
        query: the unrotated query if the coefficients learn, otherwise None.
        key: the unrotated key, likewise.
        call: the forward pass's.

    Returns:
        New tensors; those of frozen coefficients are empty.
    """
    # The caller's gradients may be expanded scalars.
    grad_query, grad_key = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_query, grad_key))
    out = (_empty(grad_query.shape, grad_query), _empty(grad_key.shape, grad_key))
    if query is None or key is None:
        _rotate(grad_query, grad_key, out, call, sign=-1.0)
        return *out, call.sin_coef.new_empty(0), call.cos_coef.new_empty(0)
    shape = (query.size(0), key.size(2), call.sin_coef.size(2))
    sums = (_empty(shape, call.sin_coef), _empty(shape, call.cos_coef))
    if not query.numel():  # nothing is launched
        for total in sums:
            total.zero_()
    _rotate(grad_query, grad_key, out, call, sign=-1.0, saved=(query, key), sums=sums)
    pairs = zip((call.sin_basis, call.cos_basis), sums, strict=True)
    grads = [functional.multiply(basis.float().transpose(0, 1), total.flatten(1)) for basis, total in pairs]
    grads = [g.unflatten(1, shape[1:]).transpose(0, 1) for g in grads]
    if call.sin_coef.size(0) == 1:
        grads = [g.sum(dim=0, keepdim=True) for g in grads]
    sin_grad, cos_grad = (g.contiguous() for g in grads)
    return *out, sin_grad, cos_grad


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that the kernels fill completely."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rotate(
    query: Tensor,
    key: Tensor,
    out: tuple[Tensor, Tensor],
    call: Call,
    *,
    sign: float,
    saved: tuple[Tensor, ...] = (),
    sums: tuple[Tensor, ...] = (),
) -> None:
    """One launch: rotate, and with ``saved`` also write the gradients of the series to ``sums``."""
    num_tokens, batch, heads, head_dim = query.shape
    groups, half = key.size(2), head_dim // 2
    table_groups, d_in, d_out = call.sin_coef.shape
    fused = call.variant != "tables"
    width = min(half, -(-d_out // 4) * 4)  # rows of tables start at 16-byte boundaries
    sin, cos, sin_coef, cos_coef = _factors(call, width)
    if not num_tokens or not batch:
        return
    from megatron_fope.kernels import triton_rotary

    config = triton_rotary.launch_config(half, d_out, fused=fused, learning=bool(saved))
    programs = -(-num_tokens // config.block) * groups
    per_program = batch if saved or programs >= _ENOUGH_PROGRAMS else 1
    programs *= -(-batch // per_program)
    row_stride, group_stride = (d_in, d_in * d_out) if fused else (table_groups * width, width)
    strides = [stride for tensor in (query, key, *saved) for stride in tensor.stride()[:3]]
    strides += [0] * (12 - len(strides))
    with _on(query.device):
        triton_rotary.rotate_kernel[(programs,)](
            query,
            key,
            *out,
            *(saved or (None, None)),
            *(sums or (None, None)),
            sin,
            cos,
            sin_coef,
            cos_coef,
            num_tokens,
            batch,
            per_program,
            groups,
            row_stride,
            group_stride if table_groups > 1 else 0,
            *strides,
            sign,
            call.pad_sin,
            call.pad_cos,
            REP=heads // groups,
            HALF=half,
            D_IN=d_in,
            D_OUT=d_out,
            WIDTH=width,
            SERIES=config.series,
            REST=config.rest,
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            PRECISION=PRECISIONS[call.variant],
            num_warps=config.num_warps,
            # Unfused, tables give the formula's result bit for bit, and memory hides the additional
            # instructions; the product of the other variant is twice as fast with fused operations.
            enable_fp_fusion=fused,
        )


def _factors(call: Call, width: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(sin, cos, sin_coef, cos_coef) for the kernel: basis and coefficients, or tables and twice None."""
    bases, coefficients = (call.sin_basis, call.cos_basis), (call.sin_coef, call.cos_coef)
    if call.variant != "tables":
        sin, cos = (t.float().contiguous() for t in bases)
        sin_coef, cos_coef = (t.contiguous() for t in coefficients)
        return sin, cos, sin_coef, cos_coef

    def build() -> tuple[Tensor, Tensor]:
        sin, cos = (basis.float() for basis in bases)
        pad_sin, pad_cos = call.pad_sin, call.pad_cos
        return functional.fourier_tables(sin, cos, *coefficients, width, pad_sin=pad_sin, pad_cos=pad_cos)

    if not call.keep_tables or any(
        t.is_inference() for t in (*bases, *coefficients)
    ):  # which count no writes
        return *build(), None, None
    # The coefficients by their memory: a tensor-parallel rank's slice is a new view in every call.
    slot = (call.pad_sin, call.pad_cos, width, *(t.data_ptr() for t in (*bases, *coefficients)))
    return *TABLES.get(slot, build, sources=coefficients, owners=bases), None, None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
