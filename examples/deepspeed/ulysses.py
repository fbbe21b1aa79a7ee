"""DeepSpeed's Ulysses around Megatron's core attention.

Every rank of Megatron's context-parallel group holds some tokens and all heads. An all-to-all before
attention turns that into all tokens and some heads, another one behind it turns it back. Queries and keys
arrive here rotated, while all heads of a token are still together, so coefficients per head need no cutting.
The tokens are those that Megatron's context parallelism gives a rank, so their positions are Megatron's, for
RoPE and FoPE.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.layers.positions import sequence_positions


class UlyssesAttention(torch.nn.Module):
    """Core attention over a sequence that is divided among the ranks of the context-parallel group.

    Takes the place of ``core_attention`` in a layer spec; see :func:`with_ulysses`.

    Args:
        config: ``TransformerConfig`` with ``context_parallel_size`` ranks per sequence.
        pg_collection: process groups of the layer.
        **kwargs: those of ``DotProductAttention``.
    """

    def __init__(self, config: Any, *, pg_collection: Any, **kwargs: Any) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        super().__init__()
        size = pg_collection.cp.size()
        local = copy.copy(config)  # of all tokens, but only this rank's heads
        local.context_parallel_size = 1
        local.num_attention_heads //= size
        local.num_query_groups //= size
        local.kv_channels = config.kv_channels
        self.attention = DotProductAttention(local, pg_collection=pg_collection, **kwargs)
        self.exchange = DistributedAttention(self._attend, pg_collection.cp, scatter_idx=2, gather_idx=1)
        self.size = size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Causal attention of the local tokens to all tokens before them.

        Args:
            query: ``[local tokens, batch, heads, head_dim]``, rotated.
            key: ``[local tokens, batch, KV heads, head_dim]``, rotated.
            value: as ``key``.
            attention_mask: None; the mask is causal.
            packed_seq_params: None; packed documents are not divided here.
            **kwargs: of no use here.

        Returns:
            ``[local tokens, batch, heads * head_dim]``.
        """
        if attention_mask is not None or packed_seq_params is not None:
            raise UserError(
                "Ulysses here takes whole sequences under a causal mask; give no mask and no packing"
            )
        # With the sequence first, DeepSpeed 0.18 returns heads and tokens in a wrong order.
        batch_first = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return self.exchange(*batch_first, 0).transpose(0, 1).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All tokens in the order of the ranks: ``[batch, all tokens, local heads, head_dim]``."""
        tokens = query.size(1) // self.size
        order = torch.cat(
            [sequence_positions(tokens, cp_rank=rank, cp_size=self.size) for rank in range(self.size)]
        ).to(query.device)
        natural = order.argsort()
        in_order = (tensor.transpose(0, 1).index_select(0, natural) for tensor in (query, key, value))
        context = self.attention(*in_order, None).index_select(0, order)
        return context.unflatten(2, (query.size(2), -1)).transpose(0, 1)


def with_ulysses(spec: Any) -> Any:
    """A copy of a Megatron layer spec whose core attention is :class:`UlyssesAttention`."""
    spec = copy.deepcopy(spec)
    spec.submodules.self_attention.submodules.core_attention = UlyssesAttention
    return spec
