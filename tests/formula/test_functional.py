"""Properties of the formula that hold for any input, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fope.formula import functional, growth
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry


def rope_rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Plain RoPE on ``[T, heads, head_dim]`` with ``[T, half]`` angles, written independently."""
    half = x.size(-1) // 2
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_identity_coefficients_are_rope() -> None:
    config = FoPEConfig.from_profile(train_length=64, clip=False, drop_clipped=False, init="eye")
    geometry = Geometry(config, 32, 2)
    coefficients, inv_freq = geometry.make_coefficients(layer=1), geometry.inv_freq
    positions = torch.arange(50)
    x = torch.randn(50, 4, 32)
    sin, cos = geometry.tables(*functional.fourier_basis(positions, inv_freq), coefficients)
    expected = rope_rotate(x, positions[:, None] * inv_freq)
    torch.testing.assert_close(functional.apply_fourier_rotary(x, sin, cos), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("padding,factor", [("1,1", math.sqrt(2)), ("0,1", 1.0)])
def test_padded_channels_do_not_depend_on_position(padding: str, factor: float) -> None:
    config = FoPEConfig.from_profile(train_length=64, pad_value=padding)
    geometry = Geometry(config, 32, 3)
    d_out, half = geometry.d_out, 16
    assert 0 < d_out < half
    x = torch.randn(1, 3, 32).expand(40, 3, 32)
    basis = functional.fourier_basis(torch.arange(40), geometry.inv_freq)
    tables = geometry.tables(*basis, geometry.make_coefficients(layer=1))
    pairs = functional.apply_fourier_rotary(x, *tables).unflatten(-1, (2, half))[..., d_out:]
    assert torch.equal(pairs, pairs[:1].expand_as(pairs))
    before = x.unflatten(-1, (2, half))[..., d_out:]
    torch.testing.assert_close(pairs.norm(dim=-2), factor * before.norm(dim=-2))


def test_query_heads_use_their_group() -> None:
    """Head g of 6 uses KV head g // 3 of 2, as Megatron lays out grouped queries."""
    x, sin, cos = torch.randn(5, 6, 8), torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    together = functional.apply_fourier_rotary(x, sin, cos)
    for head in range(6):
        group = slice(head // 3, head // 3 + 1)
        alone = functional.apply_fourier_rotary(x[:, head : head + 1], sin[:, group], cos[:, group])
        assert torch.equal(together[:, head : head + 1], alone)


def test_sixteen_bit_input_is_rounded_once() -> None:
    x, sin, cos = torch.randn(9, 2, 16).bfloat16(), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    expected = functional.apply_fourier_rotary(x.float(), sin, cos).bfloat16()
    assert torch.equal(functional.apply_fourier_rotary(x, sin, cos), expected)


def test_autocast_changes_nothing() -> None:
    basis, coefficients = torch.randn(33, 12), torch.randn(3, 12, 7, requires_grad=True)
    upstream = torch.randn(33, 3, 7)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        mixed = functional.mix_basis(basis, coefficients)
        return mixed, torch.autograd.grad(mixed, coefficients, upstream)[0]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(normalize: bool, shared: bool) -> None:
    """Central differences in float64: with respect to the input and to both coefficient matrices."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 300])
    inv_freq = functional.inverse_frequencies(16, 10000.0, torch.float64)[:5]
    shape = (5, 3) if shared else (2, 5, 3)
    sin_coef = (torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()
    cos_coef = (torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()
    x = torch.randn(4, 4, 16, dtype=torch.float64, requires_grad=True)

    def rotate(x: torch.Tensor, sin_coef: torch.Tensor, cos_coef: torch.Tensor) -> torch.Tensor:
        basis = functional.fourier_basis(positions, inv_freq)
        sin, cos = functional.fourier_tables(*basis, sin_coef, cos_coef, 8, normalize=normalize)
        return functional.apply_fourier_rotary(x, sin, cos)

    assert torch.autograd.gradcheck(rotate, (x, sin_coef, cos_coef))


def test_exact_angles_are_exact_where_float32_is_not() -> None:
    position = 1_048_573
    plain = FoPEConfig.from_profile(train_length=4096)
    exact = FoPEConfig.from_profile(train_length=4096, exact_angles=True)
    assert Geometry(plain, 128).d_in == Geometry(exact, 128).d_in
    errors = {}
    for config in (plain, exact):
        inv_freq = Geometry(config, 128).inv_freq
        sin, _ = functional.fourier_basis(torch.tensor([position]), inv_freq)
        reference = [math.sin(position / 10000.0 ** (2 * i / 128)) for i in range(inv_freq.numel())]
        errors[config.exact_angles] = float((sin[0].double() - torch.tensor(reference).double()).abs().max())
    assert errors[True] < 1e-6 < 1e-3 < errors[False]


def test_frequencies_are_computed_on_the_cpu_whatever_the_default_device() -> None:
    """Megatron builds models under ``torch.device("meta")``; coefficients and frequencies must be real."""
    config = FoPEConfig.from_profile(train_length=100, scaling="yarn", scaling_factor=4, original_length=64)
    with torch.device("meta"):
        geometry = Geometry(config, 64, 2)
        inv_freq, coefficients = geometry.inv_freq, geometry.make_coefficients(layer=3)
    assert inv_freq.device.type == "cpu" and all(c.device.type == "cpu" for c in coefficients.values())


def test_llama3_scaling_is_megatrons() -> None:
    """Against Megatron's own frequencies under ``--use-rope-scaling``."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary

    theirs = rotary.RotaryEmbedding._apply_scaling(
        None, functional.inverse_frequencies(128, 500000.0), factor=8.0
    )
    ours = functional.llama3_frequencies(
        functional.inverse_frequencies(128, 500000.0), original_length=8192, scale=8.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_growth_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"18 x 16 cannot become 20 x 14"):
        growth.grow_upstream(torch.zeros(18, 16), 20, 14)
