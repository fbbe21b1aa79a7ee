"""The layers of Megatron's hybrid model from its arguments, as ``--hybrid-layer-pattern`` spells them.

A hybrid stack's spec is a menu with one entry per symbol of the pattern: ``*`` attention, ``-`` MLP, ``E``
experts, ``M`` Mamba, ``G`` linear attention. Megatron's own menu is of Transformer Engine layers;
:func:`local_stack_spec` is the same menu without it, for ``--transformer-impl local``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.training.gpt_model import uniform_layer_spec

_LIBRARIES = {"M": ("Mamba", "mamba_ssm"), "G": ("gated delta net", "fla")}
"""Symbols whose layers are kernels of another library, with what they are and the library's module."""


def check_args(args: Any) -> None:
    """Refuse layers whose library is missing, before Megatron stops in the middle of the model."""
    for symbol, (layer, library) in _LIBRARIES.items():
        if symbol in args.hybrid_layer_pattern and importlib.util.find_spec(library) is None:
            raise UserError(
                f"--hybrid-layer-pattern is {args.hybrid_layer_pattern!r}; its {symbol} layers ({layer}) run "
                f"only on a GPU and need the library {library}, which is not installed"
            )


def local_stack_spec(config: Any = None) -> ModuleSpec:
    """A hybrid stack of Megatron's plain PyTorch layers: attention, MLP, experts and multi-token prediction.

    ``--spec megatron_fope.training.hybrid_model LOCAL_STACK`` gives it to a script of Megatron-LM.

    Args:
        config: ``TransformerConfig`` that decides about normalisation of queries and keys, or None for
            layers without it.

    Returns:
        The spec; layers of other kinds stay Megatron's.
    """
    if config is None:
        dense, experts = get_gpt_layer_local_spec(), get_gpt_layer_local_spec(num_experts=1)
    else:
        dense, experts = (
            uniform_layer_spec(config, num_experts=number, transformer_impl="local")
            for number in (None, config.num_moe_experts or 1)
        )
    stack = compat.hybrid_stack_spec()
    menu, layer = stack.submodules, dense.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    moe = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=experts.submodules.mlp, mlp_bda=layer.mlp_bda
    )
    return dataclasses.replace(
        stack,
        submodules=dataclasses.replace(
            menu,
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=menu.mlp_layer.module, submodules=mlp),
            moe_layer=ModuleSpec(module=menu.moe_layer.module, submodules=moe),
            mtp_block_spec=_local_mtp_spec(menu.mtp_block_spec),
        ),
    )


def _local_mtp_spec(spec: ModuleSpec) -> ModuleSpec:
    """A multi-token-prediction block with plain PyTorch norms and projection; its layers are the menu's."""
    (layer,) = spec.submodules.layer_specs
    parts = dict.fromkeys(("enorm", "hnorm", "layer_norm"), WrappedTorchNorm)
    parts |= {"eh_proj": ColumnParallelLinear}
    local = dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **parts))
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, layer_specs=[local]))


def stack_spec(args: Any, config: Any) -> ModuleSpec:
    """The menu of layers: ``--spec``, else by ``--transformer-impl``."""
    if args.spec is not None:
        return import_module(args.spec)
    if config.transformer_impl == "local":
        return local_stack_spec(config)
    return compat.hybrid_stack_spec()


def builder_config(args: Any, config: Any = None) -> Any | None:
    """Megatron's own description of the model for its builder (0.19 and later; else None)."""
    description = compat.builder_config(args, config, hybrid=True)
    if description is not None and description.transformer.transformer_impl == "local":
        description.hybrid_stack_spec = stack_spec(args, description.transformer)
    return description


LOCAL_STACK = local_stack_spec()
"""For ``--spec megatron_fope.training.hybrid_model LOCAL_STACK``."""
