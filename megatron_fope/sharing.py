"""One tensor in place of equal ones, so that what is made from them is made once.

In profiles with shared layers every layer holds the same coefficients, each its own copy: a checkpoint has an
entry per layer, and a layer may live on any pipeline stage. Tables are found by the coefficients' memory, so
all layers of a process must use the same copy to share them.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Known:
    own: tuple[int, int]
    """Address and version of the tensor when it was looked at."""
    representative: Tensor | None
    """None: the tensor itself, which must not keep itself alive."""
    version: int


_known = WeakIdKeyDictionary()
_representatives: weakref.WeakValueDictionary[tuple[str, ...], Tensor] = weakref.WeakValueDictionary()


def representative(tensor: Tensor) -> Tensor:
    """A tensor with the same values, the same one for all tensors that are equal.

    Values are read (a copy to the CPU) the first time a tensor is seen, and again after it was moved or
    written to; otherwise nothing is waited for. While a CUDA graph is captured, a tensor whose values would
    have to be read stands for itself.

    Args:
        tensor: frozen and contiguous; writes must count (no inference tensor).
    """
    own = (tensor.data_ptr(), tensor._version)
    known = _known.get(tensor)
    if known is not None and known.own == own:
        found = tensor if known.representative is None else known.representative
        if found._version == known.version:
            return found
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return tensor
    digest = hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
    key = (digest, str(tensor.device), str(tensor.dtype), str(tuple(tensor.shape)))
    found = _representatives.get(key)
    if found is None or _changed(found):
        found = _representatives[key] = tensor
    _known[tensor] = _Known(own, None if found is tensor else found, found._version)
    return found


def _changed(representative: Tensor) -> bool:
    """Whether a representative was written to after it became one."""
    known = _known.get(representative)
    return known is None or known.own != (representative.data_ptr(), representative._version)
