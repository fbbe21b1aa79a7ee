"""Megatron's own estimate of its memory."""

from __future__ import annotations

import copy
from typing import Any


def theoretical_memory(args: Any, microbatches: int) -> tuple[float, float]:
    """Bytes of weights with optimizer, and of activations, as Megatron's report calculates them.

    The same two functions in 0.16 to 0.19 and on main. For one rank of the first pipeline stage, 16-bit
    training with Adam. Of weights they leave out biases, the output layer of the last stage, the share that
    context parallelism has in the distributed optimizer and, through 0.17, that experts are divided among
    ranks. Activations are those of one formula (Korthikanti et al., arXiv 2205.05198, table 2) with sequence
    parallelism and selective recomputation, whatever the flags say; KV heads, gates, experts and context
    parallelism do not enter it.

    Args:
        args: with the sizes that Megatron's validation fills in (``ffn_hidden_size``, ``kv_channels``,
            ``padded_vocab_size``, ``data_parallel_size``, ``expert_tensor_parallel_size``,
            ``virtual_pipeline_model_parallel_size``, ``world_size``); not changed.
        microbatches: of one data-parallel rank in a step.
    """
    from megatron.training import theoretical_memory_usage as theirs

    args = copy.copy(args)  # they write to it
    return (
        theirs.compute_weight_and_optimizer_memory(args),
        theirs.compute_activation_memory(args, num_microbatches=microbatches),
    )
