"""The Triton rotation as one differentiable function: checks, choice of variant, autograd, ``torch.compile``.

In eager mode the kernels are launched directly under an ``autograd.Function``; dispatching a custom operator
takes three times as long on the host (measured without the launch: 230 against 80 microseconds).
``torch.compile`` gets the custom operators ``megatron_fope::rotate`` and ``megatron_fope::rotate_backward``,
which it does not look into. Both ways share every line that computes. Nothing waits for the device, so that
CUDA graphs can capture either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fope import kernels
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import effective_coefficients
from megatron_fope.kernels import launch
from megatron_fope.kernels.inputs import check_tensors
from megatron_fope.kernels.launch import Call

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
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`megatron_fope.kernels.torch_rotary.rotate` in one kernel; the same arguments and results.

    Query and key are float32, bfloat16 or float16, with any strides but the last, which is 1; coefficients
    are float32.

    Args:
        variant: one of :data:`VARIANTS`; None: :func:`choose_variant`.

    Raises:
        UserError: the device cannot run the kernels.
        ValueError: arguments that do not fit together.
    """
    sin_coef, cos_coef = effective_coefficients(config, coefficients)
    if not torch.compiler.is_compiling() and (reason := kernels.available(query.device)) is not None:
        raise UserError(f"the Triton rotation cannot run: {reason}")
    check_tensors(query, key, sin_basis, cos_basis, sin_coef, cos_coef)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.stride(3) != 1:
            raise ValueError(f"the last stride of {name} is {tensor.stride(3)}; allowed: 1")
    if variant is None:
        variant = choose_variant(config, sin_basis.size(0), *sin_coef.shape)
    elif variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    bases = (sin_basis, cos_basis)
    call = Call(*bases, sin_coef, cos_coef, *config.scaled_pad, variant, keep_tables=not config.learnable)
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
    ctx.save_for_backward(*inputs_kept, *call[:4])
    ctx.settings = call[4:]


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
    "Tensor sin_basis, Tensor cos_basis, Tensor sin_coef, Tensor cos_coef, "
    "float pad_sin, float pad_cos, str variant, bool keep_tables"
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
