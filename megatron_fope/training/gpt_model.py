"""The layers of a GPT model from Megatron's arguments, for releases whose wheel has no builder."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.transformer.spec_utils import import_module
from megatron.training.arguments import core_transformer_config_from_args

from megatron_fope import compat


def transformer_config(args: Any) -> Any:
    """Megatron's ``TransformerConfig`` for these arguments (or the YAML file they name)."""
    if args.yaml_cfg is not None:
        from megatron.training.yaml_arguments import core_transformer_config_from_yaml

        return core_transformer_config_from_yaml(args, "language_model")
    return core_transformer_config_from_args(args)


def uniform_layer_spec(config: Any, *, num_experts: int | None, transformer_impl: str | None = None) -> Any:
    """The spec of one decoder layer, when all layers are alike.

    Args:
        config: ``TransformerConfig``.
        num_experts: None for a dense layer.
        transformer_impl: as in ``--transformer-impl``; None takes the config's.
    """
    transformer_impl = transformer_impl or config.transformer_impl
    if transformer_impl == "inference_optimized":
        return specs.get_gpt_layer_with_inference_spec(
            config.qk_layernorm, config.multi_latent_attention, qk_l2_norm=config.qk_l2_norm
        )
    if transformer_impl == "transformer_engine":
        build = specs.get_gpt_layer_with_transformer_engine_spec
    else:
        build = specs.get_gpt_layer_local_spec
    options: dict[str, Any] = {"num_experts": num_experts}
    names = (
        "moe_grouped_gemm",
        "qk_layernorm",
        "multi_latent_attention",
        "experimental_attention_variant",
        "normalization",
        "qk_l2_norm",
        "use_kitchen",
        "use_kitchen_attention",
        "kitchen_attention_backend",
        "use_te_activation_func",
        "mla_down_proj_fusion",
        "use_grouped_gemm_for_dense_mlp",
    )
    options |= compat.known_attributes(config, names)
    if build is specs.get_gpt_layer_local_spec:
        # The local layer has no L2 norm of queries and keys; upstream leaves it at its default too.
        del options["qk_l2_norm"]
    return build(**compat.known_parameters(build, options))


def _decoder_spec(args: Any, config: Any, vp_stage: int | None) -> Any:
    """The spec of the decoder: one layer's, or a block's when layers differ."""
    use_te = config.transformer_impl == "transformer_engine"
    if args.spec is not None:
        return import_module(args.spec)
    if args.experimental_attention_variant is not None:
        from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants

        return variants.get_transformer_block_with_experimental_attention_variant_spec(
            config=config, vp_stage=vp_stage
        )
    if args.num_experts:
        return specs.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_te,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    if args.heterogeneous_layers_config_path is not None:
        from megatron.core.models.gpt.heterogeneous import heterogeneous_layer_specs

        return heterogeneous_layer_specs.get_gpt_heterogeneous_layer_spec(config, use_te)
    return uniform_layer_spec(config, num_experts=config.num_moe_experts)


def _mtp_spec(args: Any, config: Any, decoder_spec: Any, vp_stage: int | None) -> Any:
    """The spec of the multi-token-prediction block, which repeats the last decoder layer."""
    if args.mtp_num_layers is None:
        return None
    use_te = config.transformer_impl == "transformer_engine"
    if getattr(decoder_spec, "layer_specs", None) == []:
        # A pipeline stage may hold the prediction block and no decoder layer at all.
        layer_spec = uniform_layer_spec(config, num_experts=config.num_moe_experts)
    else:
        layer_spec = specs.get_gpt_decoder_layer_specs(
            config,
            use_transformer_engine=use_te,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )[-1]
    return specs.get_gpt_mtp_block_spec(config, layer_spec, use_transformer_engine=use_te, vp_stage=vp_stage)


def layer_specs(args: Any, config: Any, vp_stage: int | None) -> dict[str, Any]:
    """The specs that ``GPTModel`` takes, by its arguments."""
    decoder_spec = _decoder_spec(args, config, vp_stage)
    return {
        "transformer_layer_spec": decoder_spec,
        "mtp_block_spec": _mtp_spec(args, config, decoder_spec, vp_stage),
    }
