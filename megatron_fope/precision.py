"""Tensors that stay as they are when a model is cast to 16 bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KeepsPrecision(torch.nn.Module):
    """A module that moves with its model, but whose own tensors keep their dtype and every bit.

    ``Float16Module`` and DeepSpeed cast whole modules, buffers included. A cast there and back would lose
    bits, so what was cast is put back from the tensor it had before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Written out because deepspeed.zero.Init (0.16) gives a class without a constructor that of
        # torch.nn.Module, which would not go on to the next base class.
        super().__init__(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: tensor.data for name, tensor in self._own_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._own_tensors():
            if tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        return self

    def _own_tensors(self) -> list[tuple[str, Tensor]]:
        return [*self._parameters.items(), *self._buffers.items()]
