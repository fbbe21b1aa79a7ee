"""What is compared: every implementation, as one call from a layer's query and key to rotated ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.geometry import Geometry

Pair = tuple[Tensor, Tensor]


class Call:
    """One provider on one case's tensors.

    Args:
        forward: returns rotated query and key, attached to the autograd graph.
        leaves: tensors that get a gradient.
        grads: gradients that arrive at query and key.
        forget: drops what a model would not find again at the next call.
    """

    def __init__(
        self,
        forward: Callable[[], Pair],
        leaves: tuple[Tensor, ...],
        grads: Pair,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self.forward = forward
        self.forget = forget
        self._leaves = leaves
        self._grads = grads

    def backward(self, outputs: Pair) -> tuple[Tensor, ...]:
        """Gradients of the leaves: query, key, then the coefficients that learn."""
        return torch.autograd.grad(outputs, self._leaves, self._grads)


@dataclass(frozen=True)
class Provider:
    """One implementation."""

    name: str
    computes: str
    """``fope``, ``rope`` (less work: a lower bound or what FoPE replaces) or ``copy``."""
    build: Callable[[Inputs], Callable[[], Pair]]
    """Everything that a training step does once; returns what a layer does per call."""
    missing: Callable[[Case, torch.device], str | None] = lambda case, device: None
    """Why it cannot run, or None."""
    forget: Callable[[], None] | None = None
    """Empties a cache that holds the tables of the last few layers; a model has more layers than that."""
    compiles: bool = False
    """Compiled anew for other sizes, so it is not called with other ones than the case's."""

    def call(self, inputs: Inputs) -> Call:
        """Bind the provider to tensors."""
        leaves = (inputs.query, inputs.key)
        if self.computes == "fope":
            leaves += inputs.learning
        if self.forget is None or inputs.fope.shared_layers:
            return Call(self.build(inputs), leaves, inputs.grads)
        return Call(self.build(inputs), leaves, inputs.grads, self.forget)


# FoPE -------------------------------------------------------------------------------------------------


def _torch(inputs: Inputs) -> Callable[[], Pair]:
    from megatron_fope.kernels.torch_rotary import rotate

    return lambda: rotate(
        inputs.query, inputs.key, inputs.sin_basis, inputs.cos_basis, inputs.coefficients, inputs.fope
    )


def _triton(variant: str) -> Callable[[Inputs], Callable[[], Pair]]:
    def build(inputs: Inputs) -> Callable[[], Pair]:
        from megatron_fope.kernels.ops import rotate_triton

        return lambda: rotate_triton(
            inputs.query,
            inputs.key,
            inputs.sin_basis,
            inputs.cos_basis,
            inputs.coefficients,
            inputs.fope,
            variant=variant,
        )

    return build


def _forget_tables() -> None:
    from megatron_fope.kernels import launch

    launch.TABLES.clear()


def _without_triton(case: Case, device: torch.device) -> str | None:
    try:
        from megatron_fope import kernels
    except ImportError:
        return "this version of megatron-fope has no Triton kernels"
    if device.type != "cuda":
        return "needs a GPU"
    return kernels.available(device)


def _tables(inputs: Inputs) -> Pair:
    """The formula's tables for ``[s, b, heads, head_dim]``."""
    geometry = Geometry(inputs.fope, inputs.query.size(-1))
    sin, cos = geometry.tables(inputs.sin_basis, inputs.cos_basis, inputs.coefficients)
    return sin[:, None], cos[:, None]


def _rotate_both(query: Tensor, key: Tensor, sin: Tensor, cos: Tensor) -> Pair:
    return tuple(functional.apply_fourier_rotary(x, sin, cos) for x in (query, key))


def _reference(inputs: Inputs) -> Callable[[], Pair]:
    return lambda: _rotate_both(inputs.query, inputs.key, *_tables(inputs))


def _compiled(inputs: Inputs) -> Callable[[], Pair]:
    import torch._dynamo

    torch._dynamo.reset()  # or the code compiled for other shapes counts against a limit
    # The mixing stays outside: it is a matrix product either way, and its precision guard does not trace.
    compiled = torch.compile(_rotate_both, fullgraph=True, dynamic=False)
    return lambda: compiled(inputs.query, inputs.key, *_tables(inputs))


