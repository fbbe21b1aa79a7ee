"""What a ``config.json``, of which nothing is trusted, means in Megatron's flags and FoPE's settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

from megatron_fope.arguments.flags import FIELDS, FOPE
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import WIDEST, FoPEConfig, flag
from megatron_fope.tools.huggingface import engine
from megatron_fope.tools.huggingface.families import ARCHITECTURES, Family
from megatron_fope.tools.huggingface.settings import LLAMA3, LLAMA3_LENGTH

_PLAIN_ROPE = ("default", "linear", "llama3")

# Beyond these a number in config.json is a slip or worse, and would cost memory before it meets a weight.
_LARGEST_SIZE = 2**24
_LONGEST = 2**31 - 1
_MOST_HEADS = _MOST_LAYERS = _MOST_EXPERTS = 2**16


def family_of_config(config: dict[str, Any], where: str) -> tuple[Family, str]:
    """The family that a ``config.json`` names, and the position embedding: "rope", or a layout of FoPE, one
    of :data:`megatron_fope.tools.huggingface.FORMATS`.

    Raises:
        UserError: another architecture, or a setting of it that Megatron's GPT has no place for.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    plain = (name or "").removeprefix("Fope")
    _check_router(config, plain, where)
    if config.get("model_type") == engine.XTUNER_TYPE:
        plain = "Qwen3MoeForCausalLM"
    family = ARCHITECTURES.get(plain)
    if family is None:
        raise UserError(f"{where}: its architecture is {name}; allowed: {', '.join(ARCHITECTURES)}")
    rope = rope_parameters(config, where)
    layout = "engine" if engine.is_engine(rope) else "hf" if (name or "").startswith("Fope") else "rope"
    if "auto_map" in config and layout == "rope":
        raise UserError(f"{where}: it comes with code of its own, which is never run; use a model without")
    wrong = {
        "hidden_act": ("silu", "silu"),
        "mlp_bias": (False, False),
        "quantization_config": (None, None),
        "use_sliding_window": (False, False),
        "decoder_sparse_step": (1, 1),
        "mlp_only_layers": ([], []),
        "partial_rotary_factor": (1.0, 1.0),
        "attention_bias": (family.qkv_bias, False),
    }
    for key, (default, allowed) in wrong.items():
        value = config.get(key, default)
        if value not in (allowed, None) and not (key == "attention_bias" and family.qkv_bias):
            raise UserError(f"{where}: its {key} is {value}; requires {allowed}")
    for key in ("partial_rotary_factor", "mrope_section"):
        if rope.get(key) not in (1.0, None):
            raise UserError(f"{where}: its {key} is {rope[key]}; use a model without")
    kinds = config.get("layer_types") or []
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(f"{where}: its layer_types have {other[0]}; requires full_attention")
    length = whole(config, "max_position_embeddings", where, most=_LONGEST)
    window = config.get("sliding_window")
    is_used = window is not None and config.get("use_sliding_window", True)
    if is_used and whole(config, "sliding_window", where, most=_LONGEST) < length:
        raise UserError(f"{where}: its sliding_window is {window}; requires none below {length} tokens")
    return family, layout


def _check_router(config: dict[str, Any], name: str, where: str) -> None:
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    groups = next((part["router_n_groups"] for part in parts if "router_n_groups" in part), None)
    if "InternS1Pro" in name or groups not in (None, -1, 0, 1):
        raise UserError(
            f"{where}: its router takes one expert of each of {groups or 8} groups (Intern-S1-Pro), which "
            "Megatron's router cannot"
        )


