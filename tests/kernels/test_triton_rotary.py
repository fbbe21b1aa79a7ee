"""The Triton rotation against the formula: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import DEVICE, GPU, Case, Inputs, assert_within_noise, formula
from kernel_fixtures import interpreter, poisoned_outputs  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fope import kernels
from megatron_fope.formula import functional


def run(inputs: Inputs) -> list[Tensor]:
    """Results, then gradients for the case's random upstream gradients."""
    from megatron_fope.kernels.ops import rotate_triton

    query, key, coefficients = inputs.leaves()
    results = rotate_triton(
        query, key, *inputs.basis, coefficients, inputs.config, variant=inputs.case.variant
    )
    leaves = [query, key, *(coefficients.values() if inputs.case.learning else ())]
    grads = torch.autograd.grad(results, leaves, inputs.upstream)
    return [*(r.detach() for r in results), *grads]


def square(pairs: int, **others: object) -> dict[str, object]:
    """Settings with so many frequencies and series."""
    return {"num_inv_freq": pairs, "square": True} | others


MORE_TOKENS = (1000, 2048, 8192) if GPU else ()

AXES: dict[str, list[Case]] = {
    "dtype": [Case(dtype=d) for d in (torch.float32, torch.float16, torch.bfloat16)],
    "variant": [
        Case(variant=v, learning=learning, dtype=d)
        for v in ("tables", "fused", "fused_tf32x3")
        for learning in (False, True)
        for d in (torch.float32, torch.bfloat16)
    ],
    "tokens": [Case(tokens=n, heads=2, kv_heads=1, batch=1) for n in (0, 1, 7, 64, 217, *MORE_TOKENS)],
    "batch": [Case(batch=b, tokens=9, learning=learning) for b in (0, 1, 3) for learning in (False, True)],
    "heads": [
        Case(heads=h, kv_heads=g, tokens=17, batch=1, variant=v)
        for h, g, v in (
            (1, 1, "fused"),
            (4, 4, "tables"),
            (5, 1, "tables"),
            (7, 7, "fused"),
            (12, 4, "fused"),
            (40, 8, "fused"),
            (48, 8, "tables"),
        )
    ],
    "head_dim": [
        Case(head_dim=d, tokens=17, heads=2, kv_heads=1, variant=v)
        for d in (4, 24, 80, 96, 128, 256)
        for v in ("tables", "fused")
    ],
    "series": [
        Case(head_dim=128, settings=square(r), tokens=33, heads=2, kv_heads=1, variant=v)
        for r in (1, 31, 40, 50, 64)
        for v in ("tables", "fused")
    ],
    "wide basis": [Case(head_dim=32, settings={"basis_dim": 200, "train_length": 4096}, tokens=17)],
    "layout": [
        Case(layout=x, learning=learning)
        for x in ("plain", "views", "batch_first")
        for learning in (False, True)
    ],
    "settings": [
        Case(tokens=17, batch=1, settings=s, variant=v)
        for s in (
            {"separate_heads": False},
            {"separate_basis": False},
            {"pad_value": "0,1"},
            {"normalize": True},
            {"attention_scaling": 1.3},
            {"clip": False, "drop_clipped": False},
            {"exact_angles": True},
        )
        for v in ("tables", "fused")
    ],
}


def mixed_cases() -> list[Case]:
    """Twenty random combinations, always the same."""
    draw = random.Random(7)
    cases = []
    for _ in range(20):
        heads, kv_heads = draw.choice([(1, 1), (3, 3), (6, 2), (5, 1), (7, 7)])
        settings = draw.choice(
            [{}, {"pad_value": "0,1"}, {"separate_heads": False}, {"separate_basis": False}, square(9)]
        )
        cases.append(
            Case(
                dtype=draw.choice([torch.float32, torch.bfloat16, torch.float16]),
                tokens=2 * draw.randint(1, 35),
                batch=draw.choice([1, 2]),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=draw.choice([24, 64, 80, 128]),
                layout=draw.choice(["split", "views", "plain", "batch_first"]),
                variant=draw.choice(["tables", "fused"]),
                learning=draw.choice([True, False]),
                settings=settings,
            )
        )
    return cases


