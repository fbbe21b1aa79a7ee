"""The Triton rotation as one differentiable function: checks, choice of variant, autograd, ``torch.compile``.

In eager mode the kernels are launched directly under an ``autograd.Function``; dispatching a custom operator
takes three times as long on the host (measured without the launch: 230 against 80 microseconds).
``torch.compile`` gets the custom operators ``megatron_fope::rotate`` and ``megatron_fope::rotate_backward``,
which it does not look into. Both ways share every line that computes. Nothing waits for the device, so that
CUDA graphs can capture either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fope import kernels
from megatron_fope.common.errors import UserError
from megatron_fope.kernels import launch
from megatron_fope.kernels.inputs import check_tensors
from megatron_fope.kernels.launch import Call

if TYPE_CHECKING:
    from megatron_fope.formula.config import FoPEConfig

VARIANTS = tuple(launch.PRECISIONS)
"""``tables``: a matrix product makes the series of all rows, the kernel only rotates. ``fused``: the kernel
mixes the series itself in float32. ``fused_tf32x3``: the same on tensor cores, each factor split into two
TF32 numbers, which is nearly as exact."""

TABLE_LIMIT = 256 << 20
"""Bytes of a pair of tables up to which they are kept instead of mixed in the kernel."""


def rotate_triton(
    query: Tensor,
    key: Tensor,
    sin_basis: Tensor,
    cos_basis: Tensor,
    coefficients: dict[str, Tensor],
    config: FoPEConfig,
    positions: Tensor | None = None,
    variant: str | None = None,
    *,
    cp_rank: int = 0,
    cp_size: int = 1,
    offset: int = 0,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`megatron_fope.kernels.torch_rotary.rotate` in one kernel; the basis may hold more rows than
    these tokens'.

    Three ways to say which row of the basis a token uses. Without further arguments it is row ``t`` for token
    ``t``. With ``cp_rank``, ``cp_size`` and ``offset`` the basis belongs to positions 0, 1, ... of the
    undivided sequence, and tokens use the rows of
    :func:`megatron_fope.layers.positions.sequence_positions`. With
    ``positions`` the same for any positions: packed documents, dynamic batching, or an offset inside a CUDA
    graph. A basis that is kept and indexed lets tables be kept as well.

    Args:
        query: ``[s, b, query heads, head_dim]`` float32, bfloat16 or float16; any strides but the last, which
            is 1.
        key: ``[s, b, KV heads, head_dim]``, same dtype.
        sin_basis: ``[rows, D_in]`` from :func:`megatron_fope.formula.functional.fourier_basis`.
        cos_basis: same shape.
        coefficients: ``{name: [KV heads, D_in, D_out]}`` (one head when heads share); float32.
        config: the settings that the tables depend on.
        positions: ``[s]`` int32 or int64, or None. On a GPU they cannot be checked without waiting for it
            (see :func:`check_positions`): a token whose row does not exist becomes NaN.
        variant: one of :data:`VARIANTS`; None: :func:`choose_variant`.
        cp_rank: rank in the context-parallel group of the tokens.
        cp_size: size of that group.
        offset: position of the sequence's first token.
        inplace: write into query and key. Only without gradients: in training they are views of the fused
            projection, whose other users (and autograd) still need the values, and the rotation cannot be
            undone.

    Returns:
        Rotated query and key: new contiguous tensors, or the given ones with ``inplace``. Differentiable with
        respect to query, key and coefficients.

    Raises:
        UserError: the device cannot run the kernels.
        ValueError: arguments that do not fit together.
    """
    sin_coef, cos_coef = config.effective_coefficients(coefficients)
    _check_tensors(query, key, sin_basis, cos_basis, sin_coef, cos_coef)
    _check_rows(query.size(0), sin_basis.size(0), query.device, positions, cp_rank, cp_size, offset)
    if variant is None:
        variant = choose_variant(config, sin_basis.size(0), *sin_coef.shape)
    elif variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    pad_sin, pad_cos = (value * config.attention_scaling for value in config.pad)
    call = Call(
        sin_basis,
        cos_basis,
        sin_coef,
        cos_coef,
        positions,
        cp_rank,
        cp_size,
        offset,
        pad_sin,
        pad_cos,
        variant,
        not config.learnable,
    )
    if inplace:
        _check_inplace(query, key, sin_coef, cos_coef)
        torch.ops.megatron_fope.rotate_(query, key, *call)
        return query, key
    if torch.compiler.is_compiling():
        return torch.ops.megatron_fope.rotate(query, key, *call)
    return _Rotate.apply(query, key, *call)


def choose_variant(config: FoPEConfig, rows: int, heads: int, d_in: int, d_out: int) -> str:
    """The variant for a model and a basis, by arithmetic and not by trial.

    Tables add ``2 * 4 * D_out`` bytes per token and head to the traffic (12 to 20 percent at 8 KV heads) and
    are cheapest where many calls share them: coefficients that all layers share, frozen, and used as they
    are. Otherwise making and reading them costs more than mixing in the kernel, and at long lengths they
    also take memory that grows with the length.

    Args:
        config: FoPE's settings.
        rows: rows of the basis.
        heads: heads of the coefficients on this rank.
        d_in: frequencies.
        d_out: series.

    Returns:
        ``tables`` or ``fused``.
    """
    kept = config.shared_layers and not config.normalize and config.attention_scaling == 1.0
    if kept and not config.learnable and 2 * 4 * rows * heads * d_out <= TABLE_LIMIT:
        return "tables"
    return "fused"


