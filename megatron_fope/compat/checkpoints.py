"""Reading and writing checkpoints."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any


def repair_checkpoint_metadata_reader() -> None:
    """Let checkpoints be read with a strictness other than the default under a recent PyTorch.

    Megatron 0.17 - 0.19 passes every field of PyTorch's ``TensorProperties`` to ``torch.empty``; newer
    PyTorch releases added ``strides``, which ``torch.empty`` refuses. The unknown fields are dropped from
    the metadata before Megatron sees them. Calling it again does nothing.
    """
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    cls = strategy.TorchDistLoadShardedStrategy
    original = cls.load_tensors_metadata
    if hasattr(original, "__wrapped__"):
        return
    accepted = {"dtype", "layout", "requires_grad", "memory_format", "pin_memory"}

    @functools.wraps(original)
    def load_tensors_metadata(self: Any, checkpoint_dir: Any, metadata: Any = None) -> Any:
        if metadata is None:
            metadata = strategy._get_filesystem_reader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            properties = vars(getattr(entry, "properties", None) or SimpleNamespace())
            for name in set(properties) - accepted:
                del properties[name]
        return original(self, checkpoint_dir, metadata)

    cls.load_tensors_metadata = load_tensors_metadata
