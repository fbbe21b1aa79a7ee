"""Checks before a run starts: of numbers and, for ``plan`` and ``ladder``, of sizes that must fit each other.

Megatron's parser takes any number, and its own checks come when the processes are running.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fope.arguments.megatron import Rule, check_rules, dashes
from megatron_fope.common.errors import UserError

_LARGEST = 2**63 - 1

_FROM_ONE = (
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
)
"""Numbers that are 1 or more where they are given."""

_NOT_NEGATIVE = (
    "min_lr",
    "lr_warmup_init",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "clip_grad",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
)
_POSITIVE = ("lr", "adam_eps", "norm_epsilon", "layernorm_epsilon")
_BELOW_ONE = (
    *("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "sgd_momentum"),
    "lr_warmup_fraction",
)
_FINITE = ("rope_scaling_factor", "rotary_scaling_factor")

_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(_FINITE, (math.isfinite, "finite numbers")),
    **dict.fromkeys(_FROM_ONE, (lambda number: number >= 1, "1 or more")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda number: number >= 0, "0 or more")),
    **dict.fromkeys(_POSITIVE, (lambda number: number > 0, "more than 0")),
    **dict.fromkeys(_BELOW_ONE, (lambda number: 0 <= number < 1, "0 to less than 1")),
    "rotary_percent": (lambda number: 0 < number <= 1, "more than 0, up to 1"),
    "seed": (lambda number: 1 <= number < 2**32, "1 to 2^32 - 1"),
}
"""Arguments, and what their numbers must be; every other whole number is 0 or more."""

_MAY_BE_NEGATIVE = ("inference_dynamic_batching_num_cuda_graphs",)
"""Whole numbers whose default is not negative and that may be."""

_EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""Values of ``--cp-comm-type``."""

_RECOMPUTED = (
    *("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out"),
)
"""Values of ``--recompute-modules``."""


def check_numbers(parser: argparse.ArgumentParser, args: Any) -> None:
    """Refuse numbers that make no sense in any run.

    Args:
        parser: Megatron's, for the names of flags and their defaults.
        args: what it made of the command line.
    """
    for action in parser._actions:
        default = action.default
        negative = action.dest in _MAY_BE_NEGATIVE or (isinstance(default, int) and default < 0)
        for number in _numbers(args, action.dest):
            if number != default:
                _check_number(action.option_strings[0], action.dest, number, negative)


def check_training_numbers(args: Any) -> None:
    """Refuse numbers that make no sense in training.

    Less than :func:`check_numbers`: a fork's own flags may mean anything, and a run of no iterations is used
    to evaluate.

    Args:
        args: Megatron's arguments.
    """
    for name in sorted(_LIMITS):
        for number in _numbers(args, name):
            if number != 0 or name not in ("train_iters", "lr"):
                _check_number(f"--{dashes(name)}", name, number)


def _numbers(args: Any, name: str) -> list[float]:
    value = getattr(args, name, None)
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]


def _check_number(flag: str, name: str, number: float, negative: bool = False) -> None:
    fits, allowed = _LIMITS.get(name, (lambda number: True, ""))
    if isinstance(number, float) and not math.isfinite(number):
        allowed = "finite numbers"
    elif isinstance(number, int) and abs(number) > _LARGEST:
        allowed = "less than 2^63"
    elif fits(number):
        if isinstance(number, float) or number >= 0 or negative:
            return
        allowed = "0 or more"
    raise UserError(f"{flag} is {number}; allowed: {allowed}")


def check_model(args: Any) -> None:
    """Refuse sizes that do not fit each other, whatever the layout.

    Args:
        args: Megatron's arguments; sizes as :func:`check_numbers` allows them.
    """
    if getattr(args, "yaml_cfg", None):
        raise UserError("--yaml-cfg is given, which replaces every flag; give the flags instead")
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 are both given; use one of them")
    check_rules(args, _sizes(args))
    kinds = getattr(args, "cp_comm_type", None) or ["p2p"]
    if args.num_layers and isinstance(kinds, list) and len(kinds) not in (1, args.num_layers):
        raise UserError(f"--cp-comm-type has {len(kinds)} values; allowed: 1 or {args.num_layers}")
    both = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    if all(getattr(args, name, None) is not None for name in both):
        raise UserError(f"{' and '.join(f'--{dashes(name)}' for name in both)} are both given; use one")
    if args.recompute_granularity == "full":
        for name, use in (("recompute_method", "uniform or block"), ("recompute_num_layers", "1 or more")):
            if getattr(args, name) is None:
                raise UserError(f"--{dashes(name)} is missing; --recompute-granularity full needs it: {use}")
    elif args.recompute_granularity == "selective" and args.recompute_num_layers is not None:
        raise UserError("--recompute-num-layers is given; use it with --recompute-granularity full")
    check_rules(args, _recomputation(args))


def _sizes(args: Any) -> Iterator[Rule]:
    def get(name: str) -> Any:
        return getattr(args, name, None)

    heads, layers = args.num_attention_heads, args.num_layers
    if heads and args.hidden_size and get("kv_channels") is None and not get("multi_latent_attention"):
        allowed = f"a divisor of the {args.hidden_size} --hidden-size (or use --kv-channels)"
        yield "num_attention_heads", args.hidden_size % heads == 0, allowed
    if heads and args.group_query_attention:
        allowed = f"a divisor of the {heads} --num-attention-heads"
        yield "num_query_groups", heads % args.num_query_groups == 0, allowed
    if longest := get("max_position_embeddings"):
        allowed = f"at least the {args.seq_length} --seq-length"
        yield "max_position_embeddings", longest >= args.seq_length, allowed
    if experts := get("num_experts"):
        yield "moe_router_topk", args.moe_router_topk <= experts, f"at most the {experts} --num-experts"
    frequency = get("moe_layer_freq")
    if isinstance(frequency, list):
        allowed = f"a whole number, or 0 or 1 for each of the {layers} --num-layers"
        yield "moe_layer_freq", len(frequency) == layers and set(frequency) <= {0, 1}, allowed
    elif frequency is not None:
        yield "moe_layer_freq", frequency >= 1, "1 or more, or a list of 0 and 1 for every layer"
    kinds = get("cp_comm_type") or ["p2p"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    yield "cp_comm_type", set(kinds) <= set(_EXCHANGES), ", ".join(_EXCHANGES)


def _recomputation(args: Any) -> Iterator[Rule]:
    modules = getattr(args, "recompute_modules", None) or []
    yield "recompute_modules", set(modules) <= set(_RECOMPUTED), ", ".join(_RECOMPUTED)
    if args.num_layers and args.recompute_num_layers is not None:
        stage = args.num_layers // (args.pipeline_model_parallel_size or 1)
        allowed = f"1 to the {stage} layers of a pipeline rank"
        yield "recompute_num_layers", args.recompute_num_layers <= max(stage, 1), allowed
