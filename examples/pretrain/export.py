"""A dense Megatron checkpoint (the shape of dense_8b.sh and gpt_*.sh) as a Hugging Face model, RoPE or FoPE.

    python examples/pretrain/export.py CHECKPOINT OUT [--iteration N]

CHECKPOINT is a folder made by ``--save``, in ``torch_dist`` format, of any layout; OUT must not
exist. RoPE becomes a plain Llama. FoPE becomes Llama with ``modeling_fope_llama.py`` beside the weights,
which transformers loads with ``trust_remote_code=True``. Needs ``safetensors`` and memory for the weights of
the whole model, but no GPU and no Megatron ranks. Weights keep the dtype that they are stored in,
coefficients are float32. The tokenizer is not exported, nor are the ids of special tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fope import UserError
from megatron_fope.arguments.flags import fope_config_of_checkpoint
from megatron_fope.arguments.megatron import num_kv_heads_of
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer, open_checkpoint
from megatron_fope.common.command_line import OneLineParser, command, whole
from megatron_fope.common.staging import staging_folder
from megatron_fope.formula.geometry import Geometry, effective_coefficients
from megatron_fope.layers.anneal import is_annealed

MODELING = Path(__file__).with_name("modeling_fope_llama.py")

REQUIRED = {
    "normalization": ("--normalization", "RMSNorm"),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--add-bias-linear", False),
}
"""Megatron's arguments that Llama's shape needs, with flag and value."""

WITHOUT_PLACE = {
    "num_experts": "--num-experts",
    "multi_latent_attention": "--multi-latent-attention",
    "mtp_num_layers": "--mtp-num-layers",
    "is_hybrid_model": "--is-hybrid-model",
    "hybrid_layer_pattern": "--hybrid-layer-pattern",
    "experimental_attention_variant": "--experimental-attention-variant",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
    "spec": "--spec",
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "qk_l2_norm": "--qk-l2-norm",
    "attention_output_gate": "--attention-output-gate",
    "apply_residual_connection_post_layernorm": "--apply-residual-connection-post-layernorm",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "apply_layernorm_1p": "--apply-layernorm-1p",
    "activation_func_clamp_value": "--activation-func-clamp-value",
    "glu_linear_offset": "--glu-linear-offset",
    "window_size": "--window-size",
    "softmax_scale": "--softmax-scale",
    "use_mup": "--use-mup",
    "rotary_interleaved": "--rotary-interleaved",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
    "use_rope_scaling": "--use-rope-scaling",
    "no_rope_freq": "--no-rope-freq",
}
"""Arguments that change the model and that its Llama would lack."""

NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Weights of a layer that only change their name."""


def export(checkpoint: str | Path, out: str | Path, iteration: int | None = None) -> Path:
    """Write a Hugging Face folder.

    Args:
        checkpoint: folder made by ``--save``.
        out: the new folder; built beside its place and renamed when it is whole.
        iteration: None: the latest.

    Returns:
        ``out``.

    Raises:
        UserError: no such checkpoint, or one that is no Llama; ``out`` exists; safetensors is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the export needs safetensors; install it with: pip install safetensors") from None
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"OUT is {str(out)!r}, which exists; use a new folder")
    source = open_checkpoint(checkpoint, iteration, name="CHECKPOINT")
    config = describe(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(out) as staging:
            new = staging / out.name
            new.mkdir()
            save_file(dict(weights(source, config)), new / "model.safetensors", {"format": "pt"})
            if "auto_map" in config:
                shutil.copyfile(MODELING, new / MODELING.name)
            # Last: without it nothing loads.
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            new.rename(out)
    except OSError as error:
        raise UserError(f"OUT is {str(out)!r}: it cannot be written ({error})") from None
    return out


def describe(source: Checkpoint) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        UserError: naming what Llama has no place for.
    """
    args, where = source.args, f"CHECKPOINT is {str(source.folder)!r}"
    if source.metadata is None:
        raise UserError(f"{where}: its format is torch (legacy); allowed: torch_dist")
    for name, (flag, value) in REQUIRED.items():
        stored = getattr(args, name, None)
        if stored != value:
            raise UserError(f"{where}: it was trained with {flag} {stored}; Llama requires {value}")
    for name, flag in WITHOUT_PLACE.items():
        if getattr(args, name, None):
            raise UserError(
                f"{where}: it was trained with {flag} {getattr(args, name)}; use a model without it"
            )
    if getattr(args, "rotary_percent", 1.0) != 1.0:
        raise UserError(f"{where}: it was trained with --rotary-percent {args.rotary_percent}; allowed: 1.0")
    softmax = getattr(args, "softmax_type", "vanilla")
    if softmax != "vanilla":
        raise UserError(f"{where}: it was trained with --softmax-type {softmax}; allowed: vanilla")
    kind = source.position_embedding_type
    if kind not in ("rope", "fope"):
        raise UserError(f"{where}: its --position-embedding-type is {kind}; allowed: rope, fope")
    config = _llama(source)
    return config | _fope(source, config, where) if kind == "fope" else config


