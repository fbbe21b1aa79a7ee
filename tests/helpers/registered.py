"""What registration replaces in Megatron, for tests that run on a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_fope import unregister


def symbols() -> dict[str, Any]:
    """Everything that registration may replace."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training import arguments, checkpointing, initialize

    found = {
        f"{owner.__name__}.{name}": vars(owner).get(name)
        for owner, name in [
            (arguments, "add_megatron_arguments"),
            (arguments, "validate_args"),
            (arguments, "_print_args"),
            (initialize, "validate_args"),  # Megatron 0.17
            (checkpointing, "_load_base_checkpoint"),
            (checkpointing, "load_args_from_checkpoint"),
            (initialize, "load_args_from_checkpoint"),  # Megatron 0.17
            (GPTModel, "__init__"),
            (hybrid_model(), "__init__"),
        ]
    }
    return {name: value for name, value in found.items() if value is not None}


def hybrid_model() -> type:
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    return HybridModel


def changed(before: dict[str, Any]) -> list[str]:
    """Names whose object is no longer the same one."""
    now = symbols()
    assert now.keys() == before.keys()
    return [name for name in before if now[name] is not before[name]]


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Take FoPE off Megatron afterwards; nothing may be left behind."""
    before = symbols()
    yield
    unregister()
    assert changed(before) == []
