"""FoPE (Fourier Position Embedding, arXiv 2412.17739) for Megatron-Core.

Importing this package patches nothing and imports neither Megatron nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "FoPEConfig": "formula.config",
    "FoPESelfAttention": "layers.attention",
    "FourierEmbedding": "layers.embedding",
    "LayerReport": "layers.report",
    "UserError": "common.errors",
    "add_fope_arguments": "arguments.flags",
    "assert_fope_active": "layers.report",
    "describe": "layers.report",
    "fope_config_from_args": "arguments.flags",
    "is_registered": "training.registration",
    "register": "training.registration",
    "unregister": "training.registration",
    "with_fope": "layers.spec",
}

__all__ = [
    "FoPEConfig",
    "FoPESelfAttention",
    "FourierEmbedding",
    "LayerReport",
    "UserError",
    "__version__",
    "add_fope_arguments",
    "assert_fope_active",
    "describe",
    "fope_config_from_args",
    "is_registered",
    "register",
    "unregister",
    "with_fope",
]

if TYPE_CHECKING:
    from megatron_fope.arguments.flags import add_fope_arguments, fope_config_from_args
    from megatron_fope.common.errors import UserError
    from megatron_fope.formula.config import FoPEConfig
    from megatron_fope.layers.attention import FoPESelfAttention
    from megatron_fope.layers.embedding import FourierEmbedding
    from megatron_fope.layers.report import LayerReport, assert_fope_active, describe
    from megatron_fope.layers.spec import with_fope
    from megatron_fope.training.registration import is_registered, register, unregister


def __getattr__(name: str) -> object:
    """Import a public name on first use: a host checkout must be able to come first on ``sys.path``."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megatron_fope' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_fope.{_EXPORTS[name]}"), name)
