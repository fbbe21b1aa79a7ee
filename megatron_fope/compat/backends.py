"""Which of its optional libraries a Megatron has chosen; read off the names that its modules bound."""

from __future__ import annotations

import importlib
from typing import Any

_LIBRARIES = {
    "transformer_engine": "Transformer Engine",
    "transformer_engine_torch": "Transformer Engine",
    "apex": "apex",
    "amp_C": "apex",
    "torch": "PyTorch",
    "megatron": "Megatron's own, in PyTorch",
}

_CHOICES = {
    "Adam": ("megatron.core.optimizer", "Adam"),
    "gradient norm and clipping": ("megatron.core.optimizer.clip_grads", "l2_norm_impl"),
    "norm of local layers": ("megatron.core.models.backends", "LNImpl"),
}
"""The same in 0.16 to 0.19 and on main."""


def chosen_libraries() -> dict[str, str]:
    """What Megatron uses in this environment, by purpose: ``{"Adam": "Transformer Engine", ...}``.

    Imports Megatron, which takes seconds and warns about every library that it misses.
    """
    found = {purpose: _library(_bound(*place)) for purpose, place in _CHOICES.items()}
    fused = _bound("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available")
    found["gradient accumulation fusion"] = "apex" if fused else "none"
    return found


def _bound(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name, None)


def _library(chosen: Any) -> str:
    # Megatron's wrapper of apex's norm is in a module of its own.
    if getattr(chosen, "__name__", "") == "FusedLayerNorm":
        return "apex"
    if getattr(chosen, "__name__", "") == "WrappedTorchNorm":
        return "PyTorch"
    return _LIBRARIES.get(getattr(chosen, "__module__", "").partition(".")[0], "unknown")
