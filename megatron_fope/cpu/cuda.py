"""Stand-ins for ``torch.cuda``: Megatron addresses CUDA directly in hundreds of places.

Three layers, from the outside in: functions and classes of ``torch.cuda`` are replaced by ones that
answer for the CPU; ``Tensor.cuda`` and friends return the tensor itself; and a ``TorchFunctionMode``
rewrites ``device="cuda"`` in every call of a tensor function.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_fope.cpu.environment import local_world_size

CPU = torch.device("cpu")

_NUMBER_TYPES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")


def _names_cuda(device: object) -> bool:
    """Whether a ``device`` argument means a GPU: a string, a ``torch.device`` or a bare index."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class CudaAsCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` to the CPU in every tensor function.

    Needed because Megatron creates tensors with ``device="cuda"``, ``torch.cuda.current_device()`` or
    ``.to("cuda")`` everywhere, and a build without CUDA refuses. ``pin_memory=True`` is dropped as well:
    only memory that a GPU copies from can be pinned.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if func is torch.device and args == ("cuda:cpu",):  # f"cuda:{torch.cuda.current_device()}"
            return CPU
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """For calls with an effect on a GPU only."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """For counters of GPU memory."""
    return 0


class NoStream:
    """Stands for ``torch.cuda.Stream`` and ``torch.cuda.Event``: CPU work is already in order.

    Needed because data parallelism, pipeline communication, checkpoint writers and timers order their
    work with streams and events.
    """

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing
    elapsed_time = _zero
    """Unknown, and only reported."""

    def record_event(self, event: NoStream | None = None) -> NoStream:
        """An event that has already happened."""
        return event or NoStream()

    def query(self) -> bool:
        """Everything before this call is done."""
        return True


def _no_stream(*args: Any, **kwargs: Any) -> NoStream:
    """For everything that hands out a stream."""
    return NoStream()


def _properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """A Hopper-like description.

    Megatron reads ``major`` while it checks tensor parallelism, some features read the rest.
    """
    return SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The CPU generator's state: on the CPU, it is the one that dropout draws from."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the CPU generator's state; without it, all tensor-parallel ranks would drop out alike."""
    torch.set_rng_state(new_state)


def _cuda_stand_ins() -> dict[str, Any]:
    """Replacement of each ``torch.cuda`` attribute that Megatron's training loop touches."""
    stand_ins: dict[str, Any] = {
        # False, not a pretended True: libraries that honestly ask must take their CPU path. Megatron's
        # own check is answered in runtime.py.
        "is_available": lambda: False,
        # One "device" per process, so that local ranks pass Megatron's device arithmetic.
        "device_count": local_world_size,
        # A device, not an index: it also serves code that runs outside the mode (other threads).
        "current_device": lambda: CPU,
        "set_device": _nothing,
        "get_device_properties": _properties,
        "get_device_name": lambda *args: "cpu",
        "get_device_capability": lambda *args: (9, 0),
        # Ordering of work.
        "synchronize": _nothing,
        "Stream": NoStream,
        "Event": NoStream,
        "current_stream": _no_stream,
        "default_stream": _no_stream,
        "set_stream": _nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        # Random numbers; Megatron seeds the GPU's generator per tensor-parallel rank.
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": lambda seed: torch.manual_seed(int(seed)),
        # torch.manual_seed calls this one, so it must not seed again.
        "manual_seed_all": _nothing,
        # Memory reports.
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "mem_get_info": lambda *args: (0, 0),
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "device_memory_used": _zero,
    }
    # Optimizers and data parallelism sort tensors by spellings such as torch.cuda.FloatTensor.
    for name in _NUMBER_TYPES:
        stand_ins[f"{name}Tensor"] = getattr(torch, f"{name}Tensor")
    return stand_ins


def _own(function: Callable) -> Callable:
    """The function as an object of its own: ``torch.compile`` keeps a rule per object and refuses two."""

    @functools.wraps(function)
    def own(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return own


def _replace_tensor_methods() -> None:
    """Make the methods that move tensors to a GPU return the tensor, and ``type()`` speak CUDA.

    Replaced on the class and not in the mode, because a mode is local to one thread. ``Tensor.type()``
    answers ``torch.cuda.FloatTensor``: Megatron's gradient clipping, buffers of data parallelism and
    optimizers compare with those names and refuse others.
    """
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    def itself(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    setattr(torch.Tensor, "type", tensor_type)  # noqa: B010 (its type is that of all overloads)
    torch.Tensor.cuda = itself
    torch.Tensor.pin_memory = itself
    torch.nn.Module.cuda = itself


def _distribute_on_cpu() -> None:
    """Keep ``torch.distributed`` off the GPU.

    Megatron binds the default group to ``cuda:<local rank>``, and names ``cuda`` for the mesh from which FSDP
    takes its device.
    """
    from torch.distributed.device_mesh import DeviceMesh

    original, from_group = torch.distributed.init_process_group, DeviceMesh.from_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        original(*args, **kwargs)

    def from_group_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if _names_cuda(device_type) else device_type, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group
    DeviceMesh.from_group = staticmethod(from_group_on_cpu)


def install() -> None:
    """Replace ``torch.cuda`` for this process and enter the mode for this thread. Call it once."""
    # Libraries that bypass torch (and child processes) must not find a GPU either.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name, stand_in in _cuda_stand_ins().items():
        setattr(torch.cuda, name, stand_in if isinstance(stand_in, type) else _own(stand_in))
    torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.random.set_rng_state = set_rng_state
    torch.cuda.nvtx.range_push = _own(_nothing)
    torch.cuda.nvtx.range_pop = _own(_nothing)
    _replace_tensor_methods()
    _distribute_on_cpu()
    CudaAsCpu().__enter__()


def with_cuda_as_cpu(function: Callable) -> Callable:
    """Run a function under the rewriting of devices.

    Autograd calls backward functions without any mode, and recomputation runs whole forward passes there.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with CudaAsCpu():
            return function(*args, **kwargs)

    return run
