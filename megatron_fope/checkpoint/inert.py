"""Reading and writing what ``torch.save`` wrote, without importing the classes in it.

A checkpoint's arguments hold enumerations and small records of Megatron. Objects of classes that are not
known to be harmless become :class:`Inert` ones: values without behaviour, which are written back as what they
were. So no code of a checkpoint runs, and Megatron need not be there.
"""

from __future__ import annotations

import argparse
import contextlib
import copyreg
import io
import pickle
import pickletools
import sys
import types
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch

_STANDARD_LIBRARY = {
    "_codecs.encode",
    "_io.BytesIO",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "collections.Counter",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.deque",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "decimal.Decimal",
    "fractions.Fraction",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
    "uuid.UUID",
}
"""What arguments may hold of Python's own library, which otherwise has nothing but ways to run code."""

_EXTRA_STATE = {
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "builtins": {"bytearray"},
    "collections": {"OrderedDict"},
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.core.multiarray": {"_reconstruct"},
    "torch": {"Size", "device"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"UntypedStorage", "_load_from_bytes"},
}
"""What a layer of Transformer Engine keeps besides its weights; its recipes come on top."""

_HARMLESS = {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}


class Inert:
    """An object whose class was not imported; subclasses stand for one class each."""

    original = ""
    """Full name of the class."""
    _arguments: tuple[Any, ...] | None = None  # None: made by __new__ alone
    _new_arguments: tuple[Any, ...]
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
            new = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed lacks pickle's own helper
            return new, (type(self), *self._new_arguments), self._state
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
    names = foreign_classes(file)
    for name in names:
        _check_standard_library(name)
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_HARMLESS.get(name) or _inert_class(name), name) for name in names
    ]
    with torch.serialization.safe_globals(known):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def foreign_classes(file: IO[bytes] | str) -> list[str]:
    """Names in what ``torch.save`` wrote, of which PyTorch loads none unless it has been told to.

    Args:
        file: a path or a seekable binary stream.

    Raises:
        Exception: what a damaged file may raise.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if hasattr(file, "seek"):
        file.seek(0)
    return sorted(names)


def asked_classes(file: IO[bytes] | str) -> list[str]:
    """Names that pickles of any kind ask for, as far as they can be seen without running: for messages."""
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as stream:
        names: list[str] = []
        texts: list[str] = []
        with contextlib.suppress(Exception):
            if zipfile.is_zipfile(stream):
                archive = zipfile.ZipFile(stream)
                inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                stream = io.BytesIO(archive.read(inner))
            stream.seek(0)
            while True:  # the old format is several pickles, one behind the other
                for operation, argument, _ in pickletools.genops(stream):
                    if operation.name == "GLOBAL":
                        names.append(str(argument).replace(" ", "."))
                    elif operation.name == "STACK_GLOBAL":
                        names.append(".".join(texts[-2:]))
                    elif isinstance(argument, str):
                        texts.append(argument)
    return names


def check_extra_state(value: Any) -> None:
    """Refuse what a layer of Transformer Engine would unpickle out of its extra state, if it is no data.

    Args:
        value: the state, as :func:`load` returned it.

    Raises:
        pickle.UnpicklingError: naming a class that has no place there.
        Exception: what damaged bytes may raise.
    """
    if isinstance(value, list | tuple):
        for part in value:
            check_extra_state(part)
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        _check_pickle(value.numpy().tobytes())
    elif isinstance(value, io.BytesIO):
        _check_pickle(value.getvalue())
    elif isinstance(value, Inert) and value.original == "_io.BytesIO":
        _check_pickle(value._state[0])


def _check_pickle(data: bytes) -> None:
    if data.startswith(b"PK"):
        for name in foreign_classes(io.BytesIO(data)):
            _ExtraState(io.BytesIO()).find_class(*name.rpartition(".")[::2])
    elif data:
        _ExtraState(io.BytesIO(data)).load()


class _ExtraState(pickle.Unpickler):
    """Reads a pickle without any of its classes, to see which ones it asks for."""

    def find_class(self, module: str, name: str) -> Any:
        data_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        recipe = module.startswith("transformer_engine.common.recipe")
        if not (data_type or recipe or name in _EXTRA_STATE.get(module, ())):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a layer's extra state")
        return _inert_class(f"{module}.{name}")


def _check_standard_library(name: str) -> None:
    # Names of builtins have been written in Python 2's way, too.
    if name.partition(".")[0] in {*sys.stdlib_module_names, "__builtin__"} and name not in _STANDARD_LIBRARY:
        raise pickle.UnpicklingError(f"{name} has no place in a checkpoint")


def save(value: Any, file: IO[bytes]) -> None:
    """Write what :func:`load` returned, possibly changed, as ``torch.save`` would write the original."""
    torch.save(value, file, pickle_module=_PICKLE)


def _inert_class(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"original": name})


# typeshed knows little of the pickler that is written in Python.
class _Pickler(pickle._Pickler):
    """Names the original class in place of the one that stands for it, which it cannot be asked to import."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, Inert)):
            super().save_global(obj, name)  # type: ignore[misc]
            return
        module, _, attribute = obj.original.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


_PICKLE = types.SimpleNamespace(Pickler=_Pickler, __name__="pickle")
