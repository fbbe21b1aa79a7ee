"""Reading and writing what ``torch.save`` wrote, without importing the classes in it.

A checkpoint's arguments hold enumerations and small records of Megatron. Objects of classes that are not
known to be harmless become :class:`Inert` ones: values without behaviour, which are written back as what they
were. So no code of a checkpoint runs, and Megatron need not be there.
"""

from __future__ import annotations

import argparse
import copyreg
import pickle
import types
from typing import IO, Any

import torch

_HARMLESS = {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}


class Inert:
    """An object whose class was not imported; subclasses stand for one class each."""

    original = ""
    """Full name of the class."""
    _arguments: tuple[Any, ...] | None = None  # None: made by __new__ alone
    _state: Any = None

    def __new__(cls, *arguments: Any) -> Inert:
        self = super().__new__(cls)
        self._new_arguments = arguments
        return self

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if self._arguments is None:
            return copyreg.__newobj__, (type(self), *self._new_arguments), self._state
        return type(self), self._arguments, self._state

    def _identity(self) -> tuple[Any, ...]:
        return self.original, self._arguments, self._new_arguments, self._state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self.original)

    def __repr__(self) -> str:
        values = self._arguments if self._arguments is not None else (self._state,)
        return f"{self.original.rpartition('.')[2]}({', '.join(map(repr, values))})"


def load(file: IO[bytes] | str, *, mapped: bool = False) -> Any:
    """Read what ``torch.save`` wrote, tensors included (on the CPU).

    Args:
        file: a path or a seekable binary stream.
        mapped: leave the tensors' numbers on disk until they are looked at; for paths.

    Raises:
        Exception: what a damaged file may raise; ``pickle.UnpicklingError`` for one that is not plain data.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if hasattr(file, "seek"):
        file.seek(0)
    known = [(_HARMLESS.get(name) or _inert_class(name), name) for name in names]
    with torch.serialization.safe_globals(known):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def save(value: Any, file: IO[bytes]) -> None:
    """Write what :func:`load` returned, possibly changed, as ``torch.save`` would write the original."""
    torch.save(value, file, pickle_module=_PICKLE)


def _inert_class(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"original": name})


class _Pickler(pickle._Pickler):
    """Names the original class in place of the one that stands for it, which it cannot be asked to import."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, Inert)):
            super().save_global(obj, name)
            return
        module, _, attribute = obj.original.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
        self.memoize(obj)


_PICKLE = types.SimpleNamespace(Pickler=_Pickler, __name__="pickle")
