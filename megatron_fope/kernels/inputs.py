"""What the ways to rotate ask of their arguments, refused here and not deep inside a product or a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


def check_tensors(
    query: Tensor,
    key: Tensor,
    sin_basis: Tensor,
    cos_basis: Tensor,
    sin_coef: Tensor,
    cos_coef: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    coef_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Check devices, dtypes and shapes as :func:`megatron_fope.kernels.torch_rotary.rotate` describes them.

    Nothing here waits for a GPU.

    Args:
        dtypes: allowed for query and key.
        coef_dtypes: allowed for the coefficients.

    Raises:
        ValueError: naming the argument, what it is, and what is allowed.
    """
    device = query.device
    others = {
        "key": key,
        "sin_basis": sin_basis,
        "cos_basis": cos_basis,
        "sin_coef": sin_coef,
        "cos_coef": cos_coef,
    }
    for name, tensor in others.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and query on {device}; use one device")
    if query.dtype not in dtypes or key.dtype != query.dtype:
        raise ValueError(f"query is {query.dtype} and key {key.dtype}; allowed: the same of {_names(dtypes)}")
    for name in ("sin_basis", "cos_basis"):
        if others[name].dtype not in WIDE:
            raise ValueError(f"{name} is {others[name].dtype}; allowed: {_names(WIDE)}")
    for name in ("sin_coef", "cos_coef"):
        if others[name].dtype not in coef_dtypes:
            raise ValueError(f"{name} is {others[name].dtype}; allowed: {_names(coef_dtypes)}")
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.size(3) != key.size(3):
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}; allowed: [s, b, heads, head_dim], "
            "different in their heads only"
        )
    heads, groups, head_dim = query.size(2), key.size(2), query.size(3)
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"head_dim is {head_dim}; allowed: even numbers")
    if groups < 1 or heads % groups:
        raise ValueError(f"query has {heads} heads and key {groups}; allowed: a multiple of key's")
    if sin_basis.dim() != 2 or sin_basis.shape != cos_basis.shape:
        raise ValueError(
            f"sin_basis is {tuple(sin_basis.shape)} and cos_basis {tuple(cos_basis.shape)}; allowed: "
            "[rows, D_in], the same for both"
        )
    if sin_basis.size(0) != query.size(0):
        raise ValueError(
            f"the basis has {sin_basis.size(0)} rows; requires one per token of query, {query.size(0)}"
        )
    if sin_coef.shape != cos_coef.shape or sin_coef.dim() != 3 or sin_coef.size(0) not in (1, groups):
        raise ValueError(
            f"coefficients are {tuple(sin_coef.shape)} and {tuple(cos_coef.shape)}; allowed: "
            f"[H, D_in, D_out] with H = 1 or the {groups} heads of key"
        )
    _, d_in, d_out = sin_coef.shape
    if d_in != sin_basis.size(1) or not 1 <= d_out <= head_dim // 2:
        raise ValueError(
            f"coefficients are [H, {d_in}, {d_out}]; allowed: D_in {sin_basis.size(1)} as in the basis, "
            f"D_out 1 to {head_dim // 2} for head_dim {head_dim}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
