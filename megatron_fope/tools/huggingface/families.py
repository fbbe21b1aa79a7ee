"""The model families that are known on both sides, and one map of their weights' names.

A family is what Megatron's GPT can be and what transformers has a class for. Names on Megatron's side are
those of ``torch_dist`` checkpoints, names on the other side those of the files on Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """One kind of decoder."""

    model_type: str
    """In ``config.json``."""
    class_name: str
    """Of transformers' classes, without ``ForCausalLM``."""
    qkv_bias: bool = False
    """``--add-qkv-bias``."""
    qk_norm: bool = False
    """``--qk-layernorm``."""
    experts: tuple[str, str, str, str] | None = None
    """Names of the router and of an expert's gate, up and down projection; None: a dense model."""

    @property
    def architecture(self) -> str:
        """The causal language model."""
        return f"{self.class_name}ForCausalLM"


_MIXTRAL = ("block_sparse_moe.gate", "w1", "w3", "w2")
_QWEN = ("mlp.gate", "gate_proj", "up_proj", "down_proj")

FAMILIES = (
    Family("llama", "Llama"),
    Family("qwen2", "Qwen2", qkv_bias=True),
    Family("qwen3", "Qwen3", qk_norm=True),
    Family("mixtral", "Mixtral", experts=_MIXTRAL),
    Family("qwen3_moe", "Qwen3Moe", qk_norm=True, experts=_QWEN),
)
ARCHITECTURES = {family.architecture: family for family in FAMILIES} | {
    "MistralForCausalLM": FAMILIES[0],  # Llama, but for the window that some of its models have
}
"""What ``architectures`` of a ``config.json`` may say; FoPE's models have ``Fope`` in front."""


@dataclass(frozen=True)
class Shape:
    """The sizes that the map needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    ffn_size: int
    """Of the dense layers or of one expert."""
    num_experts: int = 0
    coefficients: tuple[int, ...] = ()
    """``(H, D_in, D_out)`` of FoPE's coefficients, H = 1 when heads share them."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a layer, or of every expert of a layer, on both sides."""

    megatron: str
    """Below ``decoder.layers``."""
    huggingface: tuple[str, ...]
    """Below ``model.layers.N``; ``{expert}`` is the expert's number."""
    size: tuple[int, ...]
    """Of Megatron's tensor."""
    split: Callable[[Tensor, Shape], Parts] = lambda value, shape: (value,)
    """Megatron's tensor to the others."""
    join: Callable[[Parts, Shape], Tensor] = lambda parts, shape: parts[0]
    """The other way."""
    also: str | None = None
    """Another name of the same tensor, with another layer spec of Megatron's."""

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.huggingface[0]

    @property
    def is_coefficient(self) -> bool:
        """FoPE's, which are float32 whatever the model is."""
        return ".fope." in self.megatron


def split_qkv(value: Tensor, shape: Shape) -> Parts:
    """``linear_qkv`` ``[(H + 2 G) D, ...]`` to ``([H D, ...], [G D, ...], [G D, ...])``.

    In Megatron every KV head's key and value lie behind the query heads that it serves.
    """
    ratio = shape.num_heads // shape.num_kv_heads
    grouped = value.view(shape.num_kv_heads, ratio + 2, shape.head_dim, *value.shape[1:])
    return tuple(part.flatten(0, 2) for part in grouped.split((ratio, 1, 1), dim=1))


def join_qkv(parts: Parts, shape: Shape) -> Tensor:
    """The other way of :func:`split_qkv`."""
    grouped = [part.view(shape.num_kv_heads, -1, shape.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def split_halves(value: Tensor, shape: Shape) -> Parts:
    """``linear_fc1`` ``[2 F, ...]`` to gate and up."""
    return value.chunk(2)


def join_halves(parts: Parts, shape: Shape) -> Tensor:
    """The other way of :func:`split_halves`."""
    return torch.cat(parts)


def layer_weights(family: Family, shape: Shape, coefficients: tuple[str, ...] = ()) -> Iterator[Weight]:
    """The weights of one layer.

    Args:
        family: the family.
        shape: the model's sizes.
        coefficients: names of FoPE's coefficients; none for a RoPE model.
    """
    hidden, ffn, channels = shape.hidden_size, shape.ffn_size, shape.head_dim
    qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * channels
    yield Weight("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), (hidden,))
    for kind, size in {"weight": (rows, hidden), "bias": (rows,)}.items():
        if kind == "weight" or family.qkv_bias:
            names = tuple(f"{name}.{kind}" for name in qkv)
            yield Weight(f"self_attention.linear_qkv.{kind}", names, size, split_qkv, join_qkv)
    if family.qk_norm:
        for name in "qk":
            norm = (f"self_attn.{name}_norm.weight",)
            yield Weight(f"self_attention.{name}_layernorm.weight", norm, (channels,))
    output = (hidden, shape.num_heads * channels)
    yield Weight("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), output)
    yield from coefficient_weights(shape, coefficients)
    if family.experts is None:
        mlp, also = "mlp", None
        gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    else:
        router, *projections = family.experts
        mlp, also = "mlp.experts.experts", "pre_mlp_layernorm.weight"  # Transformer Engine's layers
        experts = f"{router.rpartition('.')[0]}.experts.{{expert}}"
        gate, up, down = (f"{experts}.{name}" for name in projections)
        yield Weight("mlp.router.weight", (f"{router}.weight",), (shape.num_experts, hidden))
    norm = ("post_attention_layernorm.weight",)
    yield Weight("mlp.linear_fc1.layer_norm_weight", norm, (hidden,), also=also)
    both = (f"{gate}.weight", f"{up}.weight")
    yield Weight(f"{mlp}.linear_fc1.weight", both, (2 * ffn, hidden), split_halves, join_halves)
    yield Weight(f"{mlp}.linear_fc2.weight", (f"{down}.weight",), (hidden, ffn))


def coefficient_weights(shape: Shape, names: tuple[str, ...]) -> Iterator[Weight]:
    """FoPE's coefficients of one layer, always float32."""
    for name in names:
        yield Weight(f"self_attention.fope.{name}", (f"self_attn.{name}",), shape.coefficients)


EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = ("decoder.final_layernorm.weight", "model.norm.weight")
OUTPUT = ("output_layer.weight", "lm_head.weight")
"""Absent on both sides where the output layer is the embedding."""