def weights(source: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors by their names in Hugging Face's Llama.

    Raises:
        UserError: a tensor is missing, or one is left that Llama has no place for.
    """
    where = f"CHECKPOINT is {str(source.folder)!r}"
    left = {name for name in source.tensors if not is_optimizer(name)}
    layers = config["num_hidden_layers"]

    def read(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{where}: it has no {name}, which Llama needs")
        left.remove(name)
        return source.read_tensor(name)

    def read_layers(name: str) -> Iterator[tuple[int, Tensor]]:
        stacked = f"decoder.layers.{name}"
        if stacked in left:
            yield from enumerate(read(stacked))
            return
        for layer in range(layers):
            yield layer, read(f"decoder.layers.{layer}.{name}")

    yield "model.embed_tokens.weight", read("embedding.word_embeddings.weight")
    yield "model.norm.weight", read("decoder.final_layernorm.weight")
    if config["tie_word_embeddings"]:
        left.discard("output_layer.weight")
    else:
        yield "lm_head.weight", read("output_layer.weight")
    for megatron, llama in NAMES.items():
        for layer, value in read_layers(megatron):
            yield f"model.layers.{layer}.{llama}", value.clone()
    for layer, value in read_layers("mlp.linear_fc1.weight"):
        gate, up = value.chunk(2)
        yield f"model.layers.{layer}.mlp.gate_proj.weight", gate.clone()
        yield f"model.layers.{layer}.mlp.up_proj.weight", up.clone()
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    for layer, value in read_layers("self_attention.linear_qkv.weight"):
        # Every KV head lies behind the query heads that it serves.
        grouped = value.view(groups, heads // groups + 2, config["head_dim"], -1)
        parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
        for name, part in parts.items():
            yield (
                f"model.layers.{layer}.self_attn.{name}_proj.weight",
                part.reshape(-1, value.size(-1)).clone(),
            )
    if "auto_map" in config:
        fope = fope_config_of_checkpoint(source.args, source.args)
        names = fope.coefficient_names
        columns = zip(*(read_layers(f"self_attention.fope.{name}") for name in names), strict=True)
        for entries in columns:
            stored = {name: value.float() for name, (_, value) in zip(names, entries, strict=True)}
            sin, cos = effective_coefficients(fope, stored)
            prefix = f"model.layers.{entries[0][0]}.self_attn"
            yield f"{prefix}.sin_coef", sin.clone()
            yield f"{prefix}.cos_coef", cos.clone()
    if left:
        raise UserError(f"{where}: Llama has no place for {', '.join(sorted(left)[:3])}")


def _llama(source: Checkpoint) -> dict[str, Any]:
    args = source.args
    embedding = source.tensors.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise UserError(f"CHECKPOINT is {str(source.folder)!r}: it has no embedding.word_embeddings.weight")
    epsilon = getattr(args, "layernorm_epsilon", None) or args.norm_epsilon
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        # Padded, as Megatron's own losses are: its softmax counts the rows of the padding, too.
        "vocab_size": embedding.size[0],
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": num_kv_heads_of(args),
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": epsilon,
        "rope_theta": float(args.rotary_base),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        # Llama's own defaults, 1 and 2, would end texts at somebody else's tokens.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": str(embedding.properties.dtype).removeprefix("torch."),
    }


def _fope(source: Checkpoint, config: dict[str, Any], where: str) -> dict[str, Any]:
    step = source.iteration if isinstance(source.iteration, int) else 0
    if not is_annealed(source.args, step):
        raise UserError(f"{where}: its start from RoPE is still being annealed; finish it first")
    fope = fope_config_of_checkpoint(source.args, source.args)
    geometry = Geometry(fope, config["head_dim"], config["num_key_value_heads"])
    pad_sin, pad_cos = fope.scaled_pad
    module = MODELING.stem
    return {
        "architectures": ["FopeLlamaForCausalLM"],
        "model_type": "fope_llama",
        "auto_map": {
            "AutoConfig": f"{module}.FopeLlamaConfig",
            "AutoModel": f"{module}.FopeLlamaModel",
            "AutoModelForCausalLM": f"{module}.FopeLlamaForCausalLM",
        },
        "fope_inv_freq": geometry.inv_freq.tolist(),
        "fope_series": geometry.d_out,
        "fope_heads": geometry.coefficient_shape[0],
        "fope_pad_sin": pad_sin,
        "fope_pad_cos": pad_cos,
        "fope_exact_angles": fope.exact_angles,
        "fope_learnable": fope.learnable,
    }


def main() -> None:
    """The command."""
    parser = OneLineParser(description="Export a dense Megatron checkpoint to Hugging Face.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder made by --save, torch_dist format")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--iteration", type=whole(0), metavar="N", help="default: the latest")
    with command("export.py"):
        arguments = parser.parse_args()
        torch.set_num_threads(1)
        print(export(arguments.checkpoint, arguments.out, arguments.iteration))


if __name__ == "__main__":
    main()
