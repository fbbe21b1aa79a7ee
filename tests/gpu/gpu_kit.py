"""What the GPU tests need, and why they are skipped where it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()

needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device is visible")
needs_transformer_engine = pytest.mark.skipif(
    not GPU or importlib.util.find_spec("transformer_engine") is None,
    reason="no CUDA device is visible" if not GPU else "transformer_engine is not installed; see docs/gpu.md",
)


FLASH_ATTENTION = ("flash-attn", "flash-attn-3", "flash-attn-4")
"""The distributions for which Transformer Engine looks; its own back ends are cuDNN and unfused attention."""


def has_flash_attention() -> bool:
    """Whether Transformer Engine can find FlashAttention."""
    installed = {
        found.metadata["Name"].lower().replace("_", "-") for found in importlib.metadata.distributions()
    }
    return not installed.isdisjoint(FLASH_ATTENTION)


needs_flash_attention = pytest.mark.skipif(
    not has_flash_attention(), reason="flash-attn is not installed; see docs/gpu.md"
)


def needs_capability(major: int, minor: int) -> pytest.MarkDecorator:
    """Skip on GPUs before a compute capability."""
    too_old = GPU and torch.cuda.get_device_capability() < (major, minor)
    return pytest.mark.skipif(
        not GPU or too_old,
        reason=f"needs compute capability {major}.{minor}" if too_old else "no CUDA device is visible",
    )


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skip where there are fewer."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")
