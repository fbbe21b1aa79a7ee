"""Reading a distributed checkpoint's table of contents without trusting it.

PyTorch keeps the table (``.metadata``) as a pickle, and a pickle may call anything when it is read. Only the
classes that describe tensors are let through here.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

METADATA = ".metadata"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
}
"""Everything that PyTorch and Megatron write into the table; types of numbers come on top."""


def read_metadata(iteration: str | Path) -> Any:
    """The table of contents of one iteration: a ``torch.distributed.checkpoint`` ``Metadata``.

    Args:
        iteration: folder of the iteration, ``.../iter_0001000``.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: it holds something else than a table of contents.
        Exception: what a damaged pickle may raise.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    metadata = _Unpickler(io.BytesIO((Path(iteration) / METADATA).read_bytes())).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"a table of contents is expected, not {type(metadata).__name__}")
    try:
        _check_table(metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise pickle.UnpicklingError(f"it is no table of contents: {error}") from None
    return metadata


def _check_table(metadata: Any) -> None:
    """Refuse a table whose parts are not what they should be, or whose files lie elsewhere."""
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                ends = [o + n for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
                inside = all(end <= n for end, n in zip(ends, entry.size, strict=True))
                if not inside or min((*chunk.offsets, *chunk.sizes), default=0) < 0:
                    raise ValueError(f"a part of {name} lies outside of it")
            if str(entry.properties.dtype).partition(".")[0] != "torch":
                raise ValueError(f"{name} has the type {entry.properties.dtype!r}")
        elif not isinstance(name, str) or not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{name!r} is a {type(entry).__name__}")
    for index, place in metadata.storage_data.items():
        path = Path(place.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"its data is in {place.relative_path!r}, outside of the checkpoint")
        if not isinstance(index, MetadataIndex) or place.offset + 0 < 0 or place.length + 0 < 0:
            raise ValueError(f"{index!r} is at {place.offset!r}, {place.length!r} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of contents")