CASES = [(name, case) for name, cases in AXES.items() for case in cases] + [
    ("mixed", case) for case in mixed_cases()
]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[f"{n}: {c}" for n, c in CASES])
def test_values_and_gradients(case: Case) -> None:
    inputs = Inputs(case)
    before = inputs.query.clone(), inputs.key.clone()
    ours = run(inputs)
    # Two TF32 numbers keep 22 of a factor's 24 bits; plain TF32 would be a thousand times the noise.
    assert_within_noise(ours, inputs, factor=8.0 if case.variant == "fused_tf32x3" else 2.0)
    assert all(a.dtype == case.dtype and a.is_contiguous() for a in ours[:2])
    assert torch.equal(inputs.query, before[0]) and torch.equal(inputs.key, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_give_the_formula_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = Inputs(Case(dtype=dtype, variant="tables", head_dim=96, learning=False))
    tables = [t.unsqueeze(1) for t in inputs.geometry.tables(*inputs.basis, inputs.coefficients)]
    for ours, x in zip(run(inputs)[:2], (inputs.query, inputs.key), strict=True):
        assert torch.equal(ours, functional.apply_fourier_rotary(x, *tables))


@pytest.mark.parametrize("variant", ["tables", "fused"])
def test_identity_coefficients_are_rope(variant: str) -> None:
    """Bit for bit with tables, whose arithmetic has the formula's order; fused operations round less."""
    settings = {"clip": False, "drop_clipped": False, "init": "eye"}
    inputs = Inputs(Case(dtype=torch.float32, variant=variant, settings=settings, learning=False))
    sin, cos = (b[:, None, None] for b in inputs.basis)
    for ours, x in zip(run(inputs)[:2], (inputs.query, inputs.key), strict=True):
        first, second = x.chunk(2, dim=-1)
        rope = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        if variant == "tables":
            assert torch.equal(ours, rope)
        torch.testing.assert_close(ours, rope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["tables", "fused", "fused_tf32x3"])
@pytest.mark.parametrize("learning", [False, True])
def test_two_runs_are_identical(variant: str, learning: bool) -> None:
    inputs = Inputs(Case(variant=variant, learning=learning, tokens=4000 if GPU else 40))
    for a, b in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(a, b)


def test_half_of_the_batch_per_program_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tokens: a program loops over the batch. Few: one program per sequence."""
    from megatron_fope.kernels import launch

    inputs = Inputs(Case(batch=3, tokens=9, learning=False))
    separate = run(inputs)
    monkeypatch.setattr(launch, "_ENOUGH_PROGRAMS", 1)
    for a, b in zip(separate, run(inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations(learning: bool, reentrant: bool) -> None:
    from megatron_fope.kernels.ops import rotate_triton

    inputs = Inputs(Case(learning=learning, tokens=5, batch=1))
    query, key, coefficients = inputs.leaves()

    def rotate(q: Tensor, k: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(coefficients, values, strict=True))
        return rotate_triton(q, k, *inputs.basis, named, inputs.config, variant="fused")

    results = checkpoint(rotate, query, key, *coefficients.values(), use_reentrant=reentrant)
    torch.autograd.backward(results, inputs.upstream)
    leaves = [query, key, *(coefficients.values() if learning else ())]
    for a, b in zip([*results, *(x.grad for x in leaves)], run(inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["tables", "fused"])
def test_autocast_changes_nothing(variant: str) -> None:
    inputs = Inputs(Case(variant=variant, dtype=torch.float32, tokens=17))
    plain = run(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = run(inputs)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_only_some_gradients() -> None:
    from megatron_fope.kernels.ops import rotate_triton

    inputs = Inputs(Case(learning=False))
    exact = formula(inputs, torch.float64)
    query, key, coefficients = inputs.leaves()
    results = rotate_triton(query.detach(), key, *inputs.basis, coefficients, inputs.config)
    torch.autograd.backward(results, inputs.upstream)
    torch.testing.assert_close(key.grad.double(), exact[3], rtol=1e-2, atol=2e-2)
    # An output that nothing uses, and one whose gradient is an expanded scalar.
    query, key, coefficients = inputs.leaves()
    rotate_triton(query, key, *inputs.basis, coefficients, inputs.config)[0].sum().backward()
    inputs.upstream = torch.ones_like(inputs.query), torch.zeros_like(inputs.key)
    torch.testing.assert_close(query.grad.double(), formula(inputs, torch.float64)[2], rtol=1e-2, atol=2e-2)
    assert not key.grad.any()


def test_what_autograd_keeps() -> None:
    """Query and key only if the coefficients learn; never tables."""
    from megatron_fope.kernels.ops import rotate_triton

    for learning in (False, True):
        inputs = Inputs(Case(learning=learning, variant="tables"))
        query, key, coefficients = inputs.leaves()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: k.append(t.numel()) or t, lambda t: t
        ):
            rotate_triton(query, key, *inputs.basis, coefficients, inputs.config, variant="tables")
        expected = [*inputs.basis, *coefficients.values(), *((query, key) if learning else ())]
        assert sum(kept) == sum(t.numel() for t in expected)


def test_kernels_are_not_for_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in kernels.available("cpu")
    assert "'meta'" in kernels.available("meta")
