"""Asynchronous saving of checkpoints (``--async-save --use-persistent-ckpt-worker``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_write_loop: Callable[..., None]
"""Megatron's own loop of the process that writes; :func:`install` sets it."""


def install() -> None:
    """Let Megatron's writer process run on the CPU, and give it a copy of what it shall write.

    The process starts from nothing and asks for its GPU first. It then copies the tensors from the GPU while
    training waits. Tensors of a CPU are shared with the trainer instead, which would go on to change them
    while they are being written.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    global _write_loop
    caller, writer = async_utils.PersistentAsyncCaller, filesystem_async.FileSystemWriterAsync
    _write_loop = caller.async_loop
    caller.async_loop = staticmethod(write_in_background)
    original = writer.preload_tensors

    @functools.wraps(original)
    def preload_tensors(*args: Any, **kwargs: Any) -> list[Any]:
        return [
            (name, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for name, key, (data, tensors) in original(*args, **kwargs)
        ]

    writer.preload_tensors = staticmethod(preload_tensors)


def write_in_background(*args: Any, **kwargs: Any) -> None:
    """Main function of the writer process: Megatron's, on the CPU."""
    from megatron_fope.cpu import enable

    enable()
    _write_loop(*args, **kwargs)
