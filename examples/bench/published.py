"""The published algorithm as a layer of the authors' model runs it: what FoPE costs without this package.

Written from the description of ``olmo/model.py`` of TsinghuaC3I/Fourier-Position-Embedding, not copied. It
differs from :mod:`megatron_fope.kernels.torch_rotary` in how, not in what: heads before tokens, float32
copies of query
and key, tables of the full head width that are mixed for the query and again for the key, everything under
autograd. The basis is kept between calls, which is to its advantage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fope.formula.config import FoPEConfig


def rotate_as_published(
    query: Tensor,
    key: Tensor,
    sin_basis: Tensor,
    cos_basis: Tensor,
    coefficients: dict[str, Tensor],
    config: FoPEConfig,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        query: ``[s, b, heads, head_dim]``; is seen as ``[b, heads, s, head_dim]``, without a copy.
        key: the same shape: the authors' coefficients belong to query heads.
        sin_basis: ``[s, D_in]`` float32.
        cos_basis: ``[s, D_in]`` float32.
        coefficients: ``sin_coef`` and ``cos_coef``, ``[heads, D_in, D_out]`` float32.
        config: padding; other options of the authors' code are not needed here.

    Returns:
        Rotated query and key, ``[s, b, heads, head_dim]``.
    """
    rotated = []
    for x in (query, key):
        x = x.permute(1, 2, 0, 3)
        sin, cos = (
            _full_width_table(basis, coefficients[name], x.size(-1), pad)
            for basis, name, pad in zip(
                (sin_basis, cos_basis), ("sin_coef", "cos_coef"), config.pad, strict=True
            )
        )
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            first, second = wide.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            out = wide * cos + turned * sin
        rotated.append(out.to(x.dtype).permute(2, 0, 1, 3))
    return rotated[0], rotated[1]


def _full_width_table(basis: Tensor, coefficients: Tensor, head_dim: int, padding: float) -> Tensor:
    """``[heads, s, head_dim]`` float32: both halves of a head hold the same series."""
    with torch.autocast(basis.device.type, enabled=False):
        series = torch.einsum("sf,hfj->hsj", basis, coefficients)
        series = F.pad(series, (0, head_dim // 2 - series.size(-1)), value=padding)
        return torch.cat((series, series), dim=-1)
