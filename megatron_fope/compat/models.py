"""Model classes, their builders and their layers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from types import SimpleNamespace
from typing import Any


def model_classes() -> list[tuple[type, tuple[str, ...]]]:
    """Model classes that take a position embedding type, with the names of their layer-spec arguments.

    0.17 calls the attention/Mamba hybrid ``MambaModel``; from 0.18 on it is ``HybridModel``, of which
    ``MambaModel`` is a subclass.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    gpt = (GPTModel, ("transformer_layer_spec", "mtp_block_spec"))
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel

        return [gpt, (MambaModel, ("mamba_stack_spec",))]
    return [gpt, (HybridModel, ("hybrid_stack_spec",))]


def has_mtp_layers(config: Any, vp_stage: int | None) -> bool:
    """Whether multi-token-prediction layers live on this pipeline stage.

    0.17 takes the config, 0.18 and later its two fields.
    """
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    if "config" in inspect.signature(mtp_on_this_rank).parameters:
        return mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def build_model(description: Any, pg_collection: Any, **chunk: Any) -> Any:
    """Build a model chunk with Megatron's own builder (0.19 and later).

    Args:
        description: as from :func:`builder_config`.
        pg_collection: process groups.
        chunk: ``pre_process``, ``post_process`` and ``vp_stage``.
    """
    return description.get_builder_cls()(description).build_model(pg_collection, **chunk)


def builder_config(args: Any, config: Any = None, *, hybrid: bool = False) -> Any | None:
    """Megatron's own description of a GPT or hybrid model, which its builder turns into the model.

    None before 0.19: 0.17 has none, 0.18 has that of a hybrid model, but trains from a model provider.
    """
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "gpt_config_from_args"):
        return None
    describe = argument_utils.hybrid_config_from_args if hybrid else argument_utils.gpt_config_from_args
    return describe(args, config)


def rope_arguments(args: Any, *, hybrid: bool) -> dict[str, Any]:
    """What Megatron's builder makes of the arguments about RoPE, by the names of the model's constructor.

    Up to 0.18 the builders live in the root scripts and pass the same few on.

    Args:
        args: Megatron's arguments; those that are missing must read as None.
        hybrid: for a hybrid model.
    """
    part = SimpleNamespace(transformer_impl="local")  # all of the layers' configuration that is looked at
    args = copy.copy(args)
    args.spec = None
    description = builder_config(args, part, hybrid=hybrid)
    if description is not None:
        return vars(description)
    passed = {"rotary_percent": args.rotary_percent, "rotary_base": args.rotary_base}
    return passed if hybrid else passed | {"rope_scaling": args.use_rope_scaling}


def yarn_settings(args: Any) -> dict[str, Any] | None:
    """Arguments of ``YarnRotaryEmbedding`` in a model without multi-latent attention.

    None up to 0.18, which offer the type but never fill in the settings that the model asks for.

    Args:
        args: arguments with ``position_embedding_type`` "yarn".
    """
    from megatron.training import argument_utils

    fill = getattr(argument_utils, "_apply_yarn_config_from_args", None)
    if fill is None:
        return None
    config = SimpleNamespace()
    fill(config, args)
    values = {name.removeprefix("yarn_"): value for name, value in vars(config).items()}
    values["scaling_factor"] = values.pop("rotary_scaling_factor")
    return values


def hybrid_stack_spec() -> Any:
    """Megatron's own spec of an attention/Mamba stack.

    0.17: ``mamba_stack_spec``; 0.18 and later: ``hybrid_stack_spec``.
    """
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    except ImportError:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
    return spec


def hybrid_stack_module() -> Any | None:
    """The module of the attention/Mamba stack; None where its parts are not installed.

    0.17: ``megatron.core.ssm.mamba_block``; 0.18 and later: ``megatron.core.models.hybrid.hybrid_block``.
    """
    for name in ("megatron.core.models.hybrid.hybrid_block", "megatron.core.ssm.mamba_block"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def hybrid_stack_classes() -> tuple[type, ...]:
    """Modules whose spec offers layers of many kinds, of which a model uses some.

    0.17: ``MambaStack``; 0.18 and later: ``HybridStack``.
    """
    module = hybrid_stack_module()
    stack = getattr(module, "HybridStack", None) or getattr(module, "MambaStack", None)
    return (stack,) if stack is not None else ()


def repair_models_without_transformer_engine() -> None:
    """Let experts and multi-latent attention be built without Transformer Engine in 0.16.

    The router of the experts asks whether ``te_general_gemm`` is None, but only defines the name where
    Transformer Engine is installed. Multi-latent attention takes Transformer Engine for installed when
    Megatron's wrapper of it can be imported, whose classes are mocks where it is not.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    multi_latent_attention.HAVE_TE = HAVE_TE
