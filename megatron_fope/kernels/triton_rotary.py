"""The Triton kernels that rotate queries and keys by Fourier series, and their launch parameters.

One program handles a block of tokens of one KV group: it gets the group's sin and cos once, from tables or by
mixing them itself, and uses them for the group's query heads and its key. The work is bound by memory, so
what matters is that every byte of query and key is read and written once, in whole 16-byte pieces, with
enough of them in flight:

- A head is two halves of ``head_dim / 2`` contiguous channels. A tile is ``[tokens, pairs]``, with at least 8
  elements of a half per thread. Pairs with a series and pairs without are two tiles: the second needs no
  table, and its loads go out together with the first's.
- Programs are numbered with the group running fastest, so that neighbours read the same rows of a fused
  query-key-value projection, the same rows of the basis (from L2), and whole pages of memory.
- Heads and batch are loops inside a program. Their number is no block dimension, so 7, 12 or 40 heads waste
  nothing. Several small programs per multiprocessor hide the latency, not a pipeline within one.

Arithmetic is float32, addresses are 64 bit. The sizes of a batch are ordinary arguments that no
compilation depends on; what is compiled in is the model's geometry. Nothing is tuned at run time:
:func:`launch_config` is a fixed rule.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

VARIES = ("num_tokens", "batch", "batch_per_program", "sign")
"""Arguments that change from batch to batch: a value of 1 or a multiple of 16 must not make a new kernel."""


class LaunchConfig(NamedTuple):
    """Compile-time sizes of a launch; see :func:`launch_config`."""

    series: int
    """Pairs in the tile of pairs with a series; a power of two."""
    rest: int
    """Pairs in the tile of the remaining pairs; a power of two, or 0."""
    block: int
    """Tokens per program."""
    block_k: int
    """Frequencies per step of the fused product."""
    num_warps: int


@functools.cache
def launch_config(half: int, d_out: int, *, fused: bool, learning: bool = False) -> LaunchConfig:
    """Block sizes for a geometry.

    A thread gets 8 elements of each half where it can: one 16-byte load for 16-bit types, and registers for
    many programs per multiprocessor. Fused: 64 tokens share the coefficients that every program reads from
    L2, fewer where sums of learnable coefficients or wide heads need the registers. A step of 16 frequencies
    wastes less than a power of two (40 become 48, not 64) and bounds the registers that hold operands.

    Args:
        half: channel pairs per head.
        d_out: pairs with a series.
        fused: the kernel mixes the series itself.
        learning: the gradients of the series are summed as well.
    """
    series = triton.next_power_of_2(max(d_out, 16))
    rest = triton.next_power_of_2(half - series) if half > series else 0
    if fused:
        block = 16 if series > 64 else 32 if learning else 64
        num_warps = max(4, min(8, block * series // 256))
    else:
        block = max(1, min(64, 1024 // series))
        num_warps = 4
    return LaunchConfig(series, rest, block, 16, num_warps)


@triton.jit
def _mix(
    basis,
    coef,
    inside,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``basis @ coef``, ``[BLOCK, SERIES]`` float32; ``basis`` holds ``[BLOCK, 1]`` pointers to rows."""
    column = tl.arange(0, SERIES)[None, :]
    series = tl.full((BLOCK, SERIES), 0.0, tl.float32)
    for start in tl.static_range(0, D_IN, BLOCK_K):
        term = start + tl.arange(0, BLOCK_K)
        values = tl.load(basis + term[None, :], mask=inside & (term < D_IN)[None, :], other=0.0)
        weights = tl.load(
            coef + term[:, None] * D_OUT + column, mask=(term < D_IN)[:, None] & (column < D_OUT), other=0.0
        )
        series = tl.dot(values, weights, series, input_precision=PRECISION)
    return series


