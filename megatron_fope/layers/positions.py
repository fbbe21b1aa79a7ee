"""Which global position each local token has, for every way Megatron lays a sequence out.

Unlike RoPE's scores, FoPE's scores depend on absolute positions, so every layout must give a token exactly
the position it has in one undivided sequence: documents of a packed batch start at 0, and context-parallel
ranks count in Megatron's zigzag order. Everything here stays on the device: no value is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fope import compat
from megatron_fope.common.errors import UserError


def check_values(ok: Tensor, message: str, explain: Callable[[], str] | None = None) -> None:
    """Require that all of ``ok`` is true, without waiting for a device.

    Args:
        ok: boolean, any shape.
        message: one line. A GPU prints it and ends the process when it gets there.
        explain: makes the message where values can be read.

    Raises:
        UserError: on a CPU.
    """
    if ok.device.type == "cpu":
        if not ok.all():
            raise UserError(explain() if explain else message)
    elif ok.device.type == "cuda":
        torch._assert_async(ok.all(), message)


def sequence_positions(
    num_tokens: int,
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    offset: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Positions of one rank's share of an ordinary (``sbhd``) sequence.

    Megatron cuts the sequence into ``2 * cp_size`` chunks and gives rank ``r`` chunks ``r`` and
    ``2 * cp_size - 1 - r``, for every ``--cp-comm-type``.

    Args:
        num_tokens: local tokens ``s``; even when ``cp_size > 1``.
        cp_rank: rank in the context-parallel group.
        cp_size: size of that group.
        offset: position of the first token (tokens already in a key-value cache).
        device: where to create the result.

    Returns:
        ``[s]`` int64.

    Raises:
        UserError: numbers that no layout has.
    """
    _check_share(num_tokens, cp_rank, cp_size)
    if offset < 0:
        raise UserError(f"offset is {offset}; requires 0 or more")
    if cp_size == 1:
        return torch.arange(offset, offset + num_tokens, device=device)
    local = torch.arange(num_tokens, device=device)
    return _unzigzag(local, num_tokens // 2, cp_rank, cp_size) + offset


def _unzigzag(local: Tensor, chunk: Tensor | int, cp_rank: int, cp_size: int) -> Tensor:
    """Place in the whole sequence of a rank's tokens, which hold two chunks of it."""
    last = 2 * cp_size - 1 - cp_rank
    return torch.where(local < chunk, cp_rank * chunk + local, last * chunk + local - chunk)


def _check_share(num_tokens: int, cp_rank: int, cp_size: int) -> None:
    if num_tokens < 0:
        raise UserError(f"num_tokens is {num_tokens}; requires 0 or more")
    if cp_size < 1 or not 0 <= cp_rank < cp_size:
        raise UserError(f"cp_rank is {cp_rank} of cp_size {cp_size}; requires 0 to cp_size - 1")
    if cp_size > 1 and num_tokens % 2:
        raise UserError(
            f"a context-parallel rank has {num_tokens} tokens; requires an even number, because it holds two "
            "chunks of the sequence"
        )


def check_boundaries(cu_seqlens: Tensor, total: int, multiple: int) -> None:
    """Refuse boundaries of documents that would give plausible, but wrong positions.

    Args:
        cu_seqlens: ``[documents + 1]``.
        total: tokens of all context-parallel ranks, where the last document must end.
        multiple: what the length of every document must be a multiple of.

    Raises:
        UserError: naming the document; on a GPU the process ends later with the rule only.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise UserError(
            f"cu_seqlens is {str(kind).removeprefix('torch.')}; requires a tensor of int32 or int64"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise UserError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; requires one dimension, number of documents + 1"
        )
    lengths = cu_seqlens.diff()
    wrong = (lengths < 0) | (lengths % multiple != 0)
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & ~wrong.any()
    rule = f"requires ends from 0 to {total} tokens" + (
        f", every length a multiple of {multiple} (twice the context-parallel ranks)" if multiple > 1 else ""
    )

    def explain() -> str:
        if wrong.any():
            at = int(wrong.nonzero()[0])
            start, end = cu_seqlens[at : at + 2].tolist()
            return f"document {at} of cu_seqlens has {end - start} tokens ({start} to {end}); {rule}"
        start, end = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if start:
            return f"document 0 of cu_seqlens starts at {start}; {rule}"
        return f"document {lengths.numel() - 1} of cu_seqlens, the last, ends at {end}; {rule}"

    check_values(ok, f"cu_seqlens holds other documents than the tokens; {rule}", explain)


def packed_positions(num_tokens: int, cu_seqlens: Tensor, *, cp_rank: int = 0, cp_size: int = 1) -> Tensor:
    """Positions of one rank's share of packed documents (``thd``); every document starts at 0.

    Under context parallelism each document is zigzagged on its own, so its (padded) length is a multiple
    of ``2 * cp_size``. Documents may be empty: Megatron repeats the last boundary to fill its lists.
    Padding behind the last document is part of it, or a document of its own.

    Args:
        num_tokens: local tokens ``t``.
        cu_seqlens: ``[documents + 1]`` integer, cumulative lengths over all context-parallel ranks,
            including the padding between documents if there is any.
        cp_rank: rank in the context-parallel group.
        cp_size: size of that group.

    Returns:
        ``[t]`` int64 on the device of ``cu_seqlens``.

    Raises:
        UserError: boundaries that do not run from 0 to the number of tokens of all ranks in multiples of
            ``2 * cp_size`` (of 1 without context parallelism). Their values are checked without waiting for a
            GPU, which ends the process with a message when it gets there.
    """
    _check_share(num_tokens, cp_rank, cp_size)
    check_boundaries(cu_seqlens, num_tokens * cp_size, 1 if cp_size == 1 else 2 * cp_size)
    starts = cu_seqlens.long() // cp_size
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, starts.numel() - 2)
    start = starts.index_select(0, document)
    local = token - start
    if cp_size == 1:
        return local
    length = starts.index_select(0, document + 1) - start
    return _unzigzag(local, length // 2, cp_rank, cp_size)


def inference_positions(
    num_tokens: int,
    context: Any,
    *,
    sequence_len_offset: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Positions of the tokens of one inference step, from Megatron's inference context.

    Args:
        num_tokens: tokens in this step (rows, under dynamic batching).
        context: ``StaticInferenceContext`` or ``DynamicInferenceContext``.
        sequence_len_offset: ``[b]`` int32, what ``GPTModel`` and ``HybridModel`` pass besides the context's
            number under static batching with flash decode or local CUDA graphs. A captured graph would
            repeat the number of its first run, so the tensor is used where there is one.
        device: where to create the result.

    Returns:
        ``[num_tokens]`` int64. Static batching: the same for all sequences of the batch. Dynamic batching:
        one token per row, with the position it has in its own request; rows beyond the active tokens hold
        the position of an earlier step, and Megatron drops what is computed for them.

    Raises:
        UserError: the sequences of a static batch have different offsets, or the context has fewer tokens.
    """
    if context.is_static_batching():
        if sequence_len_offset is None:
            return sequence_positions(num_tokens, offset=context.sequence_len_offset, device=device)
        check_values(
            sequence_len_offset == sequence_len_offset[0],
            "sequence_len_offset differs between the sequences of a static batch; requires one number",
            lambda: f"sequence_len_offset is {sequence_len_offset.tolist()}; requires one number",
        )
        return sequence_positions(num_tokens, device=device) + sequence_len_offset[0]
    positions = compat.token_positions(context)[:num_tokens].long()
    if positions.numel() != num_tokens:
        raise UserError(
            f"the inference context has {positions.numel()} tokens; requires the {num_tokens} of this step"
        )
    return positions


def local_positions(
    num_tokens: int,
    *,
    cp_group: Any = None,
    packed_seq_params: Any = None,
    inference_context: Any = None,
    sequence_len_offset: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Positions of the tokens an attention layer sees, whatever the layout.

    Args:
        num_tokens: first dimension of query and key.
        cp_group: the layer's context-parallel process group, or None.
        packed_seq_params: Megatron's ``PackedSeqParams``, or None. Its own ``cp_group`` (per-sample groups
            of hybrid context parallelism) wins over the layer's; ``local_cp_size`` without a group means
            that this sample is not divided.
        inference_context: Megatron's inference context, or None.
        sequence_len_offset: see :func:`inference_positions`; only with a static inference context.
        device: where to create the result.

    Returns:
        ``[num_tokens]`` int64.

    Raises:
        UserError: packed sequences without the lengths of their documents, or with wrong ones.
    """
    if inference_context is not None:
        return inference_positions(
            num_tokens, inference_context, sequence_len_offset=sequence_len_offset, device=device
        )
    if packed_seq_params is not None:
        if packed_seq_params.cp_group is not None:
            cp_group = packed_seq_params.cp_group
        elif packed_seq_params.local_cp_size is not None:
            cp_group = None
        own, size = packed_seq_params.local_cp_size, cp_group.size() if cp_group is not None else 1
        if isinstance(own, int) and own != size:
            raise UserError(
                f"PackedSeqParams.local_cp_size is {own}, but its cp_group has {size} ranks; requires the "
                "group of this sample"
            )
    cp_rank, cp_size = (cp_group.rank(), cp_group.size()) if cp_group is not None else (0, 1)
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        cu_seqlens = packed_seq_params.cu_seqlens_q_padded  # where documents start, padding included
        if cu_seqlens is None:
            cu_seqlens = packed_seq_params.cu_seqlens_q
        if cu_seqlens is None:
            raise UserError(
                "PackedSeqParams of qkv_format 'thd' has neither cu_seqlens_q nor cu_seqlens_q_padded; FoPE "
                "needs one of them to know where documents start"
            )
        return packed_positions(num_tokens, cu_seqlens, cp_rank=cp_rank, cp_size=cp_size)
    return sequence_positions(num_tokens, cp_rank=cp_rank, cp_size=cp_size, device=device)
