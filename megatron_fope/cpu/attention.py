"""Core attention for context parallelism and packed sequences without Transformer Engine.

Megatron's own ``DotProductAttention`` handles neither. The replacement gathers keys and values over the
context-parallel group with Megatron's differentiable collectives, puts them into their natural order and
masks by global positions: slow and memory-hungry next to a ring, but exact, and that is what a test needs.

Shapes: ``S`` tokens on this rank, ``T`` tokens of the whole sequence or pack, ``B`` batch, ``H`` heads of
this rank, ``G`` key-value groups of this rank, ``D`` channels per head.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import torch

from megatron_fope.common.errors import UserError


def zigzag_positions(num_tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Positions in the full sequence of the tokens that a context-parallel rank holds.

    The sequence of ``T`` tokens is cut into ``2 * cp_size`` chunks and rank ``r`` holds chunks ``r`` and
    ``2 * cp_size - 1 - r``, which balances the work under a causal mask: int64, shape ``[T / cp_size]``.

    Raises:
        UserError: the sequence cannot be cut evenly.
    """
    chunk, rest = divmod(num_tokens, 2 * cp_size)
    if rest:
        raise UserError(
            f"--context-parallel-size {cp_size}: a sequence or document of {num_tokens} tokens cannot be cut "
            f"into {2 * cp_size} equal chunks; its length must be a multiple of {2 * cp_size}"
        )
    first, last = cp_rank, 2 * cp_size - 1 - cp_rank
    return torch.cat(
        [torch.arange(first * chunk, (first + 1) * chunk), torch.arange(last * chunk, (last + 1) * chunk)]
    )


