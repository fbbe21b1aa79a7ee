"""The layout in which LMDeploy and XTuner keep FoPE models.

``config.json`` is a plain model's, with three more keys in ``rope_scaling``, and all layers share one pair of
float32 matrices ``[KV heads, D_in, D_in]``, ``model.rotary_emb.sin_coef`` and ``cos_coef``. Source:
InternLM/lmdeploy ``pytorch/nn/rotary_embedding.py``, InternLM/xtuner ``v1/module/rope/rope.py``.
"""

from __future__ import annotations

from typing import Any

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.formula.geometry import Geometry

PREFIX = "model.rotary_emb."
"""In front of ``sin_coef`` and ``cos_coef``."""

KEYS = ("fope_sep_head", "fope_init_factor", "num_inv_freq")
"""Any of them in ``rope_scaling`` makes a model FoPE's for XTuner; LMDeploy looks for the first only."""

FAMILIES = ("llama", "qwen3", "qwen3_moe")
"""``model_type`` of what is exported."""

XTUNER_TYPE = "qwen3_moe_fope"
"""``model_type`` of XTuner's own folders, whose weights are Qwen3-MoE's."""

_REQUIRED = {
    "square": True,
    "shared_layers": True,
    "separate_heads": True,
    "separate_basis": True,
    "normalize": False,
    "drop_clipped": True,
    "basis_dim": 0,
    "pad_value": "1,1",
    "scaling": "none",
    "attention_scaling": 1.0,
    "exact_angles": False,
}
"""Settings that the engines cannot be told."""


def rope_scaling(fope: FoPEConfig, head_dim: int, model_type: str, where: str) -> dict[str, Any]:
    """``rope_scaling`` of a checkpoint.

    Args:
        fope: its settings.
        head_dim: channels of a head.
        model_type: its family.
        where: start of messages.

    Raises:
        UserError: naming the setting that the engines have no place for.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: its family is {model_type}; --format engine requires one of {', '.join(FAMILIES)}"
        )
    for name, value in _REQUIRED.items():
        if (stored := getattr(fope, name)) != value:
            raise UserError(
                f"{where}: it was trained with {flag(name)} {stored}; --format engine requires {value}, as "
                "LMDeploy and XTuner compute nothing else; use --format hf"
            )
    return {
        "rope_type": "default",
        "fope_sep_head": True,
        "fope_init_factor": fope.gain,
        # Always: without it engines count the frequencies anew, from max_position_embeddings.
        "num_inv_freq": Geometry(fope, head_dim).d_in,
    }


def is_engine(rope: dict[str, Any]) -> bool:
    """Whether ``rope_scaling`` or ``rope_parameters`` of a ``config.json`` is that of a FoPE model."""
    return any(rope.get(key) is not None for key in KEYS)


def fope_of(
    rope: dict[str, Any], rotary_base: float, max_length: int, train_length: int | None, where: str
) -> FoPEConfig:
    """FoPE's settings of an engine's model.

    Args:
        rope: its ``rope_scaling`` or ``rope_parameters``.
        rotary_base: of the frequencies.
        max_length: ``max_position_embeddings``, tokens.
        train_length: as given by the user; None: not given. Only where ``num_inv_freq`` is null do the
            engines count the frequencies from ``max_length``, which then is the train length.
        where: start of messages.

    Raises:
        UserError: frequencies are scaled, a value is not allowed, or the train length is not known.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: its rope_type is {kind!r} beside FoPE's keys; requires default")
    count, gain, separate = (rope.get(key) for key in ("num_inv_freq", "fope_init_factor", "fope_sep_head"))
    kinds = (
        (count, int, "a whole number"),
        (gain, int | float, "a number"),
        (separate, bool, "true or false"),
    )
    for value, kind, allowed in kinds:
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f"{where}: its rope_scaling has {value!r} where {allowed} is required")
    if train_length is None and count is not None:
        raise UserError(
            f"{where}: its config.json does not tell the length that it was trained with (num_inv_freq is "
            f"{count}, max_position_embeddings {max_length}); give --train-length"
        )
    if train_length not in (None, max_length) and count is None:
        raise UserError(
            f"{where}: its frequencies follow from its max_position_embeddings, {max_length}; --train-length "
            f"is {train_length}; leave it out"
        )
    try:
        return FoPEConfig.from_profile(
            "intern-s1-pro",
            train_length=train_length or max_length,
            rotary_base=rotary_base,
            num_inv_freq=count,
            gain=gain,
            separate_heads=bool(separate),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
