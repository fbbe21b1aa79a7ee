"""The rotation that layers use, against the formula it must equal."""

from __future__ import annotations

import pytest
import torch

from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.kernels import torch_rotary

CASES = {
    "paper": {},
    "query groups": {"kv_heads": 2},
    "one KV head": {"kv_heads": 1},
    "shared by heads": {"separate_heads": False},
    "shared basis": {"separate_basis": False},
    "no padding": {"clip": False, "drop_clipped": False},
    "identity padding": {"pad_value": "0,1"},
    "normalized": {"normalize": True},
    "temperature": {"attention_scaling": 1.3},
    "intern-s1-pro": {"profile": "intern-s1-pro", "kv_heads": 2},
}


def case(name: str, dtype: torch.dtype = torch.float32, tokens: int = 37, batch: int = 3):
    settings = dict(CASES[name])
    kv_heads = settings.pop("kv_heads", 6)
    config = FoPEConfig.from_profile(**{"train_length": 64, "profile": "paper"} | settings)
    generator = torch.Generator().manual_seed(1)
    # Strided views, as Megatron's split of the fused projection gives them.
    fused = torch.randn(tokens, batch, 6 + 2 * kv_heads, 24, generator=generator).to(dtype)
    query, key, _ = fused.split([6, kv_heads, kv_heads], dim=2)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    geometry = Geometry(config, 24, kv_heads)
    coefficients = {k: v.to(table_dtype) for k, v in geometry.make_coefficients(layer=1).items()}
    basis = functional.fourier_basis(torch.arange(tokens), geometry.inv_freq.to(table_dtype))
    return config, query, key, basis, coefficients


def reference(config, query, key, basis, coefficients):
    sin, cos = Geometry(config, query.size(-1)).tables(*basis, coefficients)
    return tuple(functional.apply_fourier_rotary(x, sin[:, None], cos[:, None]) for x in (query, key))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("learning", [False, True])
def test_values_and_gradients(name: str, learning: bool) -> None:
    config, query, key, basis, coefficients = case(name, torch.float64)
    inputs = [query.requires_grad_(), key.requires_grad_()]
    if learning:
        inputs += [c.requires_grad_() for c in coefficients.values()]
    ours = torch_rotary.rotate(query, key, *basis, coefficients, config)
    expected = reference(config, query, key, basis, coefficients)
    upstream = [torch.randn_like(x) for x in expected]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        assert a.is_contiguous()
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding(dtype: torch.dtype) -> None:
    """At most one unit in the last place from the rounded float32 result, and almost never that."""
    config, query, key, basis, coefficients = case("query groups", dtype)
    ours = torch_rotary.rotate(query, key, *basis, coefficients, config)
    exact = reference(config, query.double(), key.double(), basis, coefficients)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        spacing = torch.finfo(dtype).eps * b.abs().clamp(min=1.0)
        assert ((a.double() - b).abs() <= 0.51 * spacing + 2e-6).all()


def test_gradients_by_differences() -> None:
    config, query, key, basis, coefficients = case("query groups", torch.float64, tokens=5, batch=1)
    leaves = [query.detach().requires_grad_(), key.detach().requires_grad_()]
    leaves += [c.requires_grad_() for c in coefficients.values()]

    def run(q, k, *values):
        return torch_rotary.rotate(q, k, *basis, dict(zip(coefficients, values, strict=True)), config)

    assert torch.autograd.gradcheck(run, leaves)


def test_frozen_coefficients_keep_neither_inputs_nor_tables() -> None:
    """What autograd keeps does not grow with batch or heads."""
    config, query, key, basis, coefficients = case("query groups")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        torch_rotary.rotate(query.requires_grad_(), key, *basis, coefficients, config)
    assert sum(kept) == sum(t.numel() for t in (*basis, *coefficients.values()))


def test_inputs_are_not_modified_and_every_element_is_written() -> None:
    config, query, key, basis, coefficients = case("query groups", tokens=301)
    before = query.clone(), key.clone()
    poisoned = torch.full(query.shape, float("nan"))
    del poisoned  # its memory is likely to be handed out next
    for out in torch_rotary.rotate(query, key, *basis, coefficients, config):
        assert out.isfinite().all()
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    config, query, key, basis, coefficients = case("paper")
    whole = torch_rotary.rotate(query, key, *basis, coefficients, config)
    monkeypatch.setattr(torch_rotary, "_CPU_BLOCK", 5 * 3 * 6 * 24)  # 37 tokens: seven blocks and a rest
    for a, b in zip(whole, torch_rotary.rotate(query, key, *basis, coefficients, config), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_input_without_gradient() -> None:
    config, query, key, basis, coefficients = case("paper")
    ours = torch_rotary.rotate(query, key.requires_grad_(), *basis, coefficients, config)
    (ours[0].sum() + ours[1].sum()).backward()
    assert key.grad is not None and query.grad is None


def test_no_tokens() -> None:
    config, query, key, basis, coefficients = case("paper", tokens=0)
    assert torch_rotary.rotate(query, key, *basis, coefficients, config)[0].shape == (0, 3, 6, 24)


BAD_INPUT = {
    "dtypes differ": ({"key": lambda k: k.half()}, "query is torch.float32 and key torch.float16"),
    "integers": ({"query": lambda q: q.int(), "key": lambda k: k.int()}, "query is torch.int32"),
    "device mix": ({"key": lambda k: k.to("meta")}, "key is on meta and query on cpu; use one device"),
    "16-bit coefficients": (
        {"coefficients": lambda c: {name: value.bfloat16() for name, value in c.items()}},
        "sin_coef is torch.bfloat16; allowed: float32, float64",
    ),
    "heads that do not divide": (
        {"query": lambda q: q[:, :, :5]},
        "query has 5 heads and key 6; allowed: a multiple",
    ),
    "head counts of the tables": (
        {"coefficients": lambda c: {name: value[:4] for name, value in c.items()}},
        r"allowed: \[H, D_in, D_out\] with H = 1 or the 6 heads of key",
    ),
    "width of the basis": (
        {"basis": lambda basis: tuple(b[:, 1:] for b in basis)},
        r"allowed: D_in \d+ as in the basis",
    ),
    "bases differ": ({"basis": lambda basis: (basis[0][:3], basis[1])}, r"sin_basis is \(3, "),
    "positions beyond the table": (
        {"basis": lambda basis: tuple(b[:-1] for b in basis)},
        "the basis has 36 rows; requires one per token of query, 37",
    ),
    "three dimensions": (
        {"query": lambda q: q[0], "key": lambda k: k[0]},
        r"allowed: \[s, b, heads, head_dim\]",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    changes, message = BAD_INPUT[name]
    config, query, key, basis, coefficients = case("paper")
    named = {"query": query, "key": key, "basis": basis, "coefficients": coefficients}
    named |= {argument: change(named[argument]) for argument, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        torch_rotary.rotate(named["query"], named["key"], *named["basis"], named["coefficients"], config)
