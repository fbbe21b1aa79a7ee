"""Which layers of a checkpoint have self-attention, and what their coefficients are called there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fope.arguments.megatron import head_dim_of, num_kv_heads_of
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.growth import grow_coefficients

_PROJECTION = re.compile(r"(.*\.)self_attention\.(?:linear_qkv|linear_kv_down_proj)\.weight")
"""Every self-attention has one of them; the second is that of multi-latent attention."""

_DECODER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?")
_PREDICTION = re.compile(r"mtp\.layers\.(\d+)\.transformer_layer\.")


@dataclass(frozen=True)
class AttentionLayers:
    """Attention layers whose tensors have one name in a checkpoint.

    Megatron stacks equal layers into one tensor with the layer as first dimension. Layers that may differ
    (MoE in some of them, hybrid models, multi-token prediction) have the layer's index in their names.
    """

    prefix: str
    """What stands in front of ``self_attention``."""
    numbers: tuple[int, ...]
    """Megatron's layer numbers, from 1."""
    stack: str
    """See :meth:`Geometry.make_coefficients`."""
    stacked: bool

    def name(self, leaf: str) -> str:
        """Name of a coefficient tensor."""
        return f"{self.prefix}self_attention.fope.{leaf}"

    def split(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Coefficients by layer number, from tensors as stored; keys are the last part of the names."""
        return {
            number: {leaf: value[i] if self.stacked else value for leaf, value in tensors.items()}
            for i, number in enumerate(self.numbers)
        }


@dataclass(frozen=True)
class Part:
    """What Megatron stores as one piece: one layer's share of a tensor."""

    name: str
    offset: tuple[int, ...]
    """Where it lies in the whole tensor."""
    value: Tensor
    size: tuple[int, ...]
    """Shape of the whole tensor."""


def geometry(args: Any, config: FoPEConfig) -> Geometry:
    """FoPE's numbers for a checkpoint's model, from its arguments."""
    one_head = getattr(args, "multi_latent_attention", False)
    heads = 1 if one_head else num_kv_heads_of(args) or args.num_attention_heads
    return Geometry(config, head_dim_of(args), heads)


def attention_layers(checkpoint: Checkpoint) -> list[AttentionLayers]:
    """All self-attention layers of a ``torch_dist`` checkpoint.

    Raises:
        UserError: none at all, or some whose place in the model is not known here.
    """
    layers = []
    for name, entry in checkpoint.tensors.items():
        match = _PROJECTION.fullmatch(name)
        if match is None or is_optimizer(name):
            continue
        prefix = match[1]
        if decoder := _DECODER.fullmatch(prefix):
            stacked = decoder[1] is None
            numbers = range(1, entry.size[0] + 1) if stacked else (int(decoder[1]) + 1,)
            layers.append(AttentionLayers(prefix, tuple(numbers), "decoder", stacked))
        elif prediction := _PREDICTION.fullmatch(prefix):
            layers.append(AttentionLayers(prefix, (int(prediction[1]) + 1,), "mtp", False))
        else:
            raise UserError(
                f"{checkpoint.path} has self-attention in {prefix}*, which this command does not know "
                "(only decoder.layers and mtp.layers of GPT models); use training with "
                "--fope-start-from-rope"
            )
    if not layers:
        raise UserError(f"{checkpoint.path} has no self-attention layer that could get coefficients")
    return layers


def new_parts(checkpoint: Checkpoint, old: FoPEConfig | None, new: FoPEConfig) -> Iterator[Part]:
    """The coefficients of all layers under new settings, in the pieces that Megatron stores.

    Args:
        checkpoint: the source.
        old: its settings, whose coefficients grow (see :mod:`megatron_fope.formula.growth`); None: a RoPE
            model, which gets the coefficients of a new one.
        new: the new settings.
    """
    target = geometry(checkpoint.args, new)
    for layers in attention_layers(checkpoint):
        if old is None:
            values = {
                number: target.make_coefficients(layer=number, stack=layers.stack)
                for number in layers.numbers
            }
        else:
            source = geometry(checkpoint.args, old)
            stored = {leaf: checkpoint.read_tensor(layers.name(leaf)) for leaf in old.coefficient_names}
            values = {
                number: grow_coefficients(value, source, target, layer=number, stack=layers.stack)
                for number, value in layers.split(stored).items()
            }
        yield from _parts(layers, values)


def _parts(layers: AttentionLayers, values: dict[int, dict[str, Tensor]]) -> Iterator[Part]:
    for leaf in values[layers.numbers[0]]:
        for i, number in enumerate(layers.numbers):
            value = values[number][leaf].to(torch.float32)
            if not layers.stacked:
                yield Part(layers.name(leaf), (0,) * value.dim(), value, tuple(value.shape))
                continue
            size = (len(layers.numbers), *value.shape)
            yield Part(layers.name(leaf), (i, *(0,) * value.dim()), value.unsqueeze(0), size)
