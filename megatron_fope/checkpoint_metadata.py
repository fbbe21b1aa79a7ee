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
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of contents")
