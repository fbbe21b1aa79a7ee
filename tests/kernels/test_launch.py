"""What surrounds the kernels: compilation, ``torch.compile``, CUDA graphs, kept tables, and bad input."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, GPU, Case, Inputs
from kernel_fixtures import interpreter  # noqa: F401
from launch import ROOT
from torch import Tensor

from megatron_fope import kernels
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry, effective_coefficients
from megatron_fope.kernels import backend as implementation
from megatron_fope.kernels import cache, launch, ops
from megatron_fope.kernels.cache import VersionedCache

SMALL = {"tokens": 6, "batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 24}


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.query, inputs.key, *inputs.basis, inputs.coefficients, inputs.config


# Compilation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a GPU would run, compiled by a process that does not interpret; no GPU is needed."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "kernel_compile.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_sizes_of_a_batch_compile_nothing(compiled: dict[str, Any]) -> None:
    """One forward and one backward kernel for all batches of a model."""
    assert compiled["counts"] == {"tokens": 2, "batch": 0}


def test_nothing_spills_and_everything_is_vectorised(compiled: dict[str, Any]) -> None:
    assert len(compiled["resources"]) >= 8
    for name, kernel in compiled["resources"].items():
        assert kernel["spills"] == kernel["stack"] == kernel["local"] == 0, (name, kernel)
        assert kernel["loads"] == ["LDG.E.EF.128"] and kernel["stores"][0] == "STG.E.128", (name, kernel)
        threads = 32 * kernel["warps"]
        assert kernel["registers"] * threads * 2 <= 65536, f"{name}: one program per multiprocessor"


def test_products_are_never_plain_tf32(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["resources"].items():
        if "tf32x3" in name:
            assert kernel["precision"] == ["tf32x3"] and kernel["tensor_core"] % 3 == 0, (name, kernel)
            assert kernel["tensor_core"] > 0
        else:
            assert kernel["tensor_core"] == 0, (name, kernel)
            # Tables are rotated in the formula's order of roundings, without fused operations.
            assert (kernel["fused"] == 0) == ("tables" in name), (name, kernel)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("variant", ["tables", "fused"])
def test_torch_compile(variant: str, learning: bool) -> None:
    """One graph without breaks, the same bits, and no second graph for other lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    backend = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def rotate(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.rotate_triton(*args, variant=variant)

    traced = torch.compile(rotate, fullgraph=True, backend=backend)
    for tokens in (6, 9, 17):
        inputs = Inputs(Case(**SMALL | {"tokens": tokens}, learning=learning))
        found = []
        for function in (rotate, traced):
            query, key, coefficients = inputs.leaves()
            for tensor in (query, key, *inputs.basis):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            results = function(query, key, *inputs.basis, coefficients, inputs.config)
            leaves = [query, key, *(coefficients.values() if learning else ())]
            found.append([*results, *torch.autograd.grad(results, leaves, inputs.upstream)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    assert backend.frame_count == 1


@pytest.mark.parametrize("learning", [False, True])
def test_operators_are_what_they_declare(learning: bool) -> None:
    """Schema, fake kernel, autograd registration and tracing, by torch's own checker."""
    inputs = Inputs(Case(**SMALL, learning=learning))
    query, key, coefficients = inputs.leaves()
    sin_coef, cos_coef = effective_coefficients(inputs.config, coefficients)
    rest = (*inputs.basis, sin_coef, cos_coef, 1.0, 1.0, "fused", True)
    torch.library.opcheck(torch.ops.megatron_fope.rotate.default, (query, key, *rest))
    saved = (inputs.query, inputs.key) if learning else (None, None)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in rest]
    torch.library.opcheck(torch.ops.megatron_fope.rotate_backward.default, (*inputs.upstream, *saved, *plain))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("variant", ["tables", "fused", "fused_tf32x3"])
def test_cuda_graph(variant: str) -> None:
    """Capture of forward and backward; replayed on other values it gives what eager mode gives."""
    inputs = Inputs(Case(tokens=300, variant=variant, learning=True))
    query, key, coefficients = inputs.leaves()

    def step() -> list[Tensor]:
        results = ops.rotate_triton(query, key, *inputs.basis, coefficients, inputs.config, variant=variant)
        return [
            *results,
            *torch.autograd.grad(results, [query, key, *coefficients.values()], inputs.upstream),
        ]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("variant", ["tables", "fused", "fused_tf32x3"])
def test_nothing_waits_for_the_gpu(variant: str) -> None:
    inputs = Inputs(Case(variant=variant, batch=1, learning=True))
    for mode in ("default", "error"):  # the first round compiles
        query, key, coefficients = inputs.leaves()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            results = ops.rotate_triton(
                query, key, *inputs.basis, coefficients, inputs.config, variant=variant
            )
            torch.autograd.backward(results, inputs.upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_than_the_current_device() -> None:
    inputs = Inputs(Case(tokens=20, learning=False))
    expected = ops.rotate_triton(*arguments(inputs))
    other = [x.to("cuda:1") for x in (inputs.query, inputs.key, *inputs.basis)]
    coefficients = {name: value.to("cuda:1") for name, value in inputs.coefficients.items()}
    for a, b in zip(ops.rotate_triton(*other, coefficients, inputs.config), expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


# Choice and tables --------------------------------------------------------------------------------------


def test_choice_of_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(rows: int = 8192, **settings: Any) -> str:
        config = FoPEConfig.from_profile(**{"profile": "paper", "train_length": 4096} | settings)
        return ops.choose_variant(config, rows, 8, 40, 40)

    assert choose() == "fused"  # every layer has its own coefficients
    assert choose(shared_layers=True) == "tables"
    assert choose(shared_layers=True, attention_scaling=1.1) == "fused"
    assert choose(shared_layers=True, normalize=True) == "fused"
    assert choose(rows=131072, shared_layers=True) == "fused"
    assert choose(learnable=True) == "fused"
    # The choice is what runs when nothing is asked for.
    ran = []
    monkeypatch.setattr(ops, "choose_variant", lambda *args: ran.append(args[1:]) or "tables")
    inputs = Inputs(Case(**SMALL, learning=False))
    ops.rotate_triton(*arguments(inputs))
    assert ran == [(6, *inputs.coefficients["sin_coef"].shape)]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> VersionedCache:
    fresh = VersionedCache(size=2)
    monkeypatch.setattr(launch, "TABLES", fresh)
    return fresh


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever tables are made."""
    calls: list[int] = []
    real = launch.functional.fourier_tables

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(launch.functional, "fourier_tables", count)
    return calls


def test_tables_are_made_once(kept: VersionedCache, built: list[int]) -> None:
    inputs = Inputs(Case(**SMALL, learning=False))
    query, key, coefficients = inputs.leaves()
    for _ in range(3):  # layers that share their coefficients, each with its own views of them
        views = {name: value[:1] for name, value in coefficients.items()}
        results = ops.rotate_triton(query, key, *inputs.basis, views, inputs.config, variant="tables")
        torch.autograd.backward(results, inputs.upstream)
    assert len(built) == 1
    del results, query, key
    inputs.basis = ()
    gc.collect()
    assert len(kept) == 0  # tables go with the basis they belong to


def test_tables_of_changed_tensors_are_made_again(kept: VersionedCache, built: list[int]) -> None:
    inputs = Inputs(Case(**SMALL, learning=False))
    before = ops.rotate_triton(*arguments(inputs), variant="tables")[0]
    inputs.coefficients["sin_coef"].mul_(2)
    after = ops.rotate_triton(*arguments(inputs), variant="tables")[0]
    assert len(built) == 2 and not torch.equal(before, after)
    inputs.basis[0].mul_(2)
    ops.rotate_triton(*arguments(inputs), variant="tables")
    other = Inputs(Case(**SMALL, learning=False, settings={"pad_value": "0,1"}))
    other.basis, other.coefficients = inputs.basis, inputs.coefficients
    ops.rotate_triton(*arguments(other), variant="tables")
    assert len(built) == 4
    assert len(kept) == 2


def test_tables_of_learning_coefficients_are_not_kept(kept: VersionedCache, built: list[int]) -> None:
    """Optimizers write to parameters behind autograd's back."""
    inputs = Inputs(Case(**SMALL, learning=True))
    with torch.no_grad():
        before = ops.rotate_triton(*arguments(inputs), variant="tables")[0]
        inputs.coefficients["sin_coef"].data.mul_(2)
        after = ops.rotate_triton(*arguments(inputs), variant="tables")[0]
    assert len(built) == 2 and len(kept) == 0 and not torch.equal(before, after)


def test_inference_mode(kept: VersionedCache) -> None:
    """Tensors of inference mode have no version; tables made there must serve a later training step."""
    inputs = Inputs(Case(**SMALL, learning=False))
    with torch.inference_mode():
        expected = ops.rotate_triton(*arguments(inputs), variant="tables")
        temporary = [b.clone() for b in inputs.basis]
        ops.rotate_triton(
            inputs.query, inputs.key, *temporary, inputs.coefficients, inputs.config, variant="tables"
        )
    assert len(kept) == 1
    query, key, coefficients = inputs.leaves()
    results = ops.rotate_triton(query, key, *inputs.basis, coefficients, inputs.config, variant="tables")
    torch.autograd.backward(results, inputs.upstream)
    assert torch.equal(results[0], expected[0]) and query.grad is not None


def test_a_cuda_graph_pins_the_tables_it_reads(
    kept: VersionedCache, built: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(inputs: Inputs) -> None:
        ops.rotate_triton(*arguments(inputs), variant="tables")

    first, own = (Inputs(Case(**SMALL, learning=False)) for _ in range(2))
    call(first)
    with monkeypatch.context() as capture:
        capture.setattr(cache, "is_capturing", lambda: True)
        call(first)
        call(own)  # made inside the graph: not for anybody else
    assert len(built) == 2 and len(kept) == 1
    others = [Inputs(Case(**SMALL, learning=False)) for _ in range(4)]
    for other in others:
        call(other)
    assert len(kept) == 3  # two recent ones and the graph's
    call(first)
    assert len(built) == 6


@pytest.mark.parametrize("variant", ["tables", "fused"])
@pytest.mark.parametrize("learnable", [False, True])
def test_the_comparison_before_the_first_use(variant: str, learnable: bool) -> None:
    """The real kernels pass it where a model is built: on the meta device, in 16 bit."""
    config = FoPEConfig.from_profile(train_length=64, learnable=learnable)
    shape = Geometry(config, 24).coefficient_shape
    case = implementation.Case(config, torch.bfloat16, 3, 1, 24, *shape)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.no_grad():
            found = implementation._self_check(ops.rotate_triton, torch.device(DEVICE), case, variant)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is None


# Bad input ----------------------------------------------------------------------------------------------


def _changed(**changes: Any) -> dict[str, Any]:
    inputs = Inputs(Case(**SMALL | {"heads": 4, "kv_heads": 2}, learning=False))
    named = {
        "query": inputs.query,
        "key": inputs.key,
        "sin_basis": inputs.basis[0],
        "cos_basis": inputs.basis[1],
        "coefficients": inputs.coefficients,
        "config": inputs.config,
    }
    for name, change in changes.items():
        named[name] = change(named[name]) if callable(change) else change
    return named


def _sin_coef(change: Any) -> dict[str, Any]:
    return {"coefficients": lambda c: c | {"sin_coef": change(c["sin_coef"])}}


BAD_INPUT = {
    "dtype": ({"query": lambda q: q.double()}, r"query is torch.float64 and key torch.bfloat16; allowed:"),
    "mixed dtypes": (
        {"key": lambda k: k.float()},
        r"query is torch.bfloat16 and key torch.float32; allowed:",
    ),
    "coefficients in 16 bit": (
        _sin_coef(lambda c: c.bfloat16()),
        r"sin_coef is torch.bfloat16; allowed: float32",
    ),
    "basis in 16 bit": ({"cos_basis": lambda b: b.half()}, r"cos_basis is torch.float16; allowed: float32"),
    "devices": ({"sin_basis": lambda b: b.to("meta")}, r"sin_basis is on meta and query on .*; use one"),
    "last stride": (
        {"query": lambda q: q.expand(6, 1, 4, 24)[..., ::2], "key": lambda k: k[..., ::2]},
        r"stride",
    ),
    "dimensions": ({"query": lambda q: q[:, 0]}, r"query is \(6, 4, 24\) and key \(6, 1, 2, 24\)"),
    "tokens": ({"key": lambda k: k[:3]}, r"query is \(6, 1, 4, 24\) and key \(3, 1, 2, 24\)"),
    "odd head_dim": (
        {"query": lambda q: q[..., :23], "key": lambda k: k[..., :23]},
        r"head_dim is 23; allowed",
    ),
    "heads": ({"query": lambda q: q[:, :, :3]}, r"query has 3 heads and key 2; allowed: a multiple"),
    "coefficient heads": (
        {"coefficients": lambda c: {n: v.repeat(2, 1, 1) for n, v in c.items()}},
        r"coefficients are \(4, .*allowed: .* H = 1 or the 2 heads of key",
    ),
    "sin and cos differ": (_sin_coef(lambda c: c[:, 1:]), r"coefficients are \(2, .*\) and \(2, "),
    "frequencies": (
        {"coefficients": lambda c: {n: v[:, 1:] for n, v in c.items()}},
        r"coefficients are \[H, .*allowed: D_in .* as in the basis",
    ),
    "series": (
        {"query": lambda q: q[..., :4], "key": lambda k: k[..., :4]},
        r"allowed: .* D_out 1 to 2 for head_dim 4",
    ),
    "bases differ": ({"sin_basis": lambda b: b[:3]}, r"sin_basis is \(3, .*\) and cos_basis \(6, "),
    "too few rows": (
        {"sin_basis": lambda b: b[:5], "cos_basis": lambda b: b[:5]},
        r"the basis has 5 rows; requires one per token of query, 6",
    ),
    "variant": ({"variant": "magic"}, r"variant is 'magic'; allowed: tables, fused, fused_tf32x3"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, message = BAD_INPUT[name]
    monkeypatch.setattr(launch, "_rotate", lambda *args, **kwargs: pytest.fail("reached the kernel"))
    with pytest.raises(ValueError, match=message):
        ops.rotate_triton(**_changed(**changes))


def test_a_device_that_cannot_run_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: "Triton cannot be imported")
    with pytest.raises(UserError, match="the Triton rotation cannot run: Triton cannot be imported"):
        ops.rotate_triton(**_changed())


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, megatron_fope.kernels.ops as o; sys.exit('triton_rotary' in vars(o.kernels))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
