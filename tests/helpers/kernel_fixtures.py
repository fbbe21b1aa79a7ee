"""Fixtures of the kernel tests: import their names into a test module, and they apply to all of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_cases import GPU
from torch import Tensor

_KERNELS = "megatron_fope.kernels.triton_rotary"


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Without a GPU the kernels are interpreted, in this module only; Triton looks when they are defined."""
    if GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        if _KERNELS in sys.modules:
            importlib.reload(sys.modules[_KERNELS])
        round_like_a_gpu(patch)
        yield
    if _KERNELS in sys.modules:
        importlib.reload(sys.modules[_KERNELS])


def round_like_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off the lower half of a float32 to make a bfloat16; hardware rounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(values.shape)

    patch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element that a kernel does not write is NaN."""
    from megatron_fope.kernels import launch

    def poisoned(shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)

    monkeypatch.setattr(launch, "_empty", poisoned)
