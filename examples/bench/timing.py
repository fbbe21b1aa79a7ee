"""Timing several calls in one run, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.providers import Call

MODES = ("forward", "backward", "both")

_FLUSH_BYTES = 256 << 20
"""More than the L2 cache of any GPU so far."""

_HEAD_START = 4_000_000
"""GPU cycles, about two milliseconds, that the host gets to enqueue a call before the GPU starts it."""


@dataclass(frozen=True)
class Quantiles:
    """Median, 20 % and 80 % quantile."""

    q50: float
    q20: float
    q80: float


def quantiles(samples: list[float]) -> Quantiles:
    """Quantiles with linear interpolation between order statistics.

    Args:
        samples: at least one.
    """
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Quantiles(at(0.5), at(0.2), at(0.8))


@dataclass
class Samples:
    """What was measured for one call, by mode."""

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Time on the device; on a CPU that is all there is."""
    host_microseconds: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Time until the call returned, which on a GPU is the time to enqueue it."""

    def add(self, device_ms: tuple[float, float], host_us: tuple[float, float]) -> None:
        """One repetition: forward and backward."""
        for target, pair in ((self.milliseconds, device_ms), (self.host_microseconds, host_us)):
            for mode, value in zip(MODES, (*pair, sum(pair)), strict=True):
                target[mode].append(value)


def measure(
    calls: dict[str, Call], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, Samples]:
    """Time all calls in turns.

    Every round runs each call once, and each round starts with another one. On a CPU a call finds the cache
    as the one before left it; on a GPU the L2 cache is flushed before each direction, and the queue is
    kept filled, so that the time is the device's and not the host's.

    Args:
        calls: by name; each has run before (compilation, first allocations).
        device: where they run.
        seconds: stop after the round in which this time is over.
        least: rounds at least.
        most: rounds at most.
    """
    once = _once_cuda if device.type == "cuda" else _once_cpu
    names = list(calls)
    samples = {name: Samples() for name in names}
    for call in calls.values():
        once(call, device)
    start = time.perf_counter()
    for round_number in range(most):
        if round_number >= least and time.perf_counter() - start > seconds:
            break
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].add(*once(calls[name], device))
    return samples


def _once_cpu(call: Call, device: torch.device) -> tuple[tuple[float, float], tuple[float, float]]:
    call.forget()
    forward, outputs = _timed(call.forward)
    call.forget()
    backward, _ = _timed(lambda: call.backward(outputs))
    return (forward / 1e3, backward / 1e3), (forward, backward)


def _once_cuda(call: Call, device: torch.device) -> tuple[tuple[float, float], tuple[float, float]]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    call.forget()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_HEAD_START)
    flush.zero_()
    marks[0].record()
    forward, outputs = _timed(call.forward)
    marks[1].record()
    call.forget()
    flush.zero_()
    marks[2].record()
    backward, _ = _timed(lambda: call.backward(outputs))
    marks[3].record()
    torch.cuda.synchronize(device)
    times = marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])
    return times, (forward, backward)


def _timed(function: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return (time.perf_counter() - start) * 1e6, result


def fixed_microseconds(call: Call, repetitions: int = 50) -> dict[str, float]:
    """What a call costs on a CPU however small its tensors are, by mode.

    Args:
        call: on tensors of one token.
        repetitions: the median is taken over so many.
    """
    samples = Samples()
    for _ in range(repetitions):
        samples.add(*_once_cpu(call, torch.device("cpu")))
    return {mode: statistics.median(samples.host_microseconds[mode]) for mode in MODES}
