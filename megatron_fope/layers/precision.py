"""Tensors that stay as they are while the model around them is cast, moved or materialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class KeepsDtype(torch.nn.Module):
    """A module that moves with its model, but whose own tensors keep their dtype and every bit.

    ``Float16Module`` and DeepSpeed cast whole modules, buffers included, and a cast there and back would lose
    bits. ``to_empty`` replaces every tensor by undefined memory, which ``load_state_dict`` does not mend for
    buffers that no checkpoint holds. So each tensor is put back from the one it was before; one that had no
    numbers, on the meta device, gets those of a new module.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Written out because deepspeed.zero.Init (0.16) gives a class without a constructor that of
        # torch.nn.Module, which would not go on to the next base class.
        super().__init__(*args, **kwargs)

    def initial_tensors(self) -> dict[str, Tensor]:
        """The numbers of a new module, on the CPU: ``{name: tensor}`` of every parameter and buffer."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Start again as a new module; PyTorch's and Megatron's FSDP ask for it after ``to_empty``."""
        self._put_back(self.initial_tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: tensor.data for name, tensor in self._own_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._own_tensors():
            if tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        real = {name for name, tensor in self._own_tensors() if not tensor.is_meta}
        lost = {name for name in real if before[name].is_meta}
        self._put_back({name: before[name] for name in real - lost})
        if lost:
            self._put_back({name: value for name, value in self.initial_tensors().items() if name in lost})
        return self

    def _put_back(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            tensor = getattr(self, name)
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)

    def _own_tensors(self) -> list[tuple[str, Tensor]]:
        named = (*self._parameters.items(), *self._buffers.items())
        return [(name, tensor) for name, tensor in named if tensor is not None]
