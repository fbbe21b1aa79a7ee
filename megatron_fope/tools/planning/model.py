"""What a plan needs to know of a run: read from Megatron's arguments, refused where it cannot be planned."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_fope.arguments.checks import check_model
from megatron_fope.arguments.flags import FOPE, fope_config_from_args
from megatron_fope.arguments.megatron import head_dim_of, num_kv_heads_of
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry

_UNPLANNED = {
    "hybrid_layer_pattern": "hybrid models",
    "hybrid_override_pattern": "hybrid models",
    "multi_latent_attention": "multi-latent attention",
    "experimental_attention_variant": "other attention layers",
    "heterogeneous_layers_config_path": "layers that differ",
    "mtp_num_layers": "multi-token prediction",
    "moe_latent_size": "experts on latent vectors",
    "use_megatron_fsdp": "Megatron FSDP",
    "use_torch_fsdp2": "PyTorch FSDP2",
    "optimizer_cpu_offload": "an optimizer in host memory",
    "cpu_offloading_num_layers": "activations in host memory",
    "fine_grained_activation_offloading": "activations in host memory",
    "fp8_param": "FP8 parameters",
    "fp4_param": "FP4 parameters",
    "decoder_first_pipeline_num_layers": "uneven pipeline stages",
    "decoder_last_pipeline_num_layers": "uneven pipeline stages",
    "account_for_embedding_in_pipeline_split": "uneven pipeline stages",
    "account_for_loss_in_pipeline_split": "uneven pipeline stages",
    "pipeline_model_parallel_layout": "uneven pipeline stages",
}
"""Arguments that change memory in a way that is not calculated; what a release does not have is off."""

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
)

_MOST = 100_000
"""Layers or experts; a plan looks at each."""

_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT model; every one is of the whole model, not of a rank."""

    moe: tuple[bool, ...]
    """Whether a layer is a mixture of experts, layer by layer."""
    hidden: int
    ffn: int
    gated: bool
    """The first matrix of an MLP has twice the width (``--swiglu``)."""
    heads: int
    groups: int
    """KV heads."""
    head_dim: int
    vocabulary: int
    vocabulary_multiple: int
    """``--make-vocab-size-divisible-by``; times TP the vocabulary is padded to a multiple of it."""
    tied: bool
    """Input embedding and output layer are one matrix."""
    norm: int
    """Vectors of a normalisation layer: 1 (RMSNorm) or 2."""
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    positions: int
    """Learned absolute positions, 0 without."""
    rotary: bool
    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    """Width of the shared experts, 0 without."""
    shared_gate: bool
    fope: FoPEConfig | None
    """None: another position embedding."""

    @property
    def layers(self) -> int:
        return len(self.moe)

    @property
    def gate(self) -> int:
        """Times the width of an MLP that its first matrix has."""
        return 2 if self.gated else 1

    def padded_vocabulary(self, tp: int) -> int:
        multiple = self.vocabulary_multiple * tp
        return -(-self.vocabulary // multiple) * multiple

    @cached_property
    def geometry(self) -> Geometry:
        """Of a model with FoPE."""
        assert self.fope is not None
        return Geometry(self.fope, self.head_dim, self.groups)

    def coefficients(self) -> int:
        """Numbers (float32) of one layer's FoPE coefficients; every rank holds those of all KV heads."""
        if self.fope is None:
            return 0
        return len(self.fope.coefficient_names) * math.prod(self.geometry.coefficient_shape)


@dataclass(frozen=True)
class Training:
    """What the memory of a training step depends on besides the model. Sizes are bytes per number."""

    seq_length: int
    micro_batch: int
    """Sequences of a micro-batch of one data-parallel rank."""
    global_batch: int
    parameter: int
    gradient: int
    main_gradient: int
    """Of the gradients' copy that the optimizer reads, where it takes one; else 0."""
    main: int
    """Of the optimizer's own copy of the parameters, 0 without."""
    adam: int
    """Of both moments together."""
    distributed: bool
    """Megatron's distributed optimizer (ZeRO 1)."""
    instances: int
    """Copies of the distributed optimizer's state."""
    recompute: str
    """"none", "selective" or "full"."""
    recompute_modules: tuple[str, ...]
    recompute_method: str
    """"uniform" or "block"; for "full"."""
    recompute_layers: int
    distribute_saved: bool
    attention_dropout: bool
    hidden_dropout: bool
    fused_activation: bool
    """The MLP's activation keeps nothing but its input."""
    loss_in_place: bool
    """Transformer Engine's cross entropy, which overwrites the logits."""
    mask: bool
    """The data loader makes a mask of S x S bytes for every sample."""
    flash: bool
    """Attention that keeps no S x S scores."""
    cp_comm_types: tuple[str, ...]
    """Of one layer each."""
    hierarchical: tuple[int, ...]
    """``--hierarchical-context-parallel-sizes``."""


def read_model(args: Any) -> Model:
    """The model that Megatron's arguments describe.

    Args:
        args: as parsed, before or after Megatron's own validation; not changed.

    Raises:
        UserError: a size is missing, or the memory of such a model is not known.
    """
    _check(args)
    hidden, heads = args.hidden_size, args.num_attention_heads
    experts = getattr(args, "num_experts", None) or 0
    ffn = args.ffn_hidden_size or (int(4 * hidden * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden)
    kind = args.position_embedding_type
    fope = None
    if kind == FOPE:
        fope = dataclasses.replace(fope_config_from_args(args), backend="auto")
    return Model(
        moe=_moe_layers(args) if experts else (False,) * args.num_layers,
        hidden=hidden,
        ffn=ffn,
        gated=bool(args.swiglu),
        heads=heads,
        groups=num_kv_heads_of(args) or heads,
        head_dim=head_dim_of(args),
        vocabulary=args.vocab_size,
        vocabulary_multiple=args.make_vocab_size_divisible_by,
        tied=not args.untie_embeddings_and_output_weights,
        norm=1 if args.normalization == "RMSNorm" else 2,
        bias=args.add_bias_linear,
        qkv_bias=args.add_bias_linear or bool(getattr(args, "add_qkv_bias", False)),
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        positions=args.max_position_embeddings or 0 if kind == "learned_absolute" else 0,
        rotary=kind in (FOPE, "rope", "mrope", "yarn"),
        experts=experts,
        top_k=args.moe_router_topk if experts else 0,
        expert_ffn=getattr(args, "moe_ffn_hidden_size", None) or ffn,
        shared_ffn=getattr(args, "moe_shared_expert_intermediate_size", None) or 0,
        shared_gate=bool(getattr(args, "moe_shared_expert_gate", False)),
        fope=fope,
    )


def read_training(args: Any) -> Training:
    """What Megatron's arguments say of a step; ``args`` as for :func:`read_model`, which checks them."""
    half = args.bf16 or args.fp16
    gradient, main, adam, copy = 4, 4 if half else 0, 8, 0
    if args.bf16 and getattr(args, "grad_reduce_in_bf16", False):
        gradient, copy = 2, 4
    if args.fp16 and not args.accumulate_allreduce_grads_in_fp32:
        gradient, copy = 2, 4
    if getattr(args, "use_precision_aware_optimizer", False):
        main = _width(args, "main_params_dtype")
        gradient = min(gradient, _width(args, "main_grads_dtype"))
        if half and main == 4 and getattr(args, "store_param_remainders", True):
            main = 2  # the other half of the 32 bits is the parameter itself
        adam = _width(args, "exp_avg_dtype") + _width(args, "exp_avg_sq_dtype")
        copy = 0
    granularity = args.recompute_granularity
    if getattr(args, "recompute_activations", False):
        granularity = "selective"
    backend = getattr(args.attention_backend, "name", args.attention_backend)
    return Training(
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        parameter=2 if half else 4,
        gradient=gradient,
        main_gradient=copy,
        main=main,
        adam=adam,
        distributed=bool(args.use_distributed_optimizer),
        instances=getattr(args, "num_distributed_optimizer_instances", None) or 1,
        recompute=granularity or "none",
        recompute_modules=tuple(getattr(args, "recompute_modules", None) or ("core_attn",)),
        recompute_method=args.recompute_method or "uniform",
        recompute_layers=args.recompute_num_layers or 1,
        distribute_saved=bool(args.distribute_saved_activations),
        attention_dropout=args.attention_dropout > 0,
        hidden_dropout=args.hidden_dropout > 0,
        fused_activation=bool(args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion),
        loss_in_place=bool(args.cross_entropy_loss_fusion)
        and getattr(args, "cross_entropy_fusion_impl", "native") == "te",
        mask=bool(getattr(args, "create_attention_mask_in_dataloader", True)),
        flash=args.transformer_impl != "local" and backend not in ("unfused", "local"),
        cp_comm_types=_cp_comm_types(args),
        hierarchical=tuple(getattr(args, "hierarchical_context_parallel_sizes", None) or ()),
    )


def _width(args: Any, name: str) -> int:
    """Bytes of a dtype argument: a word before Megatron's validation, a torch.dtype after it."""
    value = getattr(args, name)
    return _DTYPES[value] if isinstance(value, str) else value.itemsize


def _check(args: Any) -> None:
    for name in _REQUIRED:
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing; a plan needs it")
    if args.vocab_size is None:
        raise UserError("--vocab-size is missing; a plan opens no tokenizer, give the number of its tokens")
    for name, what in _UNPLANNED.items():
        if getattr(args, name, None):
            raise UserError(f"--{name.replace('_', '-')} is given; a plan does not know the memory of {what}")
    if args.optimizer != "adam":
        raise UserError(f"--optimizer is {args.optimizer!r}; a plan knows the memory of: adam")
    for name in ("num_layers", "num_experts"):
        if (getattr(args, name, None) or 1) > _MOST:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: up to {_MOST}")
    check_model(args)


def _cp_comm_types(args: Any) -> tuple[str, ...]:
    """How context parallelism exchanges, layer by layer."""
    kinds = getattr(args, "cp_comm_type", None) or ["p2p"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return tuple(kinds if len(kinds) > 1 else kinds * args.num_layers)


def _moe_layers(args: Any) -> tuple[bool, ...]:
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(args.num_layers))
    return tuple(map(bool, frequency))