def flags_of(config: dict[str, Any], family: Family, where: str) -> list[str]:
    """Megatron's flags of the model that a ``config.json`` describes, without those of positions and lengths.

    Raises:
        UserError: a key is missing or of the wrong kind.
    """
    heads = whole(config, "num_attention_heads", where, most=_MOST_HEADS)
    groups = whole(config, "num_key_value_heads", where, heads, most=_MOST_HEADS)
    if heads % groups:
        raise UserError(
            f"{where}: its num_attention_heads is {heads}; requires a multiple of its num_key_value_heads, "
            f"{groups}"
        )
    hidden = whole(config, "hidden_size", where)
    channels = whole(config, "head_dim", where, hidden // heads, most=WIDEST)
    if channels % 2:
        raise UserError(f"{where}: its head_dim is {channels}; requires an even number")
    values: dict[str, Any] = {
        "num-layers": whole(config, "num_hidden_layers", where, most=_MOST_LAYERS),
        "hidden-size": hidden,
        "ffn-hidden-size": whole(config, "intermediate_size", where),
        "num-attention-heads": heads,
        "kv-channels": channels,
        "normalization": "RMSNorm",
        "norm-epsilon": number(config, "rms_norm_eps", where, 1e-6),
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    flags = ["--swiglu", "--disable-bias-linear"]
    if groups != heads:
        flags.append("--group-query-attention")
        values["num-query-groups"] = groups
    if family.qkv_bias:
        flags.append("--add-qkv-bias")
    if family.qk_norm:
        flags.append("--qk-layernorm")
    if not _truth(config, "tie_word_embeddings", where):
        flags.append("--untie-embeddings-and-output-weights")
    if family.experts is not None:
        values |= _expert_flags(config, family, where)
        if family.model_type == "qwen3_moe" and not _truth(config, "norm_topk_prob", where):
            flags.append("--moe-router-pre-softmax")
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + flags


def _expert_flags(config: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    mixtral = family.model_type == "mixtral"
    experts = whole(config, "num_local_experts", where, config.get("num_experts"), most=_MOST_EXPERTS)
    return {
        "num-experts": experts,
        "moe-router-topk": whole(config, "num_experts_per_tok", where, most=experts),
        "moe-ffn-hidden-size": whole(
            config, "intermediate_size" if mixtral else "moe_intermediate_size", where
        ),
        "moe-aux-loss-coeff": number(config, "router_aux_loss_coef", where, 0.0),
        "moe-router-load-balancing-type": "aux_loss",
    }


def length_flags(config: dict[str, Any], fope: FoPEConfig | None, where: str) -> list[str]:
    """Megatron's flags of lengths in tokens; a FoPE model goes on at the length that it was trained with."""
    longest = whole(config, "max_position_embeddings", where, most=_LONGEST)
    trained = fope.train_length if fope else longest
    return ["--seq-length", str(trained), "--max-position-embeddings", str(max(trained, longest))]


def rope_flags(config: dict[str, Any], where: str) -> list[str]:
    """Megatron's flags of a RoPE model's frequencies.

    Raises:
        UserError: a scaling that Megatron's RoPE cannot compute.
    """
    rope = rope_parameters(config, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    flags = ["--position-embedding-type", "rope", *base_flags(base_of(config, where))]
    if kind == "linear" and (factor := number(rope, "factor", where)).is_integer():
        return [*flags, "--rotary-seq-len-interpolation-factor", str(int(factor))]
    if kind == "llama3":
        asked = {name: rope.get(name) for name in LLAMA3}
        if asked == LLAMA3 and rope.get("original_max_position_embeddings") == LLAMA3_LENGTH:
            return [*flags, "--use-rope-scaling"]
        raise UserError(
            f"{where}: its llama3 scaling is {asked}; Megatron computes {LLAMA3} of {LLAMA3_LENGTH} only"
        )
    if kind == "linear":
        raise UserError(
            f"{where}: its factor is {rope['factor']}; Megatron's linear scaling takes whole numbers"
        )
    if kind != "default":
        raise UserError(f"{where}: its rope_type is {kind}; allowed: {', '.join(_PLAIN_ROPE)}")
    return flags


def rope_parameters(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What newer releases of transformers call ``rope_parameters`` and older ones ``rope_scaling``.

    Raises:
        UserError: it is no object.
    """
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise UserError(f"{where}: its {key} is {value!r}; requires an object")
        if value:
            return value
    return {}


def base_of(config: dict[str, Any], where: str) -> float:
    """The base of the frequencies.

    The base beside the other parameters of RoPE counts first, as in transformers and XTuner: with it, a
    ``rope_theta`` of its own may be no more than the default.
    """
    base = number(rope_parameters(config, where), "rope_theta", where, 0.0)
    base = base or number(config, "rope_theta", where, 10000.0)
    if base <= 1:
        raise UserError(f"{where}: its rope_theta is {base:g}; allowed: numbers > 1")
    return base


def base_flags(base: float) -> list[str]:
    """The base as Megatron's flag takes it: a whole number where it is one."""
    return ["--rotary-base", str(int(base)) if base.is_integer() else str(base)]


def fope_of_engine(config: dict[str, Any], train_length: int | None, where: str) -> FoPEConfig:
    """FoPE's settings in a folder of LMDeploy's and XTuner's layout; see :func:`engine.fope_of`."""
    longest = whole(config, "max_position_embeddings", where, most=_LONGEST)
    rope = rope_parameters(config, where)
    return engine.fope_of(rope, base_of(config, where), longest, train_length, where)


def fope_of(config: dict[str, Any], where: str) -> FoPEConfig:
    """FoPE's settings in a folder that we wrote.

    Raises:
        UserError: they are missing or not what they should be.
    """
    stored = config.get("fope")
    settings = stored.get("settings") if isinstance(stored, dict) else None
    kinds = get_type_hints(FoPEConfig)
    fields = {field.name: kinds[field.name] for field in dataclasses.fields(FoPEConfig)}
    if not isinstance(settings, dict) or not settings.keys() <= fields.keys():
        raise UserError(f"{where}: its config.json has no settings of FoPE that this version knows")
    if missing := fields.keys() - settings.keys():
        raise UserError(
            f"{where}: FoPE's settings in its config.json are not whole ({min(missing)} is missing)"
        )
    for name, kind in fields.items():
        value = settings[name]
        allowed = float | int if kind is float else kind
        is_bool = isinstance(value, bool)
        if not isinstance(value, allowed) or is_bool != (kind is bool) or _is_huge(value):
            raise UserError(f"{where}: FoPE's {name} in its config.json is {value!r}; requires another value")
    try:
        # Only models whose start from RoPE is over are exported; here it would begin anew.
        return FoPEConfig.from_profile(**settings | dict.fromkeys(FoPEConfig.START))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def fope_flags(fope: FoPEConfig) -> list[str]:
    """Megatron's flags of FoPE's settings: the profile, and what differs from it."""
    profile = FoPEConfig.from_profile(fope.profile, train_length=fope.train_length)
    words = ["--position-embedding-type", FOPE, *base_flags(fope.rotary_base)]
    words += [flag("profile"), fope.profile, flag("train_length"), str(fope.train_length)]
    for field in FIELDS:
        value = getattr(fope, field.name)
        if value == getattr(profile, field.name) or field.name in FoPEConfig.RUN_ONLY:
            continue
        name = flag(field.name)
        words += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    return words


# Values -------------------------------------------------------------------------------------------


def whole(
    config: dict[str, Any], key: str, where: str, default: int | None = None, *, most: int = _LARGEST_SIZE
) -> int:
    """A size in ``config.json``.

    Raises:
        UserError: it is missing without a default, or no whole number from 1 to ``most``.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UserError(f"{where}: its {key} is {_shown(value)}; allowed: whole numbers from 1 to {most}")
    return value


def number(config: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A finite number >= 0 in ``config.json``.

    Raises:
        UserError: it is missing without a default, or something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or _is_huge(value):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: its {key} is {_shown(config.get(key))}; allowed: finite numbers >= 0")
    return float(value)


def _truth(config: dict[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: its {key} is {_shown(value)}; allowed: true, false")
    return value


def _is_huge(value: Any) -> bool:
    """Whether a whole number fits no tensor or file that it could describe."""
    return isinstance(value, int) and abs(value) >= 2**63


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
