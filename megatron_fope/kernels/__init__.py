"""Triton kernels for the rotation of queries and keys. Importing this package does not import Triton.

:func:`available` tells whether they can run; :func:`megatron_fope.kernels.ops.rotate_triton` is the rotation.
"""

from __future__ import annotations

import functools
import os

import torch

_MIN_CAPABILITY = (8, 0)
"""Ampere, the first generation with bfloat16 and TF32."""


def available(device: torch.device | str) -> str | None:
    """Why the Triton path cannot run on a device.

    Args:
        device: where query and key are.

    Returns:
        The reason, to be shown to the user, or None: it can run. On a CPU only under ``TRITON_INTERPRET=1``,
        Triton's interpreter, which is for tests.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _available_on_gpu(torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        return f"Triton kernels run on NVIDIA GPUs, not on {device.type!r} devices"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("1", "true", "on", "yes"):
        return "Triton kernels run on NVIDIA GPUs, on a CPU only for tests with TRITON_INTERPRET=1"
    return _missing()


@functools.cache
def _available_on_gpu(index: int) -> str | None:
    if torch.version.cuda is None:
        return "Triton kernels are for NVIDIA GPUs; this PyTorch is built for another vendor's"
    if torch.cuda.get_device_capability(index) < _MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"Triton kernels need compute capability 8.0 or higher (Ampere); GPU {index} is a {name}"
    return _missing()


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with PyTorch for CUDA, or: pip install triton"
    del triton
    return None
