"""Arguments and fields that only some Megatron releases have."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any


def known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that the dataclass ``cls`` of this release has a field for.

    ``GPTDatasetConfig.inter_document_masking`` exists from 0.19 on.
    """
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    return {name: value for name, value in values.items() if name in names}


def known_parameters(function: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that ``function`` of this release takes.

    ``get_gpt_layer_with_transformer_engine_spec`` takes ``use_grouped_gemm_for_dense_mlp`` from 0.18 on.
    """
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


def known_attributes(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named settings that this release's ``config`` has, with their values.

    ``TransformerConfig.use_grouped_gemm_for_dense_mlp`` exists from 0.18 on.
    """
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
