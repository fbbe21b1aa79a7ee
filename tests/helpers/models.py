"""Small Megatron models for tests that run on ranks, their inputs, and what tests of them say often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

POSITIONAL, HEADS, LATENT = 16, 4, 24
"""Of multi-latent attention: channels that know positions, heads, rank of keys and values."""


def since(*release: int) -> pytest.MarkDecorator:
    """Mark a test of something that earlier Megatron releases do not have; the rank looks, not pytest."""
    condition = f"__import__('megatron_fope').compat.megatron_version().release < {release}"
    return pytest.mark.skipif(condition, reason=f"needs Megatron-Core {'.'.join(map(str, release))}")


def transformer_config(**overrides: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "init_method_std": 0.2,  # large enough that attention is not uniform and positions matter
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**settings | overrides)


def fope_config(**overrides: Any) -> Any:
    from megatron_fope import FoPEConfig

    return FoPEConfig.from_profile(**{"train_length": 48} | overrides)


def gpt(
    fope: Any = None, *, position: str = "none", spec: Any = None, mtp: Any = None, **overrides: Any
) -> Any:
    """A small GPT with local layers; always the same initial weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_fope import with_fope

    config = transformer_config(**overrides)
    spec = spec or get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    torch.manual_seed(3)
    return GPTModel(
        config,
        with_fope(spec, fope) if fope else spec,
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type=position,
        mtp_block_spec=mtp,
    )


def mla_config(**overrides: Any) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": HEADS,
        "q_lora_rank": 32,
        "kv_lora_rank": LATENT,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": POSITIONAL,
        "v_head_dim": 12,
        "rope_type": "rope",
        "init_method_std": 0.2,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }
    return MLATransformerConfig(**settings | overrides)


def mla_model(fope: Any = None, **overrides: Any) -> Any:
    """A small GPT with multi-latent attention; with Megatron's own rotation when ``fope`` is None."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_fope import with_fope

    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    torch.manual_seed(3)
    return GPTModel(
        mla_config(**overrides),
        with_fope(spec, fope) if fope else spec,
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type="none",
    )


def tokens(length: int = 24, batch: int = 2) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 128, (batch, length), generator=generator)
    return ids, torch.arange(length).expand(batch, length)


def run(model: Any, ids: Any, positions: Any) -> Any:
    return model(ids, positions, None)


def refused(case: Callable[[], Any], text: str) -> None:
    from megatron_fope import UserError

    try:
        case()
    except UserError as error:
        assert text in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"{text}: accepted")
