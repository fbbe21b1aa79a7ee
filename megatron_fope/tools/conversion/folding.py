"""The weights of a checkpoint with the padding's factor in them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.checkpoint.start import unrotated
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.folding import fold, fold_factors
from megatron_fope.tools.conversion.layers import AttentionLayers, Part, attention_layers, geometry


def folded_weights(checkpoint: Checkpoint, config: FoPEConfig) -> dict[str, tuple[AttentionLayers, Tensor]]:
    """Which weights change: layers and factors of their rows, by name.

    Args:
        checkpoint: the source.
        config: FoPE's new settings.

    Raises:
        UserError: query and key are normalised without weights.
    """
    numbers = geometry(checkpoint.args, config)
    factors = fold_factors(checkpoint.args, numbers, numbers.num_kv_heads)
    found = {}
    for layers in attention_layers(checkpoint):
        for leaf, rows in factors.items():
            name = f"{layers.prefix}self_attention.{leaf}"
            if name in checkpoint.tensors:
                found[name] = layers, rows
    return found


def folded_parts(
    checkpoint: Checkpoint, weights: dict[str, tuple[AttentionLayers, Tensor]]
) -> Iterator[Part]:
    """The new weights, one layer after another, in the pieces that Megatron stores.

    Args:
        checkpoint: the source.
        weights: from :func:`folded_weights`.
    """
    args = checkpoint.args
    still = unrotated(getattr(args, "no_rope_freq", None), args.num_layers)
    for name, (layers, factors) in weights.items():
        size = tuple(checkpoint.tensors[name].size)
        for i, number in enumerate(layers.numbers):
            index = (i,) if layers.stacked else ()
            value = checkpoint.read_tensor(name, index)
            if not (isinstance(still, list) and still[number - 1]):
                value = fold(name, value, factors, args)
            offset = (*index, *(0,) * value.dim())
            yield Part(name, offset, value.unsqueeze(0) if layers.stacked else value, size)
