"""What is made from tensors and kept until they change: bases, tables, and one copy of equal coefficients."""

from __future__ import annotations

import functools
import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Place = tuple[str, int]
"""Stack and number of a layer."""


@dataclass(eq=False)
class _Entry[Value]:
    settings: Hashable
    sources: tuple[Tensor, ...]
    owners: tuple[weakref.ref[Tensor], ...]
    memory: tuple[Any, ...]
    versions: tuple[int | None, ...]
    stream: int | None
    place: Place | None
    value: Value
    pinned: bool = False
    """A CUDA graph reads the value whenever it is replayed."""


class VersionedCache[Value]:
    """Values made from tensors, found again by the tensors' memory and PyTorch's count of writes to it.

    Kept values serve the stream they were made on: another one might read what is not made yet. A capture of
    a CUDA graph starts synchronized. It may use every kept value, which then stays for good because the graph
    reads it; new values belong to the graph and are not kept. Writes do not count while a graph is captured:
    Megatron writes a layer's buffers back, unchanged, between its captures.

    Args:
        size: values kept, the least recently used goes first; those that graphs read do not count. None: no
            limit.
        by_stream: False: a value serves all streams.
    """

    def __init__(self, size: int | None = 4, *, by_stream: bool = True) -> None:
        self._size, self._by_stream = size, by_stream
        self._entries: OrderedDict[Hashable, _Entry[Value]] = OrderedDict()
        self._read_by_graphs: list[Value] = []
        """Values that are no longer found."""
        self._lock = threading.RLock()  # an owner may die, and call _owner_died, anywhere

    def get(
        self,
        slot: Hashable,
        build: Callable[[], Value],
        *,
        settings: Hashable = (),
        sources: tuple[Tensor, ...] = (),
        owners: tuple[Tensor, ...] = (),
        place: Place | None = None,
    ) -> Value:
        """The value of these tensors and settings, new or kept.

        Args:
            slot: a new value replaces that of the same slot.
            build: makes the value.
            settings: what decides the value besides the tensors and ``slot``.
            sources: tensors that the value is made from, found by their memory and kept alive.
            owners: the same, found by their identity; the value goes with the first of them that dies.
            place: of the layer that asks, where writes may go uncounted; the value then serves later layers
                of the stack only. When a layer or an earlier one comes again, it is the next step.
        """
        capturing = is_capturing()
        stream = _stream() if self._by_stream and not capturing else None
        tensors = (*sources, *owners)
        memory, versions = tuple(map(_memory, tensors)), tuple(map(_version, tensors))
        with self._lock:
            entry = self._entries.get(slot)
            if (
                entry is not None
                and (entry.settings, entry.memory) == (settings, memory)
                and (capturing or (entry.versions, entry.stream) == (versions, stream))
                and all(ref() is owner for ref, owner in zip(entry.owners, owners, strict=True))
                and (place is None or _is_later(place, entry.place))
            ):
                entry.place = place
                entry.pinned |= capturing
                self._entries.move_to_end(slot)
                return entry.value
        value = build()
        if not capturing:
            refs = tuple(weakref.ref(owner, functools.partial(self._owner_died, slot)) for owner in owners)
            self._keep(slot, _Entry(settings, sources, refs, memory, versions, stream, place, value))
        return value

    def forget(self, slot: Hashable) -> None:
        """Make the value of a slot anew when it is next asked for."""
        with self._lock:
            entry = self._entries.pop(slot, None)
            if entry is not None and entry.pinned:
                self._read_by_graphs.append(entry.value)

    def clear(self) -> None:
        """Forget all values, also those that CUDA graphs read: only where none is replayed again."""
        with self._lock:
            self._entries.clear()
            self._read_by_graphs.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _keep(self, slot: Hashable, entry: _Entry[Value]) -> None:
        with self._lock:
            self.forget(slot)
            self._entries[slot] = entry
            if self._size is not None:
                unpinned = [key for key, kept in list(self._entries.items()) if not kept.pinned]
                for key in unpinned[: -self._size]:
                    self._entries.pop(key, None)

    def _owner_died(self, slot: Hashable, dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            entry = self._entries.get(slot)
            if entry is not None and not entry.pinned and any(ref is dead for ref in entry.owners):
                del self._entries[slot]


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int | None:
    """PyTorch's count of writes; tensors made in inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def _is_later(place: Place, last: Place | None) -> bool:
    return last is not None and place[0] == last[0] and place[1] > last[1]


@functools.cache
def _has_cuda() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream if _has_cuda() else 0


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on this stream."""
    return _has_cuda() and torch.cuda.is_current_stream_capturing()


# Equal coefficients of several layers -------------------------------------------------------------------

_canonical: VersionedCache[Tensor] = VersionedCache(size=None, by_stream=False)
_by_content: weakref.WeakValueDictionary[tuple[str, ...], Tensor] = weakref.WeakValueDictionary()


def canonical(tensor: Tensor) -> Tensor:
    """A copy of a tensor, the same one for all tensors that are equal; nobody writes to it.

    In profiles with shared layers every layer holds the same coefficients, each its own copy: a checkpoint
    has an entry per layer, and a layer may live on any pipeline stage. Tables are found by the coefficients'
    memory, so all layers of a process must use one copy to share them.

    Values are read (a copy to the CPU) the first time a tensor is seen, and again after it was moved, loaded
    (:func:`forget`) or written to. While a CUDA graph is captured nothing can be read: a tensor that was not
    read yet then stands for itself.

    Args:
        tensor: frozen and contiguous.
    """
    return _canonical.get(id(tensor), lambda: _read(tensor), owners=(tensor,))


def forget(tensor: Tensor) -> None:
    """Read a tensor's values again when :func:`canonical` is next asked for it."""
    _canonical.forget(id(tensor))


def _read(tensor: Tensor) -> Tensor:
    if is_capturing():
        return tensor.data
    digest = hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
    key = (digest, str(tensor.device), str(tensor.dtype), str(tuple(tensor.shape)))
    found = _by_content.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _by_content[key] = tensor.detach().clone()
    return found
