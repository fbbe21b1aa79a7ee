"""Megatron's multi-latent attention with FoPE on the channels that carry positions.

Multi-latent attention (DeepSeek) rotates only the last ``--qk-pos-emb-head-dim`` channels of a head. Their
key is computed once and shared by all heads, so there is one set of coefficients, as with a single KV head.

Megatron rotates inside ``get_query_key_value_tensors``, in every variant: plain, packed documents, latents in
the key-value cache. There Megatron's own rotary module is left in place with frequencies of zero, which
rotate nothing, and the positional channels are rotated when query and key come out, or, where Megatron
recomputes the up-projection, inside what it recomputes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_fope.layers.attention import FoPEAttention
from megatron_fope.layers.position_ids import take_position_ids

_SIGNATURE = inspect.signature(MLASelfAttention.get_query_key_value_tensors)


class FoPEMLASelfAttention(FoPEAttention, MLASelfAttention):
    """``MLASelfAttention`` whose positional channels are rotated by Fourier series.

    Needs an ``MLATransformerConfig`` with ``rope_type="rope"``.
    """

    rotary_pos_emb: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # cos(0) = 1 and sin(0) = 0 leave what Megatron rotates bit for bit as it is.
        self.rotary_pos_emb.inv_freq = torch.zeros_like(self.rotary_pos_emb.inv_freq)

    def _rotated_heads(self, config: Any) -> dict[str, int]:
        return {"head_dim": config.qk_pos_emb_head_dim, "num_kv_heads": 1}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``forward``, which hands position ids on to where query and key are made."""
        position_ids = take_position_ids(kwargs)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        return super().forward(*args, **kwargs)

    @property
    def qkv_up_checkpoint(self) -> Any:
        """What Megatron recomputes the up-projection with (``--recompute-modules mla_up_proj``), or None."""
        return self._up_checkpoint

    @qkv_up_checkpoint.setter
    def qkv_up_checkpoint(self, checkpoint: Any) -> None:
        rotation = _running.get()
        if checkpoint is not None and rotation is not None:
            checkpoint = _RotatingCheckpoint(checkpoint, rotation)
        self._up_checkpoint = checkpoint

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's query, key and whatever follows, with the positional channels of both rotated."""
        rotation = _Rotation(self, _SIGNATURE.bind(self, *args, **kwargs).arguments)
        outer = _running.set(rotation)
        try:
            query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        finally:
            _running.reset(outer)
        if not rotation.recomputed:
            query, key = rotation(query, key)
        return query, key, *rest

    def _rotate_positional(self, query: Tensor, key: Tensor, call: Any) -> tuple[Tensor, Tensor]:
        """Rotate ``[s, b, heads, d]``, or ``[t, heads, d]`` of packed documents."""
        content, positional = self._split(query)
        key_content, key_positional = self._split(key)
        rotated, one_head = positional, self._one_head(key_positional)
        if flat := query.dim() == 3:
            rotated, one_head = rotated.unsqueeze(1), one_head.unsqueeze(1)
        rotated, one_head = self._rotate(rotated, one_head, call)
        if flat:
            rotated, one_head = rotated.squeeze(1), one_head.squeeze(1)
        query = torch.cat([content, rotated], dim=-1)
        key = torch.cat([key_content, self._all_heads(one_head, key_positional)], dim=-1)
        return query, key

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.qk_pos_emb_head_dim
        return tensor[..., :-size], tensor[..., -size:]

    def _one_head(self, key: Tensor) -> Tensor:
        """``[..., 1, d]``: the key of the first head, which is that of all; cached latents have no heads."""
        return key.unsqueeze(-2) if self.config.cache_mla_latents else key[..., :1, :]

    def _all_heads(self, key: Tensor, like: Tensor) -> Tensor:
        return key.squeeze(-2) if self.config.cache_mla_latents else key.expand_as(like)


class _Rotation:
    """The rotation that belongs to one call of ``get_query_key_value_tensors``."""

    def __init__(self, attention: FoPEMLASelfAttention, call: Any) -> None:
        self.attention, self.call = attention, call
        self.recomputed = False
        """Whether query and key come rotated out of the function that Megatron recomputes."""

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention._rotate_positional(query, key, self.call)


_running: ContextVar[_Rotation | None] = ContextVar("fope_mla_rotation", default=None)


class _RotatingCheckpoint:
    """Megatron's ``CheckpointWithoutOutput`` around the up-projection and the rotation.

    Megatron frees what comes out of it after the core attention and makes it again in the backward pass.
    Rotated outside, query and key would be kept a second time.
    """

    def __init__(self, checkpoint: Any, rotation: _Rotation) -> None:
        self._checkpoint, self._rotation = checkpoint, rotation

    def checkpoint(self, run_function: Callable[..., Any], *args: Any) -> Any:
        self._rotation.recomputed = True

        def run_and_rotate(*inputs: Any) -> tuple[Any, ...]:
            query, key, *rest = run_function(*inputs)
            return *self._rotation(query, key), *rest

        return self._checkpoint.checkpoint(run_and_rotate, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)
