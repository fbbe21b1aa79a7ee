"""Environment variables that the CPU runtime needs; free of heavy imports."""

from __future__ import annotations

import os


def local_world_size() -> int:
    """Processes of this job on this machine (1 without ``torchrun``)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def prepare_environment(*, fully_sharded: bool = False) -> None:
    """Set what the user has not set.

    ``CUDA_DEVICE_MAX_CONNECTIONS``: Megatron asserts the value 1 as soon as tensor or context parallelism
    is on, and with FSDP another one, although nothing reads it here. ``OMP_NUM_THREADS``: without it every
    rank starts one thread per core, and several ranks on one machine slow each other down many times over.

    Args:
        fully_sharded: FSDP, Megatron's or PyTorch's, is on; a value of 1 is then replaced.
    """
    if fully_sharded and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1") == "1":
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    share = len(os.sched_getaffinity(0)) // local_world_size()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
