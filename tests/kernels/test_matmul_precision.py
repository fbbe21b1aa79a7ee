"""PyTorch's switches for shortened float32 products: FoPE neither obeys nor changes nor trips over them.

They exist twice: ``set_float32_matmul_precision`` with ``allow_tf32``, and since 2.9 ``fp32_precision`` of
backends and operations. Some getters of one raise after the other was used. All of them work without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import Case, Inputs
from kernel_fixtures import interpreter  # noqa: F401
from torch import Tensor

from megatron_fope.formula import functional
from megatron_fope.kernels import ops, torch_rotary

NEW = hasattr(torch.backends, "fp32_precision")
CUDA, CPU = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
GETTERS: dict[str, Callable[[], Any]] = {
    "legacy": torch.get_float32_matmul_precision,
    "allow_tf32": lambda: CUDA.allow_tf32,
    "new": lambda: CUDA.fp32_precision,
    "new, CPU": lambda: CPU.fp32_precision,
    "new, all": lambda: torch.backends.fp32_precision,
    "new, convolutions": lambda: torch.backends.cudnn.fp32_precision,
}
LEGACY: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "allow": lambda: setattr(CUDA, "allow_tf32", True),
    "forbid": lambda: setattr(CUDA, "allow_tf32", False),
}
SETTERS: dict[str, Callable[[], None]] = {"untouched": lambda: None, **LEGACY}
if NEW:
    SETTERS |= {
        "tf32": lambda: setattr(CUDA, "fp32_precision", "tf32"),
        "ieee": lambda: setattr(CUDA, "fp32_precision", "ieee"),
        "all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "all ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
        "CPU bf16": lambda: setattr(CPU, "fp32_precision", "bf16"),
    }


def reset() -> None:
    if NEW:
        for owner in (torch.backends, CUDA, CPU):
            owner.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if NEW:
        for owner in (torch.backends, CUDA, CPU):
            owner.fp32_precision = "none"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    reset()
    yield
    reset()


def readings() -> dict[str, Any]:
    found = {}
    for name, getter in GETTERS.items():
        try:
            found[name] = getter()
        except (AttributeError, RuntimeError) as error:
            found[name] = type(error)
    return found


def formula(inputs: Inputs) -> list[Tensor]:
    query, key, coefficients = inputs.leaves()
    sin, cos = inputs.geometry.tables(*inputs.basis, coefficients)
    results = [functional.apply_fourier_rotary(x, sin.unsqueeze(1), cos.unsqueeze(1)) for x in (query, key)]
    return [*results, *torch.autograd.grad(results, [query, key, *coefficients.values()], inputs.upstream)]


def way(rotate: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Callable[[Inputs], list[Tensor]]:
    def run(inputs: Inputs) -> list[Tensor]:
        query, key, coefficients = inputs.leaves()
        results = rotate(query, key, *inputs.basis, coefficients, inputs.config, **options)
        leaves = [query, key, *coefficients.values()]
        return [*results, *torch.autograd.grad(results, leaves, inputs.upstream)]

    return run


WAYS = {
    "formula": formula,
    "torch": way(torch_rotary.rotate),
    "triton, tables": way(ops.rotate_triton, variant="tables"),
    "triton, fused": way(ops.rotate_triton, variant="fused"),
}


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are shortened to 10 bits when the switches say so, as on a GPU; a CPU may ignore them."""

    def shortened(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not functional._shortens_products("cpu" if NEW else "cuda"):
            return x
        return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)

    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: mm(shortened(a), shortened(b), **kw))
    monkeypatch.setattr(torch, "addmm", lambda c, a, b, **kw: addmm(c, shortened(a), shortened(b), **kw))


def small() -> Inputs:
    return Inputs(Case(dtype=torch.float32, tokens=5, batch=1, heads=2, kv_heads=1, head_dim=16))


def pairs(name: str) -> list[tuple[Callable[[], None], ...]]:
    """Two settings after each other; the interpreter is slow, so a few for Triton."""
    if "triton" in name:
        return [(setter,) for setter in SETTERS.values()]
    return [*itertools.product(SETTERS.values(), repeat=2)]


@pytest.mark.parametrize("name", WAYS)
def test_results_are_exact_in_every_state(name: str, obedient: None) -> None:
    inputs = small()
    expected = WAYS[name](inputs)
    for setters in pairs(name):
        for setter in setters:
            setter()
        for a, b in zip(WAYS[name](inputs), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        reset()


def test_the_exact_results_would_notice(obedient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = small()
    expected = formula(inputs)
    monkeypatch.setattr(functional, "multiply", lambda a, b, **options: torch.mm(a, b))
    torch.set_float32_matmul_precision("high")
    assert max((a - b).abs().max() for a, b in zip(formula(inputs), expected, strict=True)) > 1e-4


@pytest.mark.parametrize("name", WAYS)
def test_every_setting_stays_and_can_be_changed(name: str) -> None:
    """One setting or two, then FoPE, then any other: nothing is different from without FoPE."""
    inputs = small()
    for setters in pairs(name):
        found = []
        for fope in (False, True):
            for setter in setters:
                setter()
            if fope:
                WAYS[name](inputs)
            found.append([readings()])
            for last in SETTERS.values():
                last()
                found[-1].append(readings())
            reset()
        assert found[0] == found[1]


def test_old_pytorch_has_one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        matmul = object()

    monkeypatch.setattr(torch.backends, "cuda", Old)
    monkeypatch.setattr(torch.backends, "mkldnn", Old)
    for precision, shortens in (("highest", False), ("high", True), ("medium", True)):
        torch.set_float32_matmul_precision(precision)
        assert functional._shortens_products("cuda") is functional._shortens_products("cpu") is shortens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_which_settings_shorten_products(device: str) -> None:
    expected = {"high", "medium"} | ({"allow"} if device == "cuda" or not NEW else set())
    if NEW:
        expected |= {"all tf32", "tf32" if device == "cuda" else "CPU bf16"}
    found = set()
    for name, setter in SETTERS.items():
        setter()
        if functional._shortens_products(device):
            found.add(name)
        reset()
    assert found == expected
