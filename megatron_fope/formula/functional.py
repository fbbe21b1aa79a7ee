"""The FoPE formula, written once: pure functions that everything else calls or is tested against.

FoPE (Hua et al., *Fourier Position Embedding*, arXiv 2412.17739) keeps RoPE's rotation of channel pairs and
replaces the angle functions of each pair by a short Fourier series. Per head ``h``, position ``m`` and
output channel ``j``::

    S[m, h, j] = sum_i sin(m * w_i) * sin_coef[h, i, j]          (paper, section 4)
    C[m, h, j] = sum_i cos(m * w_i) * cos_coef[h, i, j]

    out[j]        = x[j] * C[j] - x[j + half] * S[j]
    out[j + half] = x[j + half] * C[j] + x[j] * S[j]

The ``D_in`` frequencies ``w_i`` are RoPE's, without those too slow to complete one cycle within the training
length. Channel pairs that get no series (``j >= D_out``) use a constant ``(sin, cos)``, the padding.

Letters in shapes: ``T`` positions, ``H`` coefficient heads (KV heads; 1 where heads share), ``D_in``
frequencies, ``D_out`` series, ``half`` = head_dim / 2 channel pairs. Channel ``j`` is paired with
``j + half`` (NeoX halves); :func:`pairs_to_halves` is for models with interleaved pairs.

The precision of a computation is the dtype of its frequencies: float32 reproduces every published
implementation, float64 is used for exact angles and for gradient checks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fope.formula.config import CHOICES

# Frequencies ------------------------------------------------------------------------------------------


def inverse_frequencies(dim: int, base: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """RoPE's angular frequencies ``1 / base^(2i/dim)``, in decreasing order.

    Always computed on the CPU: ``pow`` differs by units in the last place between devices, and one unit
    can change how many frequencies pass the floor and with it the shape of the coefficients.

    Args:
        dim: number of channels the frequencies are spread over; even.
        base: rotary base (theta).
        dtype: float32 as published, float64 for exact angles.

    Returns:
        ``[dim / 2]`` on CPU, radians per position.
    """
    # Whole numbers first: deepspeed.zero.Init rounds new floating tensors to the training dtype.
    exponent = torch.arange(0, dim, 2, device="cpu").to(dtype) / dim
    return 1.0 / (base**exponent)


def floor_frequency(train_length: int, floor_ratio: float = 1.0) -> float:
    """The slowest useful frequency: one whole cycle within ``train_length`` positions, times a ratio.

    Returns:
        ``2 pi / train_length * floor_ratio`` in radians per position (paper, section 4.2).
    """
    return 2 * math.pi / train_length * floor_ratio


def frequency_mask(
    inv_freq: Tensor,
    floor: float | None,
    *,
    strict: bool = False,
    num_inv_freq: int | None = None,
) -> Tensor:
    """Which frequencies are kept.

    Args:
        inv_freq: ``[n]`` frequencies in decreasing order.
        floor: smallest frequency kept, or None to keep all.
        strict: keep ``w > floor`` (XTuner and the serving engines) instead of ``w >= floor`` (authors).
            The two differ only where both round to the same float32; that happens for real settings.
        num_inv_freq: keep exactly the first so many and do not look at the floor (XTuner).

    Returns:
        ``[n]`` bool.
    """
    if num_inv_freq is not None:
        return torch.arange(inv_freq.numel(), device=inv_freq.device) < num_inv_freq
    if floor is None:
        return torch.ones_like(inv_freq, dtype=torch.bool)
    return inv_freq > floor if strict else inv_freq >= floor


def yarn_frequencies(
    inv_freq: Tensor,
    dim: int,
    base: float,
    *,
    original_length: int,
    scale: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    extrapolation_factor: float = 1.0,
) -> Tensor:
    """YaRN's by-parts interpolation: fast frequencies stay, slow ones are divided by ``scale``.

    Only the frequencies; YaRN's attention temperature, ``0.1 ln(scale) + 1``, is a separate factor.
    ``inv_freq`` may be RoPE's list with some entries set to zero or cut off at the end: position in the
    list decides.

    Args:
        inv_freq: ``[n]``, ``n <= dim / 2``.
        dim: channels the full list belongs to.
        base: rotary base.
        original_length: training length before extension, positions.
        scale: length ratio.
        beta_fast: cycles within ``original_length`` above which a frequency is kept as it is.
        beta_slow: cycles below which it is fully interpolated.
        extrapolation_factor: weight of the unscaled part (``len_extra_yarn_factor`` upstream).

    Returns:
        ``[n]``, dtype of ``inv_freq``.
    """

    def index_of(cycles: float) -> float:
        return dim * math.log(original_length / (cycles * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(index_of(beta_fast)), 0)
    high: float = min(math.ceil(index_of(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(inv_freq.numel(), device=inv_freq.device).to(inv_freq.dtype)
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    keep = (1 - ramp) * extrapolation_factor
    return (inv_freq / scale) * (1 - keep) + inv_freq * keep


def llama3_frequencies(
    inv_freq: Tensor,
    *,
    original_length: int,
    scale: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Tensor:
    """Llama 3's scaling, what Megatron applies under ``--use-rope-scaling``.

    Wavelengths longer than ``original_length / low_freq_factor`` are divided by ``scale``, those shorter
    than ``original_length / high_freq_factor`` are kept, the rest is blended linearly.

    Args:
        inv_freq: ``[n]``; zeros stay zero.
        original_length: training length before extension, positions.
        scale: length ratio.
        low_freq_factor: cycles within ``original_length`` at or below which a frequency is fully scaled.
        high_freq_factor: cycles above which it is kept.

    Returns:
        ``[n]``, dtype of ``inv_freq``.
    """
    cycles = original_length * inv_freq / (2 * math.pi)
    smooth = (cycles - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * inv_freq / scale + smooth * inv_freq
    return torch.where(
        cycles < low_freq_factor,
        inv_freq / scale,
        torch.where(cycles > high_freq_factor, inv_freq, blended),
    )


# Coefficients -----------------------------------------------------------------------------------------


def step_eye(d_in: int, d_out: int) -> Tensor:
    """The identity of the authors' code for a basis that may be wider than the output.

    ``E[i * s, i] = 1`` with ``s = ceil(d_in / d_out)`` while the row exists. When ``d_in`` is only a little
    larger than ``d_out``, almost half of the outputs get no identity entry; that is upstream behaviour
    (``FourierEmbedding.get_step_eye``) and part of the paper's runs at 1024 tokens.

    Returns:
        ``[d_in, d_out]`` float32 on CPU.
    """
    step = math.ceil(d_in / d_out)
    eye = torch.zeros(d_in, d_out, dtype=torch.float32, device="cpu")
    columns = torch.arange(min(d_out, math.ceil(d_in / step)), device="cpu")
    eye[columns * step, columns] = 1.0
    return eye


def init_coefficients(
    shape: tuple[int, ...], init: str, gain: float, generator: torch.Generator | None = None
) -> Tensor:
    """One coefficient matrix as the authors' code creates it.

    ``torch.nn.init.xavier_*`` reads the fans of a 3-D tensor as a convolution's, so the spread depends on
    the number of heads: always draw the full head count and slice afterwards, never a rank's share.

    Args:
        shape: ``(H, D_in, D_out)``, or ``(D_in, D_out)`` when heads share.
        init: one of those in :data:`megatron_fope.formula.config.CHOICES`. Names with ``xavier`` but without
            ``eye`` have no identity and ignore ``gain``.
        gain: spread of the noise around the identity; 0.3, 0.4, 0.6 in the paper's configurations.
        generator: CPU generator; None uses torch's global one, as the authors do.

    Returns:
        float32 of ``shape`` on CPU.

    Raises:
        ValueError: unknown ``init``.
    """
    coefficients = random_coefficients(shape, init, gain, generator)
    if init == "identity":
        coefficients += torch.eye(*shape[-2:], device="cpu")
    elif has_identity(init):
        coefficients += step_eye(*shape[-2:])
    return coefficients


def has_identity(init: str) -> bool:
    """Whether outputs get a frequency of their own, weight one, beside the noise."""
    return init == "identity" or init.startswith("eye")


def random_coefficients(
    shape: tuple[int, ...], init: str, gain: float, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`init_coefficients` without the identity."""
    # Whole numbers first: deepspeed.zero.Init rounds new floating tensors to the training dtype.
    coefficients = torch.zeros(shape, dtype=torch.int32, device="cpu").float()
    match init:
        case "eye" | "identity":
            pass
        case "eye_norm":
            coefficients.normal_(0.0, gain, generator=generator)
        case "eye_xavier_norm":
            torch.nn.init.xavier_normal_(coefficients, gain, generator)
        case "eye_xavier_uniform":
            torch.nn.init.xavier_uniform_(coefficients, gain, generator)
        case "xavier_norm":
            torch.nn.init.xavier_normal_(coefficients, 1.0, generator)
        case "xavier_uniform":
            torch.nn.init.xavier_uniform_(coefficients, 1.0, generator)
        case _:
            raise ValueError(f"init is {init!r}; allowed: {', '.join(CHOICES['init'])}")
    return coefficients


