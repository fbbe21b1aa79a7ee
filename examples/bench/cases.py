"""What is measured: a case is one shape, dtype and setting, with the tensors that a layer would have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import PROFILES, FoPEConfig
from megatron_fope.formula.geometry import Geometry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("split", "contiguous")
"""``split``: query and key as Megatron's split of the fused projection leaves them, views with gaps where it
can; ``contiguous``: both dense."""


@dataclass(frozen=True)
class Case:
    """One configuration of the rotation."""

    tokens: int
    """Sequence length S of one rank; also the training length, which decides the number of frequencies."""
    heads: int = 16
    """Query heads."""
    kv_heads: int = 16
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bf16"
    """Key of :data:`DTYPES`."""
    layout: str = "split"
    """One of :data:`LAYOUTS`."""
    profile: str = "paper"
    learnable: bool = False
    """Train the coefficients: their gradient is part of the backward pass."""
    rotary_base: float = 10000.0

    @property
    def shape(self) -> dict[str, Any]:
        """What identifies the case in the CSV besides dtype and profile."""
        return {
            "s": self.tokens,
            "b": self.batch,
            "hq": self.heads,
            "hkv": self.kv_heads,
            "d": self.head_dim,
            "layout": self.layout,
            "base": self.rotary_base,
            "learnable": self.learnable,
        }

    @property
    def minimum_bytes(self) -> int:
        """Traffic of one direction at least: query and key read once and written once."""
        elements = self.tokens * self.batch * (self.heads + self.kv_heads) * self.head_dim
        return 2 * elements * DTYPES[self.dtype].itemsize

    def fope(self) -> FoPEConfig:
        """FoPE's settings.

        Raises:
            UserError: settings that FoPE refuses.
        """
        return FoPEConfig.from_profile(
            self.profile,
            train_length=self.tokens,
            rotary_base=self.rotary_base,
            learnable=self.learnable,
            shared_layers=False if self.learnable else None,
        )

    def __str__(self) -> str:
        return (
            f"S {self.tokens}, batch {self.batch}, {self.heads}/{self.kv_heads} heads x {self.head_dim}, "
            f"{self.dtype}, {self.layout}, {self.profile}, base {self.rotary_base:g}"
            + (", learnable" if self.learnable else "")
        )


@dataclass
class Inputs:
    """The tensors of a case on one device; every provider gets the same ones."""

    case: Case
    query: Tensor
    """``[S, b, query heads, head_dim]``, a leaf that requires a gradient; so is ``key``."""
    key: Tensor
    grad_query: Tensor
    """Gradient that arrives from the attention, dense."""
    grad_key: Tensor
    sin_basis: Tensor
    """``[S, D_in]`` float32, made once per step and shared by all layers; so is ``cos_basis``."""
    cos_basis: Tensor
    coefficients: dict[str, Tensor]
    """One layer's, float32."""
    fope: FoPEConfig
    angles: Tensor
    """RoPE's ``[S, 1, 1, head_dim]`` float32, as Megatron's ``RotaryEmbedding`` gives them."""

    @property
    def grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of the rotated query and key."""
        return self.grad_query, self.grad_key

    @property
    def learning(self) -> tuple[Tensor, ...]:
        """Coefficients that need a gradient."""
        return tuple(c for c in self.coefficients.values() if c.requires_grad)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random queries, keys and gradients, and the real basis and coefficients.

    Args:
        case: what to build.
        device: where.

    Raises:
        UserError: settings that FoPE refuses.
    """
    fope = case.fope()
    geometry = Geometry(fope, case.head_dim, case.kv_heads)
    positions = torch.arange(case.tokens, device=device)
    sin_basis, cos_basis = functional.fourier_basis(positions, geometry.inv_freq.to(device))
    coefficients = geometry.make_coefficients(layer=1)
    rope = functional.inverse_frequencies(case.head_dim, case.rotary_base).to(device)
    angles = torch.outer(positions.float(), rope).repeat(1, 2)[:, None, None]
    generator = torch.Generator(device).manual_seed(1)
    dtype = DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(
            case.tokens, case.batch, *shape, generator=generator, device=device, dtype=torch.float32
        ).to(dtype)

    group = case.heads // case.kv_heads * case.head_dim
    fused = random(case.kv_heads, group + 2 * case.head_dim)
    query, key, _ = fused.split([group, case.head_dim, case.head_dim], dim=-1)
    # As in Megatron: a view where the strides allow one, which they do with one query head per KV head.
    query = query.reshape(case.tokens, case.batch, case.heads, case.head_dim)
    if case.layout == "contiguous":
        query, key = query.contiguous(), key.contiguous()
    return Inputs(
        case=case,
        query=query.detach().requires_grad_(),
        key=key.detach().requires_grad_(),
        grad_query=random(case.heads, case.head_dim),
        grad_key=random(case.kv_heads, case.head_dim),
        sin_basis=sin_basis,
        cos_basis=cos_basis,
        coefficients={k: v.to(device).requires_grad_(case.learnable) for k, v in coefficients.items()},
        fope=fope,
        angles=angles,
    )


