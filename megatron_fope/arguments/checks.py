"""What is refused of a run before it starts: numbers and, by ``plan`` and ``ladder``, layouts that cannot be.

Megatron's parser takes any number, and its own checks come when the processes are running.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fope.arguments.megatron import check_layout, num_kv_heads_of
from megatron_fope.common.errors import UserError

_LARGEST = 2**63 - 1

_FROM_ONE = frozenset(
    [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "num_query_groups",
        "vocab_size",
        "padded_vocab_size",
        "make_vocab_size_divisible_by",
        "max_position_embeddings",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "hierarchical_context_parallel_sizes",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "recompute_num_layers",
        "num_distributed_optimizer_instances",
        "train_iters",
        "lr_decay_iters",
        "eval_interval",
        "log_interval",
        "eval_micro_batch_size",
        "eval_global_batch_size",
        "seed",
        "rotary_base",
        "rotary_seq_len_interpolation_factor",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "kv_lora_rank",
        "q_lora_rank",
    ]
)
"""Whole numbers that are 1 or more where they are given."""

_MAY_BE_NEGATIVE = frozenset({"inference_dynamic_batching_num_cuda_graphs"})
"""Whole numbers whose default is not negative and that may be; every other is 0 or more."""

_POSITIVE = frozenset(("lr", "adam_eps", "norm_epsilon", "layernorm_epsilon"))
_NOT_NEGATIVE = frozenset(
    [
        "min_lr",
        "lr_warmup_init",
        "weight_decay",
        "start_weight_decay",
        "end_weight_decay",
        "clip_grad",
        "init_method_std",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
    ]
)
_BELOW_ONE = frozenset(
    ["hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "sgd_momentum", "lr_warmup_fraction"]
)

_FINITE = frozenset(("rotary_percent", "rope_scaling_factor", "rotary_scaling_factor"))

_EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""Values of ``--cp-comm-type``."""

_RECOMPUTED = (
    *("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out"),
)
"""Values of ``--recompute-modules``."""


def check_numbers(parser: argparse.ArgumentParser, args: Any) -> None:
    """Refuse numbers that no run can mean, whatever its model.

    Args:
        parser: Megatron's, for the names of flags and their defaults.
        args: what it made of the command line.

    Raises:
        UserError: naming the flag.
    """
    for action in parser._actions:
        default = action.default
        value = getattr(args, action.dest, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float) or number == default:
                continue
            if allowed := _outside(action.dest, number, default):
                raise UserError(f"{action.option_strings[0]} is {number}; allowed: {allowed}")


def check_training_numbers(args: Any) -> None:
    """Refuse numbers that no training can mean.

    Less than :func:`check_numbers`: a fork's own flags may mean anything, and a run of no iterations is used
    to evaluate.

    Args:
        args: Megatron's arguments.

    Raises:
        UserError: naming the flag.
    """
    for name in sorted(_FROM_ONE | _POSITIVE | _NOT_NEGATIVE | _BELOW_ONE | _FINITE):
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if name in ("train_iters", "lr") and number == 0:
                continue
            if allowed := _outside(name, number, 0):
                raise UserError(f"--{_dashes(name)} is {number}; allowed: {allowed}")


def _outside(name: str, number: float, default: Any) -> str:
    """What is allowed where a number is not; else an empty string."""
    if isinstance(number, float) and not math.isfinite(number):
        return "finite numbers"
    if isinstance(number, int) and abs(number) > _LARGEST:
        return "less than 2^63"
    if name == "seed" and not 1 <= number < 2**32:
        return "1 to 2^32 - 1"
    if name == "rotary_percent" and not 0 < number <= 1:
        return "more than 0, up to 1"
    if name in _POSITIVE and number <= 0:
        return "more than 0"
    if name in _BELOW_ONE and not 0 <= number < 1:
        return "0 to less than 1"
    if name in _NOT_NEGATIVE and number < 0:
        return "0 or more"
    if isinstance(number, float):
        return ""
    if name in _FROM_ONE and number < 1:
        return "1 or more"
    can_be_negative = name in _MAY_BE_NEGATIVE or (isinstance(default, int) and default < 0)
    return "0 or more" if number < 0 and not can_be_negative else ""


