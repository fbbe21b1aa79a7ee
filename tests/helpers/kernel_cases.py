"""Inputs for the kernel tests, the exact result for them, and how far from it a kernel may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@dataclass(frozen=True)
class Case:
    """One call of the rotation; the defaults are the base case that the axes vary around."""

    dtype: torch.dtype = torch.bfloat16
    tokens: int = 37
    batch: int = 2
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    layout: str = "split"
    """``split``: Megatron's split of the fused projection; ``views``: query and key between other heads;
    ``plain``: contiguous; ``batch_first``: transposed."""
    variant: str = "fused"
    learning: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        base = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(base, k)}
        return ", ".join(f"{k}={v}" for k, v in changed.items()).replace("torch.", "") or "base"


class Inputs:
    """Tensors of a case, the same on every machine."""

    def __init__(self, case: Case) -> None:
        self.case = case
        settings = {"profile": "paper", "train_length": 64, "learnable": case.learning} | case.settings
        self.config = FoPEConfig.from_profile(**settings)
        generator = torch.Generator().manual_seed(case.tokens)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(case.dtype).to(DEVICE)

        self.query, self.key = _layout(case, random)
        self.upstream = tuple(random(*x.shape) for x in (self.query, self.key))
        self.geometry = Geometry(self.config, case.head_dim, case.kv_heads)
        coefficients = self.geometry.make_coefficients(layer=1)
        self.coefficients = {name: value.to(DEVICE) for name, value in coefficients.items()}
        inv_freq = self.geometry.inv_freq.to(DEVICE)
        self.basis = functional.fourier_basis(torch.arange(case.tokens, device=DEVICE), inv_freq)

    def leaves(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Query, key and coefficients that want gradients (the coefficients if they learn)."""
        query, key = (x.detach().requires_grad_() for x in (self.query, self.key))
        learning = self.case.learning
        return query, key, {k: v.detach().requires_grad_(learning) for k, v in self.coefficients.items()}


def _layout(case: Case, random: Any) -> tuple[Tensor, Tensor]:
    heads, kv_heads, width = case.heads, case.kv_heads, case.head_dim
    if case.layout == "split":
        # Per group its query heads, its key and its value. The reshape copies the query if there are several
        # groups of several heads; the key remains a view.
        fused = random(case.tokens, case.batch, kv_heads, (heads // kv_heads + 2) * width)
        query, key, _ = fused.split([heads // kv_heads * width, width, width], dim=3)
        return query.reshape(case.tokens, case.batch, heads, width), key
    if case.layout == "views":
        fused = random(case.tokens, case.batch, heads + 2 * kv_heads + 1, width)
        query, _, key, _ = fused.split([heads, 1, kv_heads, kv_heads], dim=2)
        return query, key
    if case.layout == "plain":
        return tuple(random(case.tokens, case.batch, n, width) for n in (heads, kv_heads))
    return tuple(random(case.batch, case.tokens, n, width).transpose(0, 1) for n in (heads, kv_heads))


def formula(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Results and then gradients of the formula under autograd, everything in ``dtype``."""
    coefficients = {name: value.to(dtype) for name, value in inputs.coefficients.items()}
    leaves = [inputs.query.to(dtype), inputs.key.to(dtype)]
    leaves += coefficients.values() if inputs.case.learning else ()
    leaves = [x.detach().requires_grad_() for x in leaves]
    coefficients |= zip(coefficients, leaves[2:], strict=False)
    basis = (b.to(dtype) for b in inputs.basis)
    tables = inputs.geometry.tables(*basis, coefficients)
    sin, cos = (table.unsqueeze(1) for table in tables)
    results = [functional.apply_fourier_rotary(x, sin, cos) for x in leaves[:2]]
    grads = torch.autograd.grad(results, leaves, [u.to(dtype) for u in inputs.upstream])
    return [*(r.detach() for r in results), *grads]


def assert_within_noise(ours: list[Tensor], inputs: Inputs, *, factor: float = 2.0) -> None:
    """Compare results followed by gradients with the formula in float64.

    The allowed error is ``factor`` times the one that the formula itself makes in float32, rounded once to
    the result's dtype.
    """
    exact, rounded = (formula(inputs, dtype) for dtype in (torch.float64, torch.float32))
    names = ("query", "key", "grad query", "grad key", *(f"grad {n}" for n in inputs.coefficients))
    for name, result, right, reference in zip(names, ours, exact, rounded, strict=False):
        assert result.shape == right.shape and result.isfinite().all(), f"{name}: not finite"
        if not right.numel():
            continue
        noise = (reference.to(result.dtype).double() - right).abs().max()
        error = (result.double() - right).abs().max()
        smallest = torch.finfo(torch.float32).eps * right.abs().max()
        assert error <= factor * noise + smallest, f"{name}: off by {error:.3g}, noise {noise:.3g}"
