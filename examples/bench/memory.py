"""``bench memory``: the bytes that positions cost on one rank, measured on the layer that models use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench import results
from bench.allocation import allocation, saved_for_backward, storages
from bench.published import rotate_as_published
from bench.table import markdown
from megatron_fope.formula import functional
from megatron_fope.formula.config import PROFILES, FoPEConfig
from megatron_fope.formula.geometry import Geometry

MARKDOWN = "memory.md"
LENGTHS = (8192, 131072, 1048576)
CP_SIZES = (1, 8)
HEAD_DIM, KV_HEADS, BASE = 128, 8, 500000.0
LAYER_TOKENS = 8192
"""Tokens of the measurement of one layer."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shared:
    """What a rank holds once, however many layers and heads it has."""

    profile: str
    length: int
    cp_size: int
    d_in: int
    measured: int
    """Bytes that stay after the first layer's forward pass."""
    second_layer: int
    """Bytes that another layer adds: left behind, or kept for its backward pass besides its coefficients."""

    @property
    def formula(self) -> int:
        """Sine and cosine of every position of the rank and every frequency, float32."""
        return 2 * self.length // self.cp_size * self.d_in * 4


def measure_shared(profile: str, length: int, cp_size: int, device: torch.device) -> Shared:
    """Run two layers on the first context-parallel rank's share of a sequence.

    With one query and one KV head: what is measured here must not depend on their number, and a million
    tokens then fit.

    Args:
        profile: FoPE's profile.
        length: tokens of the whole sequence, also the training length.
        cp_size: context-parallel ranks that share it.
        device: where.
    """
    fope = FoPEConfig.from_profile(profile, train_length=length, rotary_base=BASE)
    first, second = (_layer(fope, 1, number, device) for number in (1, 2))
    group = SimpleNamespace(rank=lambda: 0, size=lambda: cp_size)
    # One row, seen many times: the inputs take no memory.
    row = torch.zeros(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16, device=device, requires_grad=True)
    x = row.expand(length // cp_size, -1, -1, -1)

    def run(layer: Any) -> Pair:
        return layer(x, x, cp_group=group)

    _forget_tables()
    shared = allocation(lambda: run(first), device).left
    more = allocation(lambda: run(second), device).left
    _alive, saved = saved_for_backward(lambda: run(first))
    _also_alive, saved_again = saved_for_backward(lambda: run(second))
    known = saved | storages(second.coefficients().values())
    more += sum(size for address, size in saved_again.items() if address not in known)
    return Shared(profile, length, cp_size, Geometry(fope, HEAD_DIM).d_in, shared, more)


@dataclass(frozen=True)
class Layer:
    """What one call of one layer costs, besides the shared tables; all in bytes."""

    name: str
    coefficients: int
    kept: int
    """Kept for the backward pass; inputs count where they are kept."""
    forward: int
    """Held at once at most during the forward pass, its result included."""
    backward: int
    """Likewise during the backward pass."""


def measure_layers(device: torch.device, tokens: int = LAYER_TOKENS) -> list[Layer]:
    """The layer in its variants, then the published algorithm, on bfloat16 queries and keys of one shape."""
    variants: dict[str, dict[str, Any]] = {
        "paper": {"profile": "paper"},
        "intern-s1-pro": {"profile": "intern-s1-pro"},
        "paper, learnable": {"profile": "paper", "learnable": True},
    }
    measured = []
    for name, settings in variants.items():
        fope = FoPEConfig.from_profile(train_length=tokens, rotary_base=BASE, **settings)
        layer, other = (_layer(fope, KV_HEADS, number, device) for number in (1, 2))
        # What another layer on other inputs keeps as well is shared.
        _alive, shared = saved_for_backward(lambda layer=other: layer(*_query_and_key(tokens, device)))
        known = shared | storages(layer.coefficients().values())
        measured.append(_measure_layer(name, layer, layer.coefficients(), known, tokens, device))
    fope = FoPEConfig.from_profile("paper", train_length=tokens, rotary_base=BASE)
    positions = torch.arange(tokens, device=device)
    geometry = Geometry(fope, HEAD_DIM, KV_HEADS)
    basis = functional.fourier_basis(positions, geometry.inv_freq.to(device))
    coefficients = {k: v.to(device) for k, v in geometry.make_coefficients(layer=1).items()}
    known = storages([*basis, *coefficients.values()])
    measured.append(
        _measure_layer(
            "published algorithm",
            lambda query, key: rotate_as_published(query, key, *basis, coefficients, fope),
            coefficients,
            known,
            tokens,
            device,
        )
    )
    return measured


def _measure_layer(
    name: str,
    rotate: Callable[[Tensor, Tensor], Pair],
    coefficients: dict[str, Tensor],
    known: dict[int, int],
    tokens: int,
    device: torch.device,
) -> Layer:
    query, key = _query_and_key(tokens, device)
    grads = torch.ones_like(query), torch.ones_like(key)
    leaves = [query, key, *(c for c in coefficients.values() if c.requires_grad)]
    forward = allocation(lambda: rotate(query, key), device).peak
    result, saved = saved_for_backward(lambda: rotate(query, key))
    # The graph stays, so that what it holds is not counted as released.
    backward = allocation(lambda: torch.autograd.grad(result, leaves, grads, retain_graph=True), device).peak
    return Layer(
        name,
        coefficients=sum(storages(coefficients.values()).values()),
        kept=sum(size for address, size in saved.items() if address not in known),
        forward=forward,
        backward=backward,
    )


def run(device: torch.device, out: Path, *, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Measure everything, print the tables and write them.

    Args:
        device: where to measure.
        out: folder of ``memory.md``.
        lengths: sequence lengths S in tokens.
    """
    with_cp = [(length, size) for length in lengths for size in CP_SIZES if length % (2 * size) == 0]
    shared = [measure_shared(profile, *pair, device) for profile in PROFILES for pair in with_cp]
    text = document(shared, measure_layers(device, min(LAYER_TOKENS, max(lengths))), device)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKDOWN).write_text(text)
    print(text)


def document(shared: list[Shared], layers: list[Layer], device: torch.device) -> str:
    """The tables as Markdown."""
    facts = results.facts(device)
    tokens = min(LAYER_TOKENS, max(row.length for row in shared))
    both = 2 * tokens * KV_HEADS * HEAD_DIM * 2
    published = layers[-1].kept / tokens
    rows = [
        [
            row.profile,
            f"{row.length:,}",
            str(row.cp_size),
            f"{row.length // row.cp_size:,}",
            str(row.d_in),
            _mb(row.measured),
            f"{row.measured / row.formula:.3f}",
            f"{row.second_layer:,} B",
            _mb(published * row.length / row.cp_size),
        ]
        for row in shared
    ]
    header = ["profile", "S", "CP", "tokens of a rank", "D_in", "shared tables, MB", "/ formula"]
    header += ["each further layer", "published, each layer, MB"]
    calls = [
        [
            layer.name,
            _mb(layer.coefficients, 3),
            _mb(layer.kept),
            f"{layer.forward / both:.2f}",
            f"{layer.backward / both:.2f}",
        ]
        for layer in layers
    ]
    call_header = ["", "coefficients, MB", "kept for backward, MB", "peak forward", "peak backward"]
    by_line = f"{facts['date']}, commit {facts['commit']}, torch {facts['torch']}, {facts['machine']}"
    kept = ""
    if any(row.measured > 1.05 * row.formula for row in shared):
        kept = (
            "\nMore than that are tables that the Triton kernels keep for coefficients shared by all layers."
        )
    return f"""\
# Memory of position embeddings

`python examples/bench memory`, {by_line}.
Head dimension {HEAD_DIM}, rotary base {BASE:g}; 1 MB is 2^20 bytes.

## What a rank holds once, for all layers and heads

Measured: the memory that stays allocated after a layer's forward pass on the rank's tokens, and what a second
layer adds to it (left behind, or kept for its backward pass besides its coefficients). The formula is
2 x tokens x D_in x 4 bytes. The last column is calculated: what the published algorithm keeps in every layer,
measured at {tokens:,} tokens with {KV_HEADS} heads (below), times the tokens of the rank.{kept}

{markdown(header, rows)}

## What a call of one layer costs besides, {tokens:,} tokens

Measured with {KV_HEADS} query and {KV_HEADS} KV heads, bf16. Peaks are memory held at once during the call,
its result included, in units of query plus key ({_mb(both)} MB): 1 is the result alone. Learnable
coefficients keep query and key.

{markdown(call_header, calls)}
"""


def _layer(fope: FoPEConfig, kv_heads: int, number: int, device: torch.device) -> Any:
    from megatron_fope.layers.embedding import FourierEmbedding

    model = SimpleNamespace(kv_channels=HEAD_DIM, num_query_groups=kv_heads)
    return FourierEmbedding(model, fope, layer=number).to(device)


def _forget_tables() -> None:
    """Empty the cache of shared tables, so that the next call fills it."""
    from megatron_fope.layers import embedding

    embedding.BASES.clear()


def _query_and_key(tokens: int, device: torch.device) -> Pair:
    shape = (tokens, 1, KV_HEADS, HEAD_DIM)
    return tuple(torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(2))


def _mb(size: float, digits: int = 1) -> str:
    return f"{size / 2**20:,.{digits}f}"
