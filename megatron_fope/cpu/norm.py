"""Megatron's plain PyTorch norm under sequence parallelism, and in the place of Transformer Engine's."""

from __future__ import annotations

import copy
from typing import Any

import torch


def install() -> None:
    """Let ``WrappedTorchNorm`` do all norms, also under ``--sequence-parallel``.

    It refuses only because it does not mark its parameters: each tensor-parallel rank normalises its
    part of the sequence, so the gradients of weight and bias must be summed over the ranks, which
    Megatron does for parameters that carry ``sequence_parallel = True``. The norms of Apex and
    Transformer Engine set that mark themselves; here it is set after construction.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_fope import compat

    # A hybrid stack's final norm is named in the code and not in the spec.
    if (hybrid_stack := compat.hybrid_stack_module()) is not None:
        hybrid_stack.TENorm = WrappedTorchNorm
    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = original(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)