def check_positions(positions: Tensor, rows: int) -> None:
    """Check that every position has a row. Waits for the GPU: once per batch, not per layer.

    Raises:
        ValueError: naming the largest or smallest position.
    """
    if not positions.numel():
        return
    low, high = (int(value) for value in torch.aminmax(positions))
    if low < 0 or high >= rows:
        wrong = low if low < 0 else high
        raise ValueError(f"positions contain {wrong}; the basis has rows 0 to {rows - 1}")


# Checks -------------------------------------------------------------------------------------------------


def _check_tensors(
    query: Tensor, key: Tensor, sin_basis: Tensor, cos_basis: Tensor, sin_coef: Tensor, cos_coef: Tensor
) -> None:
    if not torch.compiler.is_compiling():
        reason = kernels.available(query.device)
        if reason is not None:
            raise UserError(f"the Triton rotation cannot run: {reason}")
    check_tensors(query, key, sin_basis, cos_basis, sin_coef, cos_coef)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.stride(3) != 1:
            raise ValueError(f"the last stride of {name} is {tensor.stride(3)}; allowed: 1")


def _check_rows(
    num_tokens: int,
    rows: int,
    device: torch.device,
    positions: Tensor | None,
    cp_rank: int,
    cp_size: int,
    offset: int,
) -> None:
    if positions is not None:
        if (cp_rank, cp_size, offset) != (0, 1, 0):
            raise ValueError("positions are given together with cp_rank, cp_size or offset; use one way")
        if positions.dtype not in (torch.int32, torch.int64) or positions.shape != (num_tokens,):
            raise ValueError(
                f"positions are {positions.dtype} of shape {tuple(positions.shape)}; allowed: int32 or int64 "
                f"of shape ({num_tokens},)"
            )
        if positions.device != device:
            raise ValueError(f"positions are on {positions.device} and query on {device}; use one device")
        if not rows and num_tokens:
            raise ValueError("the basis has no rows")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_positions(positions, rows)
        return
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank is {cp_rank} of cp_size {cp_size}; allowed: 0 to cp_size - 1")
    if cp_size > 1 and num_tokens % 2:
        raise ValueError(f"query has {num_tokens} tokens; allowed: an even number under context parallelism")
    if offset < 0:
        raise ValueError(f"offset is {offset}; allowed: 0 or more")
    needed = offset + (num_tokens if cp_size == 1 else (2 * cp_size - cp_rank) * (num_tokens // 2))
    if needed > rows:
        raise ValueError(f"positions reach {needed - 1}; the basis has rows 0 to {rows - 1}")


def _check_inplace(query: Tensor, key: Tensor, sin_coef: Tensor, cos_coef: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, sin_coef, cos_coef)):
        raise ValueError("inplace is given where gradients are needed; use it under torch.no_grad() only")
    for name, tensor in (("query", query), ("key", key)):
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"inplace is given and {name} is an expanded tensor; requires memory of its own")


# Autograd and operators ---------------------------------------------------------------------------------


def _forward(query: Tensor, key: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    return launch.forward(query, key, Call(*call))


def _backward(
    grad_query: Tensor, grad_key: Tensor, query: Tensor | None, key: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch.backward(grad_query, grad_key, query, key, Call(*call))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What the backward pass needs: queries and keys only when the coefficients learn."""
    query, key, *rest = inputs
    call = Call(*rest)
    learning = any(ctx.needs_input_grad[2 + index] for index in range(4))
    inputs_kept = (query, key) if learning else (None, None)
    ctx.save_for_backward(*inputs_kept, *call[:5])
    ctx.settings = call[5:]


def _differentiate(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, grad_query: Tensor, grad_key: Tensor
) -> tuple[Tensor | None, ...]:
    query, key, *tensors = ctx.saved_tensors
    grads = run(grad_query, grad_key, query, key, *tensors, *ctx.settings)
    needed = ctx.needs_input_grad
    of_inputs = tuple(g if wanted else None for g, wanted in zip(grads[:2], needed[:2], strict=True))
    of_coefs = tuple(g if wanted else None for g, wanted in zip(grads[2:], needed[4:6], strict=True))
    return *of_inputs, None, None, *of_coefs, *(None,) * (len(Call._fields) - 4)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        # Not by a separate setup_context: torch would inspect the signature in every call.
        _remember(ctx, arguments, None)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(_backward, ctx, grad_query, grad_key)


_CALL_SCHEMA = (
    "Tensor sin_basis, Tensor cos_basis, Tensor sin_coef, Tensor cos_coef, Tensor? positions, "
    "SymInt cp_rank, SymInt cp_size, SymInt offset, float pad_sin, float pad_cos, str variant, "
    "bool keep_tables"
)
_rotate_op = torch.library.custom_op(
    "megatron_fope::rotate",
    _forward,
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, {_CALL_SCHEMA}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "megatron_fope::rotate_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_query, Tensor grad_key, Tensor? query, Tensor? key, {_CALL_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.custom_op(
    "megatron_fope::rotate_",
    mutates_args=("query", "key"),
    schema=f"(Tensor(a!) query, Tensor(b!) key, {_CALL_SCHEMA}) -> ()",
)
def _inplace_op(query: Tensor, key: Tensor, *call: Any) -> None:
    launch.forward(query, key, Call(*call), inplace=True)


@_rotate_op.register_fake
def _(query: Tensor, key: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@_backward_op.register_fake
def _(
    grad_query: Tensor, grad_key: Tensor, query: Tensor | None, key: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    coefs = Call(*call)[2:4]
    return (
        grad_query.new_empty(grad_query.shape),
        grad_key.new_empty(grad_key.shape),
        *(c.new_empty(0 if query is None else c.shape) for c in coefs),
    )


_rotate_op.register_autograd(
    lambda ctx, grad_query, grad_key: _differentiate(
        torch.ops.megatron_fope.rotate_backward, ctx, grad_query, grad_key
    ),
    setup_context=_remember,
)