def _published(inputs: Inputs) -> Callable[[], Pair]:
    from bench.published import rotate_as_published

    return lambda: rotate_as_published(
        inputs.query, inputs.key, inputs.sin_basis, inputs.cos_basis, inputs.coefficients, inputs.fope
    )


def _published_needs_equal_heads(case: Case, device: torch.device) -> str | None:
    if case.heads != case.kv_heads:
        return "the authors' code needs as many KV heads as query heads"
    return None


# RoPE -------------------------------------------------------------------------------------------------


def _megatron(inputs: Inputs) -> Callable[[], Pair]:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
    )
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)  # only looked at for packed sequences
    return lambda: tuple(
        apply_rotary_pos_emb(x, inputs.angles, config, cp_group=group) for x in (inputs.query, inputs.key)
    )


def _without_megatron(case: Case, device: torch.device) -> str | None:
    return _not_installed("megatron.core", "megatron-core")


def _transformer_engine(inputs: Inputs) -> Callable[[], Pair]:
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb as fused

    return lambda: tuple(fused(x, inputs.angles) for x in (inputs.query, inputs.key))


def _without_transformer_engine(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    reason = _not_installed("transformer_engine", "'megatron-fope[te]'") or _without_megatron(case, device)
    if reason is None:
        from megatron.core.models.common.embeddings import rope_utils

        if rope_utils.fused_apply_rotary_pos_emb is None:
            reason = "Megatron-Core finds no fused RoPE in the installed Transformer Engine"
    return reason


def _flash(inputs: Inputs) -> Callable[[], Pair]:
    from flash_attn.layers.rotary import apply_rotary_emb

    angles = inputs.angles[:, 0, 0, : inputs.angles.size(-1) // 2]
    cos, sin = angles.cos().to(inputs.query.dtype), angles.sin().to(inputs.query.dtype)
    return lambda: tuple(
        apply_rotary_emb(x.transpose(0, 1), cos, sin).transpose(0, 1) for x in (inputs.query, inputs.key)
    )


def _without_flash(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return _not_installed("flash_attn", "flash-attn")


def _not_installed(module: str, package: str) -> str | None:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return None if found else f"not installed: pip install {package}"


# Copy -------------------------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    """A layer that only moves query and key, and their gradients: the traffic no rotation can avoid."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor) -> Pair:
        return _dense(query), _dense(key)

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor) -> Pair:
        return _dense(grad_query), _dense(grad_key)


def _dense(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _copy(inputs: Inputs) -> Callable[[], Pair]:
    return lambda: _Copy.apply(inputs.query, inputs.key)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("fope-torch", "fope", _torch),
        Provider("fope-triton-tables", "fope", _triton("tables"), _without_triton, _forget_tables),
        Provider("fope-triton-fused", "fope", _triton("fused"), _without_triton),
        Provider("fope-triton-tf32x3", "fope", _triton("fused_tf32x3"), _without_triton),
        Provider("fope-compiled", "fope", _compiled, compiles=True),
        Provider("fope-reference", "fope", _reference),
        Provider("published", "fope", _published, _published_needs_equal_heads),
        Provider("megatron-rope", "rope", _megatron, _without_megatron),
        Provider("te-rope", "rope", _transformer_engine, _without_transformer_engine),
        Provider("flash-rope", "rope", _flash, _without_flash),
        Provider("copy", "copy", _copy),
    )
}
"""``fope-torch``, ``fope-triton-*``: this package. ``fope-reference``: the formula under autograd;
``fope-compiled``: its rotation under ``torch.compile``. ``published``: the authors' algorithm.
``megatron-rope``: Megatron's unfused RoPE. ``te-rope``, ``flash-rope``: fused RoPE kernels. ``copy``: query
and key copied."""

OWN = ("fope-torch", "fope-triton-tables", "fope-triton-fused", "fope-triton-tf32x3")
"""This package's."""


def select(text: str | None) -> list[Provider]:
    """The providers that a flag names, always with ``copy``, against which bandwidth is measured.

    Raises:
        UserError: an unknown name.
    """
    if text is None:
        return list(PROVIDERS.values())
    for name in text.split(","):
        if name not in PROVIDERS:
            raise UserError(
                f"--provider is {name!r}; allowed: {', '.join(PROVIDERS)}, several separated by commas"
            )
    return [provider for name, provider in PROVIDERS.items() if name in (*text.split(","), "copy")]