def default_cases(device: torch.device) -> list[Case]:
    """The committed configurations: a few minutes on one CPU thread or on one GPU."""
    if device.type == "cpu":
        shapes = [Case(tokens, dtype=dtype) for dtype in ("fp32", "bf16") for tokens in (1024, 4096)]
        return [*shapes, Case(4096, layout="contiguous")]
    base = 500000.0  # what models of these lengths use
    shapes = [
        Case(tokens, heads, kv_heads, rotary_base=base)
        for heads, kv_heads in ((32, 8), (64, 8), (16, 16))
        for tokens in (8192, 32768, 131072)
    ]
    variants: list[dict[str, Any]] = [
        {"layout": "contiguous"},
        {"profile": "intern-s1-pro"},
        {"learnable": True},
        {"dtype": "fp32"},
    ]
    return shapes + [Case(8192, 32, 8, rotary_base=base, **variant) for variant in variants]


def parse_cases(device: torch.device, given: dict[str, Any]) -> list[Case]:
    """Every combination of what the flags name; the committed configurations when they name nothing.

    Args:
        device: decides what is not given.
        given: flags of the command by name, None where absent.

    Raises:
        UserError: a value outside what is allowed.
    """
    if all(value is None for value in given.values()):
        return default_cases(device)
    cpu = device.type == "cpu"
    lists = {
        "tokens": numbers("--sequence", given.get("sequence") or ("1024" if cpu else "8192")),
        "heads": _heads(given.get("heads") or ("16/16" if cpu else "32/8")),
        "head_dim": numbers("--head-dim", given.get("head_dim") or "128"),
        "batch": numbers("--batch", given.get("batch") or "1"),
        "dtype": words("--dtype", given.get("dtype") or "bf16", DTYPES),
        "layout": words("--layout", given.get("layout") or "split", LAYOUTS),
        "profile": words("--profile", given.get("profile") or "paper", PROFILES),
        "rotary_base": [_base(given.get("rotary_base"))],
        "learnable": [bool(given.get("learnable"))],
    }
    cases = []
    for values in itertools.product(*lists.values()):
        settings = dict(zip(lists, values, strict=True))
        heads, kv_heads = settings.pop("heads")
        case = Case(heads=heads, kv_heads=kv_heads, **settings)
        try:
            Geometry(case.fope(), case.head_dim)
        except UserError as error:
            raise UserError(f"--sequence {case.tokens} with --head-dim {case.head_dim}: {error}") from None
        cases.append(case)
    return cases


def numbers(flag: str, text: str) -> list[int]:
    """``"1024,4096"`` as whole numbers.

    Raises:
        UserError: something else, or a number below 1.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]+", part) and int(part) for part in parts):
        raise UserError(f"{flag} is {text!r}; allowed: whole numbers >= 1, separated by commas")
    return [int(part) for part in parts]


def words(flag: str, text: str, allowed: Sequence[str] | dict[str, Any]) -> list[str]:
    """``"fp32,bf16"`` as a list.

    Raises:
        UserError: a word that is not allowed.
    """
    parts = text.split(",")
    for part in parts:
        if part not in allowed:
            raise UserError(f"{flag} is {part!r}; allowed: {', '.join(allowed)}, separated by commas")
    return parts


def _heads(text: str) -> list[tuple[int, int]]:
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
        heads, kv_heads = map(int, match.groups()) if match else (0, 0)
        if not kv_heads or heads < kv_heads or heads % kv_heads:
            raise UserError(
                f"--heads is {part!r}; allowed: query heads / KV heads, the first a multiple of the second, "
                "e.g. 32/8; several separated by commas"
            )
        pairs.append((heads, kv_heads))
    return pairs


def _base(text: str | None) -> float:
    try:
        base = 10000.0 if text is None else float(text)
    except ValueError:
        base = 0.0
    if not 1 < base < float("inf"):
        raise UserError(f"--rotary-base is {text!r}; allowed: a number greater than 1")
    return base