def packed_zigzag_positions(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """As :func:`zigzag_positions`, with every document of a pack cut on its own.

    ``cu_seqlens`` holds the boundaries of the (padded) documents, shape ``[num_documents + 1]``.
    """
    documents = itertools.pairwise(cu_seqlens.tolist())
    return torch.cat([start + zigzag_positions(end - start, cp_size, cp_rank) for start, end in documents])


def thd_get_partitioned_indices(
    cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int, cp_rank: int
) -> torch.Tensor:
    """What Megatron calls in Transformer Engine to cut a packed batch for context parallelism."""
    return packed_zigzag_positions(cu_seqlens, cp_size, cp_rank).to(torch.int32)


def attention_mask(
    query_positions: torch.Tensor,
    num_keys: int,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys, in natural order, each query may not see: bool, True where hidden, ``[1, 1, S, T]``.

    Args:
        query_positions: int64 positions of the local queries in the full sequence, shape ``[S]``.
        num_keys: ``T``.
        causal: hide later keys.
        window: keys visible to the left and to the right, as in ``--window-size``.
        cu_seqlens: boundaries of documents that must not see each other.
    """
    key_positions = torch.arange(num_keys)
    distance = query_positions[:, None] - key_positions[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance > window[0]) | (-distance > window[1])
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.to(torch.int64), key_positions, right=True)
        hidden = hidden | (document[query_positions][:, None] != document[None, :])
    return hidden[None, None]


def _context_parallel_group(module: Any, packed_seq_params: Any) -> Any:
    """The group over which the sequence is cut, or None; a packed batch may bring its own."""
    if packed_seq_params is not None:
        if packed_seq_params.cp_group is not None:
            return packed_seq_params.cp_group
        if packed_seq_params.local_cp_size is not None:
            return None
    if module.config.context_parallel_size == 1:
        return None
    group = getattr(module.pg_collection, "cp", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
    return group


def _gather_keys_and_values(
    key: torch.Tensor, value: torch.Tensor, group: Any, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All keys and values in natural order, and the positions of the tokens of this rank.

    The gather's backward sums the gradients of all ranks and returns to each its own part.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    key = gather_from_sequence_parallel_region(key, group=group)
    value = gather_from_sequence_parallel_region(value, group=group)
    num_keys, cp_size = key.size(0), group.size()
    documents = torch.tensor([0, num_keys]) if cu_seqlens is None else cu_seqlens
    held = [packed_zigzag_positions(documents, cp_size, rank) for rank in range(cp_size)]
    order = torch.cat(held)
    if order.numel() != num_keys:
        raise UserError(
            f"--context-parallel-size {cp_size}: the documents of the packed batch end at token "
            f"{order.numel()}, but {num_keys} tokens were given; pad the last document"
        )
    natural = torch.argsort(order)
    return key.index_select(0, natural), value.index_select(0, natural), held[group.rank()]


def general_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    packed_seq_params: Any,
) -> torch.Tensor:
    """Attention over a sequence that is cut by context parallelism, packed, or both.

    Args:
        module: the ``DotProductAttention`` whose scale, softmax and dropout are used.
        query: ``[S, B, H, D]``, or ``[S, H, D]`` when packed; ``key`` and ``value`` alike with ``G`` groups.
        mask: True where hidden, broadcastable to ``[B, H, S, T]``; ignored when packed, as Transformer
            Engine does.
        packed_seq_params: Megatron's ``PackedSeqParams`` or None.

    Returns:
        Shape ``[S, B, H * D]``, or ``[S, H * D]`` when packed.
    """
    from megatron.core import tensor_parallel
    from megatron.core.transformer.enums import AttnMaskType

    packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
    cu_seqlens = None
    if packed:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        padded = packed_seq_params.cu_seqlens_q_padded
        cu_seqlens = packed_seq_params.cu_seqlens_q if padded is None else padded

    group = _context_parallel_group(module, packed_seq_params)
    if group is not None and group.size() > 1:
        key, value, query_positions = _gather_keys_and_values(key, value, group, cu_seqlens)
    else:
        query_positions = torch.arange(query.size(0))

    hidden = attention_mask(
        query_positions,
        key.size(0),
        causal=module.attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal),
        window=module.scale_mask_softmax.window_size,
        cu_seqlens=cu_seqlens,
    )
    if mask is not None and not packed:
        hidden = hidden | mask

    repeats = query.size(2) // key.size(2)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * module.softmax_scale
    # Megatron's softmax builds the window mask itself from local lengths; here it is in `hidden`.
    softmax = copy.copy(module.scale_mask_softmax)
    softmax.window_size = None
    probabilities = softmax.forward_torch_softmax(scores, hidden, module.softmax_offset)
    if module.config.sequence_parallel:
        probabilities = module.attention_dropout(probabilities)
    else:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            probabilities = module.attention_dropout(probabilities)
    context = torch.matmul(probabilities, value).permute(2, 0, 1, 3).flatten(2)
    return context.squeeze(1) if packed else context


def install() -> None:
    """Teach ``DotProductAttention`` context parallelism, packed sequences and values narrower than keys.

    The class is patched and not the specs, because layer specs import it by value. With one
    context-parallel rank and no packed sequence, Megatron's own forward runs unchanged.
    ``megatron.core.utils.tex`` gets the one Transformer Engine function that cuts packed batches, unless
    the real one is there.
    """
    import megatron.core.utils as core_utils
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original_init, original_forward = DotProductAttention.__init__, DotProductAttention.forward

    def init(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        # The constructor refuses context parallelism; nothing else in it depends on the size.
        single = copy.copy(config)
        single.context_parallel_size = 1
        original_init(self, single, *args, **kwargs)
        self.config = config
        if v_channels is not None:  # multi-latent attention, which Megatron only builds on Transformer Engine
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        if packed_seq_params is None and self.config.context_parallel_size == 1:
            return original_forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        assert attention_bias is None, "Attention bias is not supported for DotProductAttention."
        return general_attention(self, query, key, value, attention_mask, packed_seq_params)

    DotProductAttention.__init__ = init
    DotProductAttention.forward = forward
    DotProductAttention.supports_context_parallelism = True  # read where flags are checked
    if getattr(core_utils, "tex", None) is None:
        core_utils.tex = SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
