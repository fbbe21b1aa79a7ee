"""Models between Megatron's checkpoints and Hugging Face's folders, in both directions."""

from __future__ import annotations

FORMATS = ("hf", "engine")
"""Layouts of an exported FoPE model: for transformers and what is built on it, or for LMDeploy and XTuner."""

DTYPES = ("float32", "bfloat16", "float16")
"""What weights can be exported in."""

SHARD_SIZE = "5GB"
"""Of the largest exported file."""


def register() -> None:
    """Make transformers' auto classes load FoPE folders by this file, without ``trust_remote_code``.

    Raises:
        ImportError: transformers is missing or older than 5.1.
    """
    from megatron_fope.tools.huggingface import modeling_fope  # noqa: F401