def check_model(args: Any) -> None:
    """Refuse sizes that do not fit each other, whatever the layout.

    Args:
        args: Megatron's arguments; sizes as :func:`check_numbers` allows them.

    Raises:
        UserError: naming the flag.
    """

    def get(name: str) -> Any:
        return getattr(args, name, None)

    def require(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise UserError(f"--{_dashes(name)} is {_shown(get(name))}; allowed: {allowed}")

    if get("yaml_cfg"):
        raise UserError("--yaml-cfg is given, which replaces every flag; give the flags instead")
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 are both given; use one of them")
    heads, layers = args.num_attention_heads, args.num_layers
    if heads and args.hidden_size and get("kv_channels") is None and not get("multi_latent_attention"):
        require(
            args.hidden_size % heads == 0,
            "num_attention_heads",
            f"a divisor of the {args.hidden_size} --hidden-size (or use --kv-channels)",
        )
    if heads and args.group_query_attention:
        require(
            heads % args.num_query_groups == 0,
            "num_query_groups",
            f"a divisor of the {heads} --num-attention-heads",
        )
    longest = get("max_position_embeddings")
    require(
        longest is None or longest >= args.seq_length,
        "max_position_embeddings",
        f"at least the {args.seq_length} --seq-length",
    )
    if experts := get("num_experts"):
        require(args.moe_router_topk <= experts, "moe_router_topk", f"at most the {experts} --num-experts")
    frequency = get("moe_layer_freq")
    if isinstance(frequency, list):
        require(
            len(frequency) == layers and set(frequency) <= {0, 1},
            "moe_layer_freq",
            f"a whole number, or 0 or 1 for each of the {layers} --num-layers",
        )
    elif frequency is not None:
        require(frequency >= 1, "moe_layer_freq", "1 or more, or a list of 0 and 1 for every layer")
    kinds = get("cp_comm_type") or ["p2p"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    require(set(kinds) <= set(_EXCHANGES), "cp_comm_type", ", ".join(_EXCHANGES))
    if layers and len(kinds) not in (1, layers):
        raise UserError(f"--cp-comm-type has {len(kinds)} values; allowed: 1 or {layers}")
    both = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    if all(get(name) is not None for name in both):
        raise UserError(f"{' and '.join(f'--{_dashes(name)}' for name in both)} are both given; use one")
    _check_recomputation(args, require)


def _check_recomputation(args: Any, require: Callable[[bool, str, str], None]) -> None:
    granularity = args.recompute_granularity
    if granularity == "full":
        for name, use in (("recompute_method", "uniform or block"), ("recompute_num_layers", "1 or more")):
            if getattr(args, name) is None:
                raise UserError(f"--{_dashes(name)} is missing; --recompute-granularity full needs it: {use}")
    elif granularity == "selective" and args.recompute_num_layers is not None:
        raise UserError("--recompute-num-layers is given; use it with --recompute-granularity full")
    modules = getattr(args, "recompute_modules", None) or []
    require(set(modules) <= set(_RECOMPUTED), "recompute_modules", ", ".join(_RECOMPUTED))
    if args.num_layers and args.recompute_num_layers is not None:
        stage = args.num_layers // (args.pipeline_model_parallel_size or 1)
        require(
            args.recompute_num_layers <= max(stage, 1),
            "recompute_num_layers",
            f"1 to the {stage} layers of a pipeline rank",
        )


def check_run_layout(args: Any, world_name: str = "WORLD_SIZE") -> None:
    """Refuse a layout into which model, sequence, batch or number of processes cannot be cut.

    Args:
        args: Megatron's arguments, with ``world_size`` set; not changed.
        world_name: what the message calls the number of ranks.

    Raises:
        UserError: naming the flag.
    """
    check_layout(args, world_name)
    for name, ok, allowed in _cuts(args, world_name):
        if not ok:
            raise UserError(
                f"--{name.replace('_', '-')} is {_shown(getattr(args, name))}; allowed: {allowed}"
            )


def _cuts(args: Any, world_name: str) -> Iterator[tuple[str, bool, str]]:
    """Argument, whether its value can be, and which can; beside what every FoPE run is checked for."""

    def given(name: str, default: int = 1) -> int:
        return getattr(args, name, None) or default

    tensor, pipeline = given("tensor_model_parallel_size"), given("pipeline_model_parallel_size")
    context, expert = given("context_parallel_size"), given("expert_model_parallel_size")
    replicas = args.world_size // (tensor * pipeline * context)
    per_rank = args.seq_length // context
    if tensor > 1 and getattr(args, "sequence_parallel", False):
        yield (
            "tensor_model_parallel_size",
            per_rank % tensor == 0,
            f"a divisor of the {per_rank} tokens of a context-parallel rank with --sequence-parallel",
        )
    for name in ("ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = given(name, tensor)
        yield "tensor_model_parallel_size", width % tensor == 0, f"a divisor of the {width} --{_dashes(name)}"
    yield from _chunks(args, pipeline, replicas)
    experts = given("num_experts", 0)
    if not experts:
        yield "expert_model_parallel_size", expert == 1, "1 without --num-experts"
    else:
        own = given("expert_tensor_parallel_size", tensor)
        width = given("moe_ffn_hidden_size", given("ffn_hidden_size", own))
        named = (
            "expert_tensor_parallel_size"
            if given("expert_tensor_parallel_size", 0)
            else "tensor_model_parallel_size"
        )
        yield named, width % own == 0, f"a divisor of the {width} channels of an expert"
        yield (
            "expert_model_parallel_size",
            args.world_size % (own * expert * pipeline) == 0,
            f"numbers that, times {own} expert-tensor-parallel and {pipeline} pipeline ranks, divide the "
            f"{args.world_size} {world_name}",
        )
    instances = given("num_distributed_optimizer_instances")
    yield (
        "num_distributed_optimizer_instances",
        replicas * context % instances == 0,
        f"divisors of the {replicas * context} data- and context-parallel ranks",
    )
    yield from _exchanges(args, tensor, context)


def _chunks(args: Any, pipeline: int, replicas: int) -> Iterator[tuple[str, bool, str]]:
    """The interleaved pipeline."""
    per_chunk = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    chunks = getattr(args, "num_virtual_stages_per_pipeline_rank", None)
    if not args.num_layers or (per_chunk is None and chunks is None):
        return
    name = (
        "num_virtual_stages_per_pipeline_rank"
        if per_chunk is None
        else "num_layers_per_virtual_pipeline_stage"
    )
    layers = args.num_layers // pipeline
    fits = layers % per_chunk == 0 if chunks is None else layers % chunks == 0
    yield name, fits, f"divisors of the {layers} layers of a pipeline rank"
    if (layers // per_chunk if chunks is None else chunks) > 1:
        steps = args.global_batch_size // (args.micro_batch_size * replicas)
        single = 1 if per_chunk is None else layers
        yield name, pipeline > 1, f"{single} with one pipeline rank"
        yield (
            name,
            steps >= pipeline,
            f"{single} with fewer than {pipeline} micro-batches of a rank in a step, here {steps}",
        )


def _exchanges(args: Any, tensor: int, context: int) -> Iterator[tuple[str, bool, str]]:
    """Context parallelism by heads."""
    kinds = getattr(args, "cp_comm_type", None) or ["p2p"]
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None) or []
    if sizes:
        yield (
            "hierarchical_context_parallel_sizes",
            math.prod(sizes) == context,
            f"numbers whose product is the {context} --context-parallel-size",
        )
    if context == 1 or not args.num_attention_heads or not kinds & {"a2a", "a2a+p2p"}:
        return
    if "a2a+p2p" in kinds:
        yield (
            "cp_comm_type",
            len(sizes) == 2,
            "p2p, all_gather, a2a, or a2a+p2p with two --hierarchical-context-parallel-sizes",
        )
    heads, groups = args.num_attention_heads // tensor, max(1, num_kv_heads_of(args) // tensor)
    ranks = context if "a2a" in kinds else sizes[0]
    yield (
        "context_parallel_size" if "a2a" in kinds else "hierarchical_context_parallel_sizes",
        heads % ranks == groups % ranks == 0,
        f"{'' if 'a2a' in kinds else 'first '}a common divisor of the {heads} heads and {groups} KV heads of "
        f"a tensor-parallel rank with {' and '.join(sorted(kinds))}",
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _dashes(name: str) -> str:
    return name.replace("_", "-")
