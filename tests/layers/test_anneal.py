"""The tables between RoPE's and FoPE's, without a training run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry, rotary_frequencies
from megatron_fope.kernels import torch_rotary
from megatron_fope.layers import anneal

HEAD_DIM, HEADS = 32, 2
VARIANTS = {
    "paper": {},
    "intern-s1-pro": {"profile": "intern-s1-pro"},
    "one matrix for all heads": {"separate_heads": False, "separate_basis": False},
    "normalized": {"normalize": True, "init": "eye"},
    "yarn with its temperature": {
        "scaling": "yarn",
        "scaling_factor": 4.0,
        "original_length": 16,
        "attention_scaling": 1.14,
    },
    "zeros kept": {"drop_clipped": False},
}


@pytest.fixture(autouse=True)
def _progress() -> Iterator[None]:
    yield
    anneal.begin(0, 0)


SCHEDULES = {
    "plain": {},
    "one after another": {
        "anneal_order": "slowest-first",
        "anneal_clip": "0:6",
        "anneal_padding": "5:9",
        "anneal_series": "2:10",
    },
}


@pytest.mark.parametrize("completed", [0, 3, 7, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_lie_between(variant: str, schedule: str, completed: int) -> None:
    common = {"train_length": 64, "anneal_iters": 10}
    config = FoPEConfig.from_profile(**common | VARIANTS[variant] | SCHEDULES[schedule])
    geometry = Geometry(config, HEAD_DIM, HEADS)
    coefficients = geometry.make_coefficients(layer=1)
    positions = torch.arange(50)
    between = anneal.Interpolation(Geometry(config, HEAD_DIM))
    anneal.begin(0, completed)
    between.update()
    assert between.active == (completed < 10)

    # RoPE with the same scaling, which is what such a start must begin with.
    angles = positions[:, None, None] * rotary_frequencies(config, HEAD_DIM)
    fope = geometry.tables(*functional.fourier_basis(positions, geometry.inv_freq), coefficients)
    factor, half = config.attention_scaling, HEAD_DIM // 2
    kept = 5  # frequencies, each with a series
    padded = kept if config.drop_clipped else half
    share = torch.full((half,), completed / 10)
    padding = completed / 10
    if schedule != "plain":
        share[:kept] = min(1, max(0, (completed - 2) / 8))
        done = min(1, completed / 6) * (half - kept)
        share[kept:] = torch.tensor([min(1, max(0, done - k)) for k in range(half - kept)][::-1])
        padding = min(1, max(0, (completed - 5) / 4))
    query, key = torch.randn(50, 1, 4, HEAD_DIM), torch.randn(50, 1, HEADS, HEAD_DIM)
    tables = []
    for rope, table, rest, pad in zip((angles.sin(), angles.cos()), fope, (0, 1), config.pad, strict=True):
        between_both = (1 - share) * rope * factor + share * table
        constant = share * rest + padding * (pad - rest)
        between_both[..., padded:] = ((1 - share) * rope + constant)[..., padded:] * factor
        tables.append(between_both.unsqueeze(1))
    sin, cos = tables
    expected = [functional.apply_fourier_rotary(x, sin, cos) for x in (query, key)]
    mixed = between.coefficients(coefficients)
    turned = torch_rotary.rotate(query, key, *between.basis(positions), mixed, between.settings)
    for x, reference in zip(turned, expected, strict=True):
        torch.testing.assert_close(x, reference, rtol=0, atol=1e-5)


def test_a_cast_keeps_frequencies_and_weight() -> None:
    config = FoPEConfig.from_profile(train_length=64, anneal_iters=3)
    between = anneal.Interpolation(Geometry(config, HEAD_DIM))
    anneal.begin(0, 1)
    between.update()
    before = [tensor.clone() for tensor in between.buffers()]
    assert float(between.weights[0, 0]) == pytest.approx(1 / 3)
    for tensor, reference in zip(between.bfloat16().buffers(), before, strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, reference)
    assert not between.state_dict(), "a checkpoint is that of the plain model"


def test_the_weight_of_a_captured_graph_is_written_in_place() -> None:
    between = anneal.Interpolation(
        Geometry(FoPEConfig.from_profile(train_length=64, anneal_iters=4), HEAD_DIM)
    )
    model = torch.nn.Sequential(between)
    address = between.weights.data_ptr()
    for completed, weight in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        anneal.advance(completed, [model])
        assert float(between.weights[0, 0]) == weight and between.weights.data_ptr() == address


@pytest.mark.parametrize(
    "stored,iteration,done,complete",
    [
        ({}, 100, 0, True),
        ({"fope_anneal_iters": 0}, 100, 0, True),
        ({"fope_anneal_iters": 10, "fope_anneal_start": 5}, 5, 0, False),
        ({"fope_anneal_iters": 10, "fope_anneal_start": 5}, 14, 9, False),
        ({"fope_anneal_iters": 10, "fope_anneal_start": 5}, 15, 10, True),
        ({"fope_anneal_iters": 10, "fope_anneal_start": -4}, 2, 6, False),
    ],
)
def test_what_a_checkpoint_says(stored: dict, iteration: int, done: int, complete: bool) -> None:
    args = argparse.Namespace(**stored)
    assert anneal.annealed_iterations(args, iteration) == done
    assert anneal.is_annealed(args, iteration) is complete
