"""Compiles the kernels as a GPU would run them, on a machine without one, and prints what came out as JSON.

Triton's compiler and NVIDIA's assembler need no GPU. The launches are the real ones: the same code chooses
arguments, specialisation and options; only the last step, running, is left out. Must not be run under
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from kernel_cases import Case, Inputs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from megatron_fope.formula.geometry import effective_coefficients
from megatron_fope.kernels import launch, triton_rotary
from megatron_fope.kernels.launch import Call

KERNEL = triton_rotary.rotate_kernel


class Driver:
    """Says which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case, capability: int = 90) -> tuple[Any, Any]:
    """The compiled kernels of a case's forward and backward pass."""
    triton.runtime.driver.set_active(Driver(capability))
    compiled: list[Any] = []

    def warm(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

    KernelInterface.__getitem__ = warm
    inputs = Inputs(case)
    sin_coef, cos_coef = effective_coefficients(inputs.config, inputs.coefficients)
    call = Call(*inputs.basis, sin_coef, cos_coef, *inputs.config.pad, case.variant, False)
    launch.forward(inputs.query, inputs.key, call)
    saved = (inputs.query, inputs.key) if case.learning else (None, None)
    launch.backward(*inputs.upstream, *saved, call)
    forward, backward = compiled
    return forward, backward


def describe(kernel: Any) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = functools.partial(_dump, file.name)
        usage, sass = dump("-res-usage"), dump("-sass")
    count = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": count["REG"],
        "stack": count["STACK"],
        "local": count["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "fused": len(re.findall(r"\bFFMA\b", sass)),
        "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
        "precision": sorted(set(re.findall(r"inputPrecision = (\w+)", kernel.asm["ttir"]))),
        "loads": sorted(set(re.findall(r"\bLDG\.E\.EF[.\w]*", sass))),
        "stores": sorted(set(re.findall(r"\bSTG\.E[.\w]*", sass))),
    }


def _dump(file: str, option: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def num_compiled() -> int:
    """Kernels compiled so far, over all devices."""
    return sum(len(entry[0]) for entry in KERNEL.device_caches.values())


def resources() -> dict[str, Any]:
    """Every variant, forward and backward, frozen and learning, for Hopper and Ampere."""
    base = {"tokens": 2, "batch": 1, "heads": 4, "kv_heads": 1, "layout": "plain"}
    paper = {"head_dim": 128, "settings": {"train_length": 4096}}
    square = {"head_dim": 128, "settings": {"num_inv_freq": 40, "square": True}}
    wide = {"head_dim": 256, "settings": {"num_inv_freq": 100, "square": True}}
    cases = [
        (90, "paper", "tables", True, paper),
        (90, "paper", "fused_tf32x3", True, paper),
        (90, "square", "fused", True, square),
        (90, "wide", "fused", False, wide),
        (80, "paper", "fused", False, paper),
    ]
    found = {}
    for capability, name, variant, learning, geometry in cases:
        case = Case(**base, **geometry, variant=variant, learning=learning)
        forward, backward = compile_case(case, capability)
        found[f"sm_{capability} {name} {variant} forward"] = describe(forward)
        if learning:
            found[f"sm_{capability} {name} {variant} backward"] = describe(backward)
    return found


def counts() -> dict[str, int]:
    """How many kernels are compiled for batches of all sizes of one model."""
    base = {"heads": 2, "kv_heads": 1, "variant": "tables"}
    axes = {
        "tokens": [Case(**base, tokens=n) for n in (1, 2, 7, 16, 33, 64, 257, 4096)],
        "batch": [Case(**base, tokens=5, batch=n) for n in (1, 2, 3, 16)],
    }
    found = {}
    for name, cases in axes.items():
        before = num_compiled()
        for case in cases:
            compile_case(case)
        found[name] = num_compiled() - before
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({"counts": counts(), "resources": resources()}, sys.stdout)