@triton.jit
def _series(
    sin,
    cos,
    sin_coef,
    cos_coef,
    token,
    inside,
    group,
    row_stride,
    group_stride,
    pad_sin,
    pad_cos,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    SERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sin and cos of a block of tokens, ``[BLOCK, SERIES]`` float32."""
    column = tl.arange(0, SERIES)[None, :]
    rows = token * row_stride
    if sin_coef is None:
        offset = rows + group * group_stride + column
        mask = inside & (column < WIDTH)
        sin_values = tl.load(sin + offset, mask=mask, other=pad_sin)
        cos_values = tl.load(cos + offset, mask=mask, other=pad_cos)
    else:
        sin_coef += group * group_stride
        cos_coef += group * group_stride
        sin_values = _mix(sin + rows, sin_coef, inside, D_IN, D_OUT, SERIES, BLOCK, BLOCK_K, PRECISION)
        cos_values = _mix(cos + rows, cos_coef, inside, D_IN, D_OUT, SERIES, BLOCK, BLOCK_K, PRECISION)
        if D_OUT < SERIES:
            sin_values = tl.where(column < D_OUT, sin_values, pad_sin)
            cos_values = tl.where(column < D_OUT, cos_values, pad_cos)
    return sin_values, cos_values


@triton.jit
def _rotate_head(
    x,
    out,
    inside,
    sin,
    cos,
    pad_sin,
    pad_cos,
    HALF: tl.constexpr,
    SERIES: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate one head of a block of tokens; returns the halves of the pairs with a series, in float32.

    ``x`` and ``out``: ``[BLOCK, 1]`` pointers to the head's channels.
    """
    column = tl.arange(0, SERIES)[None, :]
    mask = inside & (column < HALF)
    first = tl.load(x + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(x + HALF + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dtype = out.dtype.element_ty
    if REST > 0:  # loaded before anything is stored: no load is moved up across a store
        rest = SERIES + tl.arange(0, REST)[None, :]
        rest_mask = inside & (rest < HALF)
        first_rest = tl.load(x + rest, mask=rest_mask, eviction_policy="evict_first").to(tl.float32)
        second_rest = tl.load(x + HALF + rest, mask=rest_mask, eviction_policy="evict_first").to(tl.float32)
        tl.store(out + rest, (first_rest * pad_cos - second_rest * pad_sin).to(dtype), mask=rest_mask)
        tl.store(out + HALF + rest, (second_rest * pad_cos + first_rest * pad_sin).to(dtype), mask=rest_mask)
    tl.store(out + column, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out + HALF + column, (second * cos + first * sin).to(dtype), mask=mask)
    return first, second


@triton.jit
def _series_gradients(
    x,
    grad_first,
    grad_second,
    inside,
    grad_sin,
    grad_cos,
    HALF: tl.constexpr,
    SERIES: tl.constexpr,
):
    """Add one head's share to the gradients of sin and cos, ``[BLOCK, SERIES]`` each."""
    column = tl.arange(0, SERIES)[None, :]
    mask = inside & (column < HALF)
    first = tl.load(x + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(x + HALF + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    grad_sin += grad_second * first - grad_first * second
    grad_cos += grad_first * first + grad_second * second
    return grad_sin, grad_cos


@triton.jit(do_not_specialize=VARIES, do_not_specialize_on_alignment=VARIES)
def rotate_kernel(
    query,
    key,
    query_out,
    key_out,
    saved_query,
    saved_key,
    grad_sin,
    grad_cos,
    sin,
    cos,
    sin_coef,
    cos_coef,
    num_tokens,
    batch,
    batch_per_program,
    groups,
    row_stride,
    group_stride,
    query_token_stride,
    query_batch_stride,
    query_head_stride,
    key_token_stride,
    key_batch_stride,
    key_head_stride,
    saved_query_token_stride,
    saved_query_batch_stride,
    saved_query_head_stride,
    saved_key_token_stride,
    saved_key_batch_stride,
    saved_key_head_stride,
    sign,
    pad_sin,
    pad_cos,
    REP: tl.constexpr,
    HALF: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    SERIES: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rotate query and key into contiguous tensors; in the backward pass, with ``sign`` -1, their gradients.

    Either ``sin`` and ``cos`` are tables ``[s, table groups, WIDTH]`` and the coefficients None, or they
    are the basis ``[s, D_IN]`` and the coefficients ``[table groups, D_IN, D_OUT]``. The grid is linear:
    (share of the batch, block of tokens, group), the last fastest.

    With ``saved_query`` and ``saved_key``, what the forward pass rotated, the gradients of sin and cos are
    written too, ``[s, groups, D_OUT]`` float32. ``batch_per_program`` is then the whole batch: one program
    sums over it and all heads of its group, in a fixed order and without atomics.
    """
    program = tl.program_id(0)
    group = program % groups
    blocks = (num_tokens + BLOCK - 1) // BLOCK
    block = (program // groups) % blocks
    start = (program // groups) // blocks * batch_per_program
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = (token < num_tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    sin_values, cos_values = _series(
        sin, cos, sin_coef, cos_coef, token, inside, group, row_stride, group_stride, pad_sin, pad_cos,
        D_IN, D_OUT, WIDTH, SERIES, BLOCK, BLOCK_K, PRECISION,
    )  # fmt: skip
    sin_values *= sign
    pad_sin *= sign
    group = group.to(tl.int64)
    head = group * REP
    sequence = start.to(tl.int64)
    out_row = (token * batch + sequence) * groups
    query += token * query_token_stride + sequence * query_batch_stride + head * query_head_stride
    key += token * key_token_stride + sequence * key_batch_stride + group * key_head_stride
    query_out += (out_row * REP + head) * (2 * HALF)
    key_out += (out_row + group) * (2 * HALF)
    if saved_query is not None:
        saved_query += token * saved_query_token_stride + head * saved_query_head_stride
        saved_key += token * saved_key_token_stride + group * saved_key_head_stride
        sin_sum = tl.full((BLOCK, SERIES), 0.0, tl.float32)
        cos_sum = tl.full((BLOCK, SERIES), 0.0, tl.float32)
    for _ in tl.range(start, tl.minimum(start + batch_per_program, batch)):
        x = query
        out = query_out
        if saved_query is not None:
            saved = saved_query
        for _ in tl.range(0, REP):
            first, second = _rotate_head(
                x, out, inside, sin_values, cos_values, pad_sin, pad_cos, HALF, SERIES, REST
            )
            if saved_query is not None:
                sin_sum, cos_sum = _series_gradients(
                    saved, first, second, inside, sin_sum, cos_sum, HALF, SERIES
                )
                saved += saved_query_head_stride
            x += query_head_stride
            out += 2 * HALF
        first, second = _rotate_head(
            key, key_out, inside, sin_values, cos_values, pad_sin, pad_cos, HALF, SERIES, REST
        )
        if saved_query is not None:
            sin_sum, cos_sum = _series_gradients(
                saved_key, first, second, inside, sin_sum, cos_sum, HALF, SERIES
            )
            saved_query += saved_query_batch_stride
            saved_key += saved_key_batch_stride
        query += query_batch_stride
        key += key_batch_stride
        query_out += groups * (REP * 2 * HALF)
        key_out += groups * (2 * HALF)
    if saved_query is not None:
        column = tl.arange(0, SERIES)[None, :]
        offset = (token * groups + group) * D_OUT + column
        mask = inside & (column < D_OUT)
        tl.store(grad_sin + offset, sin_sum, mask=mask)
        tl.store(grad_cos + offset, cos_sum, mask=mask)