def normalize_coefficients(coefficients: Tensor) -> Tensor:
    """Divide every output's coefficients by their signed sum (``fourier_norm`` upstream).

    There is no epsilon upstream: a column whose sum is near zero becomes huge. Only outputs with an
    identity entry are safe.

    Args:
        coefficients: ``[..., D_in, D_out]``.

    Returns:
        Same shape; every column sums to one.
    """
    return coefficients / coefficients.sum(dim=-2, keepdim=True)


# Tables -----------------------------------------------------------------------------------------------


def fourier_basis(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of every position times every frequency; the same for all heads and layers.

    With float32 frequencies the angle is one rounded float32 product, as in all published
    implementations; its error reaches 5e-4 at 8 thousand positions and 8e-3 at 131 thousand. With float64
    frequencies the angle is exact for any length a model can have.

    Args:
        positions: ``[...]`` integer positions, first token 0.
        inv_freq: ``[D_in]`` float32 or float64, same device.

    Returns:
        ``(sin, cos)``, each ``[..., D_in]`` in the dtype of ``inv_freq``.
    """
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    return angles.sin(), angles.cos()


def multiply(a: Tensor, b: Tensor, *, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b (+ add)``, exact to float32 under autocast and whatever shortcuts the user allows PyTorch.

    Where float32 products may be shortened to TF32 or bfloat16, these are made in float64. The switches
    are only read, not changed for a while: they belong to the process, in which other threads multiply, and
    PyTorch refuses to tell by one of its two interfaces what was set by the other.

    Args:
        a: ``[n, k]`` float32 or float64.
        b: ``[k, m]``, same dtype.
        add: ``[n, m]`` or ``[m]``, added before the result is rounded.
        out: ``[n, m]``, receives the result.

    Returns:
        ``[n, m]`` of the same dtype.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float64 or not _shortens_products(a.device.type):
            return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, out=out)
        product = torch.mm(a.double(), b.double())
        if add is not None:
            product += add
        return product.to(a.dtype) if out is None else out.copy_(product)


def _shortens_products(device_type: str) -> bool:
    """Whether PyTorch may multiply float32 matrices on a device with fewer bits."""
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    try:
        return backend.matmul.fp32_precision not in ("ieee", "none")
    except AttributeError:  # before PyTorch 2.9, which has one interface only
        return torch.get_float32_matmul_precision() != "highest"


class _MixBasis(torch.autograd.Function):
    """``[N, D_in] x [H, D_in, D_out] -> [N, H, D_out]`` by :func:`multiply`, forward and backward.

    A function of its own because the backward pass of a plain product would be a plain product, under
    autocast and whatever TF32 setting training uses.
    """

    @staticmethod
    def forward(ctx: Any, basis: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        heads, d_in, d_out = coefficients.shape
        mixed = multiply(basis, coefficients.permute(1, 0, 2).reshape(d_in, heads * d_out))
        return mixed.view(-1, heads, d_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (basis,) = ctx.saved_tensors
        _, heads, d_out = grad.shape
        mixed = multiply(basis.transpose(0, 1), grad.reshape(-1, heads * d_out))
        return None, mixed.view(-1, heads, d_out).permute(1, 0, 2)


def mix_basis(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Weighted sums of the basis: the Fourier series themselves.

    Args:
        basis: ``[..., D_in]`` sin or cos values, float32 (float64 for gradient checks).
        coefficients: ``[H, D_in, D_out]``, or ``[D_in, D_out]`` when heads share.

    Returns:
        ``[..., H, D_out]`` (``H = 1`` when heads share), dtype of ``basis``. Differentiable with respect
        to the coefficients.
    """
    if coefficients.dim() == 2:
        coefficients = coefficients.unsqueeze(0)
    mixed = _MixBasis.apply(basis.reshape(-1, basis.size(-1)), coefficients)
    return mixed.view(*basis.shape[:-1], *mixed.shape[1:])


def fourier_tables(
    sin_basis: Tensor,
    cos_basis: Tensor,
    sin_coef: Tensor,
    cos_coef: Tensor,
    half: int,
    *,
    pad_sin: float = 1.0,
    pad_cos: float = 1.0,
    normalize: bool = False,
    attention_scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The sin and cos tables that rotate queries and keys.

    Args:
        sin_basis: ``[..., D_in]`` from :func:`fourier_basis`.
        cos_basis: ``[..., D_in]``.
        sin_coef: ``[H, D_in, D_out]`` or ``[D_in, D_out]``.
        cos_coef: same shape; the same tensor when both share one basis.
        half: channel pairs per head; pairs from ``D_out`` on get the padding.
        pad_sin: sin of a padded pair. The paper's author and every published implementation use 1 (with
            cos 1: a fixed rotation by 45 degrees and a factor √2); 0 leaves such a pair untouched.
        pad_cos: cos of a padded pair.
        normalize: divide the coefficients by their column sums first.
        attention_scaling: multiplied into both tables, padding included (XTuner; 1 unless YaRN).

    Returns:
        ``(sin, cos)``, each ``[..., H, half]``.
    """
    if normalize:
        sin_coef, cos_coef = normalize_coefficients(sin_coef), normalize_coefficients(cos_coef)
    sin, cos = mix_basis(sin_basis, sin_coef), mix_basis(cos_basis, cos_coef)
    padding = (0, half - sin.size(-1))
    sin, cos = F.pad(sin, padding, value=pad_sin), F.pad(cos, padding, value=pad_cos)
    if attention_scaling != 1.0:
        sin, cos = sin * attention_scaling, cos * attention_scaling
    return sin, cos


def apply_fourier_rotary(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate queries or keys; arithmetic in the tables' dtype, one rounding at the end.

    Args:
        x: ``[..., heads, 2 * half]``, any float dtype. ``heads`` is a multiple of the tables' ``H``; heads
            that share a table are contiguous, as in Megatron's grouped-query layout.
        sin: ``[..., H, half]`` float32; leading dimensions broadcast against those of ``x``.
        cos: same shape.

    Returns:
        Same shape and dtype as ``x``. Norms are not preserved, and the inverse is not the transpose:
        ``sin^2 + cos^2`` is not 1.
    """
    *batch, heads, head_dim = x.shape
    groups = sin.size(-2)
    grouped = x.reshape(*batch, groups, heads // groups, head_dim)
    sin, cos = sin.unsqueeze(-2), cos.unsqueeze(-2)
    first, second = grouped.to(sin.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype).reshape(x.shape)


def pairs_to_halves(x: Tensor) -> Tensor:
    """Reorder channels so that interleaved pairs ``(2j, 2j + 1)`` become ``(j, j + half)``.

    Queries and keys that are both reordered have the same scores.

    Args:
        x: ``[..., 2 * half]``.

    Returns:
        Same shape and dtype, a copy.
    """
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
