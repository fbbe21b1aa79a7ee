"""Tables of sin and cos that are kept between calls, so that all layers and both passes share them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class _Entry:
    bases: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    coefficients: Pair
    """Kept alive: another tensor must not get their address."""
    key: tuple[Any, ...]
    tables: Pair
    pinned: bool = False
    """A CUDA graph reads these tables whenever it is replayed."""


class TableCache:
    """The most recently made tables, found by the very tensors they were made from.

    An entry lives as long as its basis: one made for a single call leaves nothing behind. Coefficients are
    compared by address and version, because a tensor-parallel rank's slice is a new view in every call. Not
    for coefficients that learn: optimizers write to parameters without a new version.

    Args:
        size: entries kept, not counting those that CUDA graphs use.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: list[_Entry] = []
        self._lock = threading.RLock()  # a basis may die, and call _forget, anywhere

    def get(self, bases: Pair, coefficients: Pair, *settings: Any, build: Callable[[], Pair]) -> Pair:
        """The tables of these tensors and settings.

        While a CUDA graph is captured, tables that exist are used, and never freed afterwards; new ones
        belong to the graph and are not kept.
        """
        if any(t.is_inference() for t in (*bases, *coefficients)):  # these have no version
            return build()
        capturing = _is_capturing(bases[0].device)
        # Another stream might read the tables before they are made. A capture starts synchronized.
        stream = None if capturing else _stream(bases[0].device)
        key = (*settings, *map(_identity, coefficients), *(t._version for t in bases))
        with self._lock:
            for entry in self._entries:
                known = all(ref() is basis for ref, basis in zip(entry.bases, bases, strict=True))
                if known and entry.key[1:] == key and (capturing or entry.key[0] == stream):
                    entry.pinned |= capturing
                    self._entries = [*(e for e in self._entries if e is not entry), entry]
                    return entry.tables
        tables = build()
        if not capturing:
            refs = tuple(weakref.ref(basis, self._forget) for basis in bases)
            with self._lock:
                self._entries = [*self._entries, _Entry(refs, coefficients, (stream, *key), tables)]
                recent = [entry for entry in self._entries if not entry.pinned][-self._size :]
                self._entries = [e for e in self._entries if e.pinned or e in recent]
        return tables

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            self._entries = [e for e in self._entries if e.pinned or not any(ref is dead for ref in e.bases)]

    def __len__(self) -> int:
        return len(self._entries)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
