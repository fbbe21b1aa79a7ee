"""Bytes that a function really allocates, keeps and saves for the backward pass: on a CPU and on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """What a call did to the memory of its device, beyond what was held before."""

    peak: int
    """Bytes held at once at most, the result included."""
    left: int
    """Bytes still held after the result was released: caches."""


def allocation(function: Callable[[], Any], device: torch.device) -> Allocation:
    """Call a function and release its result.

    On a GPU torch's allocator counts (in blocks of 512 bytes); on a CPU torch's profiler records every
    allocation and release of the allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        peak, left = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Allocation(peak - before, left - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports a missing GPU as an error
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return Allocation(peak, held)


def saved_for_backward(function: Callable[[], Any]) -> tuple[Any, dict[int, int]]:
    """Memory that autograd keeps for the backward pass of a function.

    Returns:
        The function's result, which keeps that memory alive, and ``{address: bytes}`` of the storages behind
        the saved tensors.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, saved


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """``{address: bytes}`` of the memory behind tensors; shared memory appears once."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
