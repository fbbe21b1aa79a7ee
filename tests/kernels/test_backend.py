"""Which code rotates: the choice, its reason, and the comparison before Triton is trusted."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_fope import kernels
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.kernels import backend, torch_rotary
from megatron_fope.kernels.backend import Case
from megatron_fope.layers.embedding import FourierEmbedding

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_compared", {})


def test_a_cpu_rotates_with_pytorch() -> None:
    chosen = backend.choose("auto", CPU)
    assert (chosen.name, chosen.rotate) == ("torch", torch_rotary.rotate)
    assert str(chosen) == "PyTorch, float32 arithmetic (on the CPU)"


def test_asking_for_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for check in (backend.choose, backend.check_available):
        with pytest.raises(UserError, match=r"--fope-backend is 'triton', but .*; allowed: auto, torch"):
            check("triton", CPU)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="--fope-backend is 'cuda'; allowed: auto, torch, triton"):
        FoPEConfig.from_profile("paper", train_length=64, backend="cuda")


def test_the_name_does_not_change_a_model() -> None:
    a, b = (FoPEConfig.from_profile("paper", train_length=64, backend=i) for i in ("auto", "torch"))
    assert not a.differences(b)


def right(*args, variant=None):
    return torch_rotary.rotate(*args)


def slightly_wrong(*args, variant=None):
    query, key = torch_rotary.rotate(*args)
    return query, key + 0.02 * key.detach()


def wrong_backward(query, key, *args, variant=None):
    return torch_rotary.rotate(query, key.detach() + 0 * key, *args)


def wrong_coefficient_gradients(query, key, sin, cos, coefficients, config, variant=None):
    coefficients = {
        name: value.detach() + 1.02 * (value - value.detach()) for name, value in coefficients.items()
    }
    return torch_rotary.rotate(query, key, sin, cos, coefficients, config)


def failing(*args, variant=None):
    raise RuntimeError("no such instruction\nmore")


def case(dtype=torch.float32, heads=4, groups=2, head_dim=64, **settings) -> Case:
    config = FoPEConfig.from_profile(train_length=512, **settings)
    return Case(config, dtype, heads, groups, head_dim, *Geometry(config, head_dim, groups).coefficient_shape)


CASES = {
    "float32": case(),
    "bfloat16": case(torch.bfloat16),
    "float16": case(torch.float16, head_dim=128),
    "one KV head, no power of two": case(torch.bfloat16, heads=7, groups=1, head_dim=24),
    "multi-head attention": case(heads=3, groups=3),
    "heads share": case(separate_heads=False),
    "one basis": case(separate_basis=False),
    "normalized": case(normalize=True),
    "learnable": case(learnable=True),
    "learnable, bfloat16": case(torch.bfloat16, learnable=True),
    "intern-s1-pro": case(profile="intern-s1-pro"),
}


@pytest.mark.parametrize("name", CASES)
def test_comparison(name: str) -> None:
    wrong = [slightly_wrong, wrong_backward]
    if CASES[name].config.learnable:
        wrong.append(wrong_coefficient_gradients)
    assert backend._self_check(right, CPU, CASES[name], "fused") is None
    for rotate in wrong:
        found = backend._self_check(rotate, CPU, CASES[name], "fused")
        assert found.startswith("their results differ from PyTorch's by"), rotate
    found = backend._self_check(failing, CPU, CASES[name], "fused")
    assert found == "a first try failed with RuntimeError: no such instruction"


def test_not_a_number_is_a_difference() -> None:
    def nan(*args, variant=None):
        return tuple(x * float("nan") for x in torch_rotary.rotate(*args))

    assert "differ from PyTorch's by inf" in backend._self_check(nan, CPU, case(), "fused")


AMBIENTS = {
    "meta device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "default bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


@contextlib.contextmanager
def setting(setter, value, normal):
    setter(value)
    try:
        yield
    finally:
        setter(normal)


@pytest.mark.parametrize("ambient", AMBIENTS)
def test_the_comparison_does_not_depend_on_where_it_runs(ambient: str) -> None:
    """A model is built under Megatron's meta device, for example; the numbers are the same everywhere."""
    seen = []

    def record(*args, variant=None):
        seen.append([x.detach().clone() for x in torch_rotary.rotate(*args)])
        return torch_rotary.rotate(*args)

    for context in (contextlib.nullcontext, AMBIENTS[ambient]):
        for name in ("float32", "bfloat16", "learnable"):
            with context():
                assert backend._self_check(record, CPU, CASES[name], "fused") is None
                assert backend._self_check(slightly_wrong, CPU, CASES[name], "fused")
    for a, b in zip(seen[:3], seen[3:], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU, with the comparison moved to the CPU: sets what stands for the kernels, returns the compared."""
    check, compared = backend._self_check, []

    def moved(rotate, device, case, variant):
        compared.append((case, variant))
        return check(rotate, CPU, case, variant)

    monkeypatch.setattr(kernels, "available", lambda device: None)
    monkeypatch.setattr(backend, "_self_check", moved)
    return lambda rotate: monkeypatch.setattr(backend, "_triton", lambda: rotate) or compared


@pytest.mark.parametrize("rotate", [right, slightly_wrong])
def test_a_gpu_takes_triton_only_when_it_agrees(rotate, gpu, caplog: pytest.LogCaptureFixture) -> None:
    compared = gpu(rotate)
    with caplog.at_level(logging.WARNING):
        chosen = backend.choose("auto", GPU)
        assert backend.choose("auto", GPU) is chosen and len(compared) == 1
    assert chosen.name == ("triton" if rotate is right else "torch")
    assert chosen.rotate is (right if rotate is right else torch_rotary.rotate)
    assert ("instead of its Triton kernels: their results differ" in caplog.text) is (rotate is not right)


def test_every_model_is_compared_as_it_is(gpu) -> None:
    """What a layer asks for is what it has: dtype, heads, geometry, and the kernel that its length takes."""
    compared = gpu(right)
    config = SimpleNamespace(kv_channels=32, num_query_groups=2)

    def layer(**settings):
        return FourierEmbedding(config, FoPEConfig.from_profile(train_length=64, **settings), layer=1)

    frozen, shared = layer(), layer(profile="intern-s1-pro")
    for dtype in (torch.bfloat16, torch.float32):
        frozen.backend(GPU, dtype, 6, 2, rows=64)
        frozen.backend(GPU, dtype, 6, 2, rows=128)
    shared.backend(GPU, torch.bfloat16, 6, 2, rows=64)
    shared.backend(GPU, torch.bfloat16, 6, 2, rows=1 << 24)
    annealed = layer(anneal_iters=2, separate_heads=False)
    annealed.backend(GPU, torch.bfloat16, 6, 2, rows=64)
    assert [(c.dtype, v) for c, v in compared[:2]] == [(torch.bfloat16, "fused"), (torch.float32, "fused")]
    assert [v for _, v in compared[2:4]] == ["tables", "fused"] and len(compared) == 5
    for module, (found, _) in zip(
        (frozen, shared, annealed), (compared[0], compared[2], compared[4]), strict=True
    ):
        between = module.interpolation
        coefficients = (
            module.coefficients() if between is None else between.coefficients(module.coefficients())
        )
        used = next(iter(coefficients.values()))
        used = used[None] if used.dim() == 2 else used
        assert (found.coefficient_heads, found.d_in, found.d_out) == tuple(used.shape)
        assert (found.heads, found.groups, found.head_dim) == (6, 2, 32)
        assert found.config == (module.fope if between is None else between.settings)


def test_nothing_is_compared_inside_a_cuda_graph(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = gpu(right)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured before the first step" in str(backend.choose("auto", GPU))
    monkeypatch.undo()
    assert not compared and not backend._compared
