"""Core attention without Transformer Engine: long sequences, context parallelism, packed sequences.

Megatron's own ``DotProductAttention`` makes the whole matrix of scores, and knows only one rank and one
document. Here causal attention runs in PyTorch's flash kernel for CPUs, whose memory grows linearly with the
length. What that kernel cannot do (:func:`why_unfused`) makes the matrix as before.

Under context parallelism, keys and values are gathered over the group with Megatron's differentiable
collectives and put into their natural order: slow next to a ring, but exact, and that is what a test needs.

Shapes: ``S`` tokens on this rank, ``T`` tokens of the whole sequence or pack, ``B`` batch, ``H`` heads of
this rank, ``G`` key-value groups of this rank, ``D`` channels per head.
"""

from __future__ import annotations

import copy
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_fope.common.errors import UserError
from megatron_fope.common.log import announce


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


def why_unfused(module: Any, mask: torch.Tensor | None) -> str | None:
    """What keeps a ``DotProductAttention`` from the fused kernel, in words for the log; None if nothing does.

    Args:
        module: the layer's core attention.
        mask: what comes with the batch; None for a packed one, whose documents are causal.
    """
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    if (backend := module.config.attention_backend) is not AttnBackend.auto:
        return f"--attention-backend {backend.name}"
    if module.attention_dropout.training and module.attention_dropout.p:
        return "attention dropout"
    if module.softmax_offset is not None:
        return f"--softmax-type {module.config.softmax_type}"
    if module.scale_mask_softmax.window_size is not None:
        return "a sliding window"
    if module.attn_mask_type is not AttnMaskType.causal:
        return "a mask that is not causal"
    return None if mask is None else "a mask that comes with the batch"


def _fuses(module: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether :func:`fused_attention` does this call; said once, with the reason where it does not."""
    if query.size(0) != key.size(0):  # decoding: a few rows of scores
        return False
    unfused = why_unfused(module, mask)
    _announce(unfused)
    return unfused is None


@functools.cache
def _announce(unfused: str | None) -> None:
    if unfused is None:
        line = "attention in PyTorch's fused kernel, memory linear in the length"
    else:
        line = f"attention not fused because of {unfused}, memory quadratic in the length"
    announce(line, about="CPU runtime")


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in PyTorch's flash kernel for CPUs; nothing of ``T x T`` is made, no key is repeated.

    Args:
        query: ``[S, B, H, D]``.
        key: ``[T, B, G, D]``, in natural order; ``value`` alike, whose width may be another.
        scale: factor of the scores.
        cu_seqlens: boundaries of documents that must not see each other; None: one document.
        positions: int64 positions of the queries in the sequence, ``[S]``; None: they are all of it. The
            kernel knows no other causal mask than the square one, so the rest is computed for nothing.

    Returns:
        ``[S, B, H * width of the values]``.

    Raises:
        RuntimeError: the kernel refuses the tensors (no other takes its place).
    """
    num_keys, batch, groups, _ = key.shape
    heads, width = query.size(2), value.size(3)
    if positions is not None:
        query = query.new_zeros(num_keys, *query.shape[1:]).index_copy(0, positions, query)
    if width != key.size(3):  # latent attention; the kernel wants one width, and zeros change nothing
        widest = max(width, key.size(3))
        query, key, value = (pad(tensor, (0, widest - tensor.size(3))) for tensor in (query, key, value))
    # Batch and groups become the kernel's batch: there a group's one key is a view for all its heads.
    query, key, value = (
        tensor.reshape(num_keys, batch * groups, -1, tensor.size(3))
        .permute(1, 2, 0, 3)
        .expand(-1, heads // groups, -1, -1)
        for tensor in (query, key, value)
    )
    bounds = [0, num_keys] if cu_seqlens is None else [*cu_seqlens.tolist(), num_keys]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        documents = [
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                is_causal=True,
                scale=scale,
            )
            for start, end in itertools.pairwise(bounds)
            if start < end
        ]
    context = documents[0] if len(documents) == 1 else torch.cat(documents, dim=2)
    context = context[..., :width].permute(2, 0, 1, 3).reshape(num_keys, batch, heads * width)
    return context if positions is None else context.index_select(0, positions)


def general_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    packed_seq_params: Any,
) -> torch.Tensor:
    """Attention over a sequence that may be cut by context parallelism, packed, or both.

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

    fused = _fuses(module, query, key, None if packed else mask)
    positions = None
    group = _context_parallel_group(module, packed_seq_params)
    if group is not None and group.size() > 1:
        key, value, positions = _gather_keys_and_values(key, value, group, cu_seqlens)
    if fused:
        # Under --apply-query-key-layer-scaling, Megatron's softmax takes the layer's number back out.
        scale = module.softmax_scale * (module.scale_mask_softmax.scale or 1)
        context = fused_attention(query, key, value, scale=scale, cu_seqlens=cu_seqlens, positions=positions)
        return context.squeeze(1) if packed else context

    hidden = attention_mask(
        torch.arange(query.size(0)) if positions is None else positions,
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
    """Teach ``DotProductAttention`` the fused kernel, context parallelism, packed sequences, narrow values.

    The class is patched and not the specs, because layer specs import it by value. What is neither fused, cut
    nor packed runs in Megatron's own forward, unchanged.
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
        assert attention_bias is None, "Attention bias is not supported for DotProductAttention."
        whole = packed_seq_params is None and self.config.context_parallel_size == 1
        if whole and not _fuses(self, query, key, attention_mask):
            return original_forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        return general_attention(self, query, key, value, attention_mask, packed_seq_params)

    DotProductAttention.__init__ = init
    DotProductAttention.forward = forward
    DotProductAttention.supports_context_parallelism = True  # read where flags are checked
    if getattr(core_utils, "tex", None) is None:
        core_utils.tex = SimpleNamespace(thd_get_partitioned_indices=thd_get_partitioned_indices)
