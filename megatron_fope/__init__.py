"""FoPE (Fourier Position Embedding, arXiv 2412.17739) for Megatron-Core.

Importing this package patches nothing and imports neither Megatron nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "FoPEConfig": "config",
    "FoPESelfAttention": "attention",
    "FourierEmbedding": "embedding",
    "LayerReport": "report",
    "UserError": "errors",
    "add_fope_arguments": "arguments",
    "assert_fope_active": "report",
    "describe": "report",
    "fope_config_from_args": "arguments",
    "is_registered": "registration",
    "register": "registration",
    "unregister": "registration",
    "with_fope": "spec",
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
    from megatron_fope.arguments import add_fope_arguments, fope_config_from_args
    from megatron_fope.attention import FoPESelfAttention
    from megatron_fope.config import FoPEConfig
    from megatron_fope.embedding import FourierEmbedding
    from megatron_fope.errors import UserError
    from megatron_fope.registration import is_registered, register, unregister
    from megatron_fope.report import LayerReport, assert_fope_active, describe
    from megatron_fope.spec import with_fope


def __getattr__(name: str) -> object:
    """Import a public name on first use: a host checkout must be able to come first on ``sys.path``."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megatron_fope' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_fope.{_EXPORTS[name]}"), name)
