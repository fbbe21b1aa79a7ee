"""``config.json`` of a Megatron checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fope.arguments.flags import fope_config_of_checkpoint
from megatron_fope.arguments.megatron import num_kv_heads_of
from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.layers.anneal import is_annealed
from megatron_fope.tools.huggingface import engine
from megatron_fope.tools.huggingface.families import FAMILIES, Family, Shape

MODELING = "modeling_fope"
"""The file that travels with a FoPE model's weights, without ``.py``."""

_AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}

_REQUIRED = {
    "normalization": ("--normalization", "RMSNorm"),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--add-bias-linear", False),
    "rotary_percent": ("--rotary-percent", 1.0),
    "softmax_type": ("--softmax-type", "vanilla"),
    "moe_layer_freq": ("--moe-layer-freq", 1),
    "moe_router_score_function": ("--moe-router-score-function", "softmax"),
}
"""Megatron's arguments that every family needs, with flag and value; what is not stored is the default."""

_MUST_BE_STORED = ("normalization", "swiglu", "add_bias_linear")

_WITHOUT_PLACE = (
    "multi_latent_attention", "mtp_num_layers", "is_hybrid_model", "hybrid_layer_pattern",
    "experimental_attention_variant", "heterogeneous_layers_config_path", "spec", "qk_l2_norm",
    "attention_output_gate", "apply_residual_connection_post_layernorm", "layernorm_zero_centered_gamma",
    "apply_layernorm_1p", "activation_func_clamp_value", "glu_linear_offset", "window_size", "softmax_scale",
    "use_mup", "rotary_interleaved", "no_rope_freq", "moe_shared_expert_intermediate_size",
    "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor", "moe_router_num_groups",
    "moe_expert_capacity_factor", "moe_apply_probs_on_input", "moe_latent_size",
)  # fmt: skip
"""Arguments that change the model and that no family has."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""What ``--use-rope-scaling`` computes in every supported Megatron, whatever factor it is given."""
LLAMA3_LENGTH = 8192


def family_of(args: Any, where: str) -> Family:
    """The family of a checkpoint's model.

    Args:
        args: Megatron's arguments as stored.
        where: start of messages.

    Raises:
        UserError: naming what no family has.
    """
    for name, (flag, value) in _REQUIRED.items():
        stored = getattr(args, name, None if name in _MUST_BE_STORED else value)
        if stored != value and not (name == "moe_layer_freq" and not getattr(args, "num_experts", None)):
            raise UserError(f"{where}: it was trained with {flag} {stored}; requires {value}")
    for name in _WITHOUT_PLACE:
        if getattr(args, name, None):
            flag = "--apply-layernorm-1p" if "zero_centered" in name else f"--{name.replace('_', '-')}"
            raise UserError(f"{where}: it was trained with {flag} {getattr(args, name)}; use a model without")
    kind = (
        bool(getattr(args, "add_qkv_bias", False)),
        bool(getattr(args, "qk_layernorm", False)),
        bool(getattr(args, "num_experts", None)),
    )
    for family in FAMILIES:
        if (family.qkv_bias, family.qk_norm, family.experts is not None) == kind:
            break
    else:
        flags = [
            flag
            for flag, given in zip(("--add-qkv-bias", "--qk-layernorm", "--num-experts"), kind, strict=True)
            if given
        ]
        raise UserError(f"{where}: no family of transformers has {' and '.join(flags)} together")
    if family.model_type == "mixtral" and getattr(args, "moe_router_pre_softmax", False):
        raise UserError(
            f"{where}: it was trained with --moe-router-pre-softmax; Mixtral divides by the sum of the "
            "chosen experts' weights"
        )
    return family


def shape_of_args(args: Any, fope: FoPEConfig | None) -> Shape:
    """The sizes that the map of weights needs, from Megatron's arguments and FoPE's settings."""
    coefficients: tuple[int, ...] = ()
    kv_heads = num_kv_heads_of(args) or args.num_attention_heads
    if fope is not None:
        coefficients = Geometry(fope, args.kv_channels, kv_heads).coefficient_shape
    experts = getattr(args, "num_experts", None) or 0
    ffn = (getattr(args, "moe_ffn_hidden_size", None) if experts else None) or args.ffn_hidden_size
    return Shape(
        num_layers=args.num_layers,
        num_heads=args.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=args.kv_channels,
        hidden_size=args.hidden_size,
        ffn_size=ffn,
        num_experts=experts,
        coefficients=coefficients,
    )


