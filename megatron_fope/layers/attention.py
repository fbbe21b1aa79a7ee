"""Megatron's self-attention with FoPE: the hook through which Megatron reaches everything else here."""

from __future__ import annotations

import inspect
import re
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.folding import fold, fold_factors
from megatron_fope.layers.embedding import FourierEmbedding
from megatron_fope.layers.position_ids import follow_models, take_position_ids

_FORWARD_SIGNATURE = inspect.signature(SelfAttention.forward)
_CONTEXT_ARGUMENTS = ("packed_seq_params", "inference_context", "inference_params", "sequence_len_offset")

_call: ContextVar[dict[str, Any]] = ContextVar("fope_call", default={})  # noqa: B039
"""What decides the tokens' positions in the ``forward`` that runs; every thread has its own."""


class FoPEAttention(torch.nn.Module):
    """The constructor that all attention classes with FoPE share; stands before Megatron's class.

    Arguments this class does not know are passed on, so that a newer Megatron may add some.

    Args:
        config: ``TransformerConfig``.
        submodules: Megatron's, for the class behind this one.
        layer_number: global number of the layer, from 1.
        *args: Megatron's.
        fope: FoPE's settings; travels in the spec's ``params`` because extra attributes on ``config`` do
            not survive every path on which Megatron copies it.
        fope_stack: "decoder" or "mtp".
        **kwargs: Megatron's.

    Raises:
        UserError: a setting of Megatron's that cannot go with FoPE.
    """

    config: Any
    pg_collection: Any
    fope: FourierEmbedding
    fope_rotates = True

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        *args: Any,
        fope: FoPEConfig,
        fope_stack: str = "decoder",
        **kwargs: Any,
    ) -> None:
        check_megatron_config(config)
        follow_models()
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.fope = FourierEmbedding(
            config,
            fope,
            layer=layer_number,
            stack=stack_of(fope_stack, kwargs),
            tp_group=self.pg_collection.tp,
            **self._rotated_heads(config),
        )

        self.register_load_state_dict_post_hook(_fold_if_asked)

    def _rotated_heads(self, config: Any) -> dict[str, int]:
        """Channels and number of the keys that are rotated, where they are not those of the config."""
        return {}

    def _rotate(self, query: Tensor, key: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rotate ``[s, b, heads, head_dim]`` at the positions that Megatron's arguments say."""
        return self.fope(
            query,
            key,
            cp_group=self.pg_collection.cp,
            packed_seq_params=call.get("packed_seq_params"),
            inference_context=call.get("inference_context") or call.get("inference_params"),
            sequence_len_offset=call.get("sequence_len_offset"),
            position_ids=call.get("position_ids"),
        )


def _fold_if_asked(attention: Any, _: Any) -> None:
    """After a layer was loaded: the padding's factor goes into its weights, where a start asks for that."""
    embedding = attention.fope
    if not embedding.folds:
        return
    embedding.folds = False
    if not attention.fope_rotates:
        return
    config, weights = attention.config, dict(attention.named_parameters())
    geometry = embedding.geometry  # where there are fewer KV heads than ranks, the config has another number
    for name, factors in fold_factors(config, geometry, geometry.num_kv_heads).items():
        weight = weights.get(name)
        if weight is None:
            continue
        rows = weight.size(0)
        if rows != factors.numel():  # this rank's share
            start = attention.pg_collection.tp.rank() * rows
            factors = factors[start : start + rows]
        weight.data.copy_(fold(name, weight.data, factors, config))


class FoPESelfAttention(FoPEAttention, SelfAttention):
    """``SelfAttention`` whose queries and keys are rotated by Fourier series.

    Megatron hands out query and key in ``get_query_key_value_tensors``: after the query/key normalisation
    and the tensor-parallel split, before the key-value cache and before packed sequences lose their dummy
    batch dimension. They are rotated there; ``forward`` itself is Megatron's.
    """

    def __init__(self, config: Any, submodules: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        # Layers without position embedding (no_rope_freq) keep the coefficients unused: Megatron stacks
        # the layers of a checkpoint into one tensor, which needs the same keys in all of them.
        self.fope_rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``forward``; remembers what decides the tokens' positions while it runs."""
        if len(args) > 1:  # Megatron itself passes everything behind attention_mask by keyword
            bound = _FORWARD_SIGNATURE.bind(self, hidden_states, *args, **kwargs).arguments
            kwargs, args = {name: bound[name] for name in list(bound)[2:]}, ()
        ids = take_position_ids(kwargs)
        previous = _call.set({"position_ids": ids, **{name: kwargs.get(name) for name in _CONTEXT_ARGUMENTS}})
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            _call.reset(previous)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's query, key, value (and output gate), with query and key rotated."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.fope_rotates:
            if self.config.rotary_interleaved:
                query, key = functional.pairs_to_halves(query), functional.pairs_to_halves(key)
            if self.fope.fope.learnable:
                query, key = (compat.survives_offloading(t, rest[0], self) for t in (query, key))
            query, key = self._rotate(query, key, _call.get())
        else:
            query = self.fope.leave(query)
        return query, key, *rest


def stack_of(fope_stack: str, arguments: dict[str, Any]) -> str:
    """The stack that decides a layer's coefficients.

    A hybrid model builds its multi-token-prediction layers from the decoder's spec, numbered from 1 in every
    depth; only their module's name (0.18 and later) tells them apart.

    Args:
        fope_stack: what the spec says.
        arguments: keyword arguments of the layer's constructor.
    """
    depth = re.match(r"mtp\.layers\.\d+", arguments.get("name") or "")
    return depth[0] if depth and fope_stack == "decoder" else fope_stack


def check_megatron_config(config: Any) -> None:
    """Refuse model settings under which queries and keys would not pass through the hook.

    Args:
        config: ``TransformerConfig``, or any object with its fields.

    Raises:
        UserError: naming Megatron's flag.
    """

    def refuse(field: str, flag: str, why: str) -> None:
        if getattr(config, field, False):
            raise UserError(f"{flag} is given, but FoPE {why}; leave it out with FoPE")

    if getattr(config, "multi_latent_attention", False):
        refuse("rotary_interleaved", "--rotary-interleaved", "pairs the channels of MLA as Megatron does")
        refuse(
            "mla_down_proj_fusion", "--mla-down-proj-fusion", "has no class of its own for fused projections"
        )
        refuse(
            "experimental_attention_variant",
            "--experimental-attention-variant",
            "cannot reach the rotary embedding of sparse attention's indexer",
        )
        rope_type = getattr(config, "rope_type", None) or "yarn"
        if rope_type != "rope":
            raise UserError(
                f"--rope-type is {rope_type} (the default of --multi-latent-attention), but FoPE extends "
                "lengths by --fope-scaling; use --rope-type rope"
            )
    pattern = getattr(config, "hybrid_layer_pattern", None) or ""
    for symbol in set("+D") & set(pattern):
        raise UserError(
            f"--hybrid-layer-pattern is {pattern!r}, but FoPE supports multi-latent attention in GPT models "
            f"only; use a pattern without {symbol}"
        )
    refuse("apply_rope_fusion", "--apply-rope-fusion", "cannot use RoPE's fused kernel")
    refuse("fused_single_qkv_rope", "--fused-single-qkv-rope", "cannot use RoPE's fused kernel")
    refuse("mrope_section", "--mrope-section", "has no multimodal sections")