def config_of(
    source: Checkpoint, vocab_size: int, max_length: int | None, layout: str, where: str
) -> dict[str, Any]:
    """``config.json`` of a checkpoint, without ids of special tokens and without the dtype.

    Args:
        source: the checkpoint.
        vocab_size: rows of the embedding that are kept.
        max_length: ``max_position_embeddings`` in tokens; None: the length that the model was trained with.
        layout: one of :data:`megatron_fope.tools.huggingface.FORMATS`.
        where: start of messages.

    Raises:
        UserError: a model that no family can be, one that the layout has no place for, or a FoPE model that
            is still being annealed.
    """
    args = source.args
    kind = source.position_embedding_type
    if kind not in ("rope", "fope"):
        raise UserError(f"{where}: its --position-embedding-type is {kind}; allowed: rope, fope")
    if layout == "engine" and kind == "rope":
        raise UserError(
            f"{where}: its --position-embedding-type is rope; --format engine requires fope; use --format hf"
        )
    family, shape = family_of(args, where), shape_of_args(args, None)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_length or source.train_length,
        "rms_norm_eps": getattr(args, "layernorm_epsilon", None) or args.norm_epsilon,
        "rope_theta": float(args.rotary_base),
        "attention_dropout": 0.0,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
    }
    if family.model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if family.model_type in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if family.experts is not None:
        config |= _experts(args, family, shape.ffn_size)
    if kind == "rope":
        return config | _rope_scaling(args)
    fope = fope_settings(source, where)
    if layout == "engine":
        scaling = engine.rope_scaling(fope, shape.head_dim, family.model_type, where)
        return config | {"rope_scaling": scaling}
    return config | _fope(fope, config, family)


def _experts(args: Any, family: Family, size: int) -> dict[str, Any]:
    common = {
        "num_experts_per_tok": args.moe_router_topk,
        "router_aux_loss_coef": _first(getattr(args, "moe_aux_loss_coeff", 0.0)),
    }
    if family.model_type == "mixtral":
        return common | {"intermediate_size": size, "num_local_experts": args.num_experts}
    return common | {
        "moe_intermediate_size": size,
        "num_experts": args.num_experts,
        "norm_topk_prob": not getattr(args, "moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _rope_scaling(args: Any) -> dict[str, Any]:
    if getattr(args, "use_rope_scaling", False):
        length = {"original_max_position_embeddings": LLAMA3_LENGTH}
        return {"rope_scaling": {"rope_type": "llama3", **LLAMA3, **length}}
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor and factor != 1:
        return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}}
    return {}


def fope_settings(source: Checkpoint, where: str) -> FoPEConfig:
    """FoPE's settings of a checkpoint, without the way that it came from RoPE.

    Raises:
        UserError: it is still being annealed, or a setting is not allowed.
    """
    step = source.iteration if isinstance(source.iteration, int) else 0
    if not is_annealed(source.args, step):
        raise UserError(f"{where}: its start from RoPE is still being annealed; finish it first")
    return fope_config_of_checkpoint(source.args, source.args).arrived


def _fope(fope: FoPEConfig, config: dict[str, Any], family: Family) -> dict[str, Any]:
    geometry = Geometry(fope, config["head_dim"], config["num_key_value_heads"])
    name = f"Fope{family.class_name}"
    pad_sin, pad_cos = fope.scaled_pad
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": f"fope_{family.model_type}",
        "auto_map": {auto: f"{MODELING}.{name}{suffix}" for auto, suffix in _AUTO_CLASSES.items()},
        "fope": {
            "inv_freq": geometry.inv_freq.tolist(),
            "num_series": geometry.d_out,
            "num_heads": geometry.coefficient_shape[0],
            "pad_sin": pad_sin,
            "pad_cos": pad_cos,
            "attention_scaling": fope.attention_scaling,
            "normalize": fope.normalize,
            "separate_basis": fope.separate_basis,
            "exact_angles": fope.exact_angles,
            "learnable": fope.learnable,
            "settings": dataclasses.asdict(fope),
        },
    }
