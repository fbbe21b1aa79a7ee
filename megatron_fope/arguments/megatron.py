"""What Megatron's own arguments say about a model, and which parallel layouts they allow."""

from __future__ import annotations

from typing import Any

from megatron_fope.common.errors import UserError

CHECKPOINT_FORMATS = ("torch_dist", "torch")
"""Values of ``--ckpt-format`` whose files FoPE looks into: for damage, and to start from another model."""


def head_dim_of(args: Any) -> int | None:
    """Channels of a head that are rotated; None while the model's size is not known."""
    if getattr(args, "multi_latent_attention", False):
        return args.qk_pos_emb_head_dim
    if getattr(args, "kv_channels", None) is not None:
        return args.kv_channels
    if args.hidden_size and args.num_attention_heads:
        return args.hidden_size // args.num_attention_heads
    return None


def num_kv_heads_of(args: Any) -> int | None:
    """Heads of keys and values; None while the model's size is not known.

    Megatron leaves ``num_query_groups`` at 1 without ``--group-query-attention`` and ignores it.
    """
    grouped = getattr(args, "group_query_attention", False)
    return getattr(args, "num_query_groups" if grouped else "num_attention_heads", None)


def is_hybrid(args: Any) -> bool:
    """Whether Megatron's arguments ask for a hybrid model."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def check_position_ids(args: Any) -> None:
    """Refuse settings under which position ids that start again would not reach every attention layer.

    Raises:
        UserError: naming the flag.
    """
    if not getattr(args, "reset_position_ids", False):
        return
    pipeline = getattr(args, "pipeline_model_parallel_size", None) or 1
    cases = {
        f"--pipeline-model-parallel-size {pipeline}: Megatron gives position ids to the first stage only": (
            pipeline > 1
        ),
        "--cuda-graph-impl transformer_engine: its graphs have no input for position ids": (
            getattr(args, "cuda_graph_impl", None) == "transformer_engine"
            or getattr(args, "external_cuda_graph", False)
        ),
        "--overlap-moe-expert-parallel-comm: its schedule does not give position ids to the layers": getattr(
            args, "overlap_moe_expert_parallel_comm", False
        ),
    }
    for case, given in cases.items():
        if given:
            raise UserError(
                f"--reset-position-ids is given with {case}, and FoPE's positions are absolute; leave one out"
            )


def check_layout(args: Any, world_name: str = "WORLD_SIZE") -> None:
    """Refuse a parallel layout into which the model, the batch or the number of processes does not divide.

    Args:
        args: Megatron's arguments.
        world_name: what the message calls the number of ranks.

    Raises:
        UserError: naming the flag.
    """

    def size(name: str) -> int:
        return getattr(args, name, None) or 1

    def require(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: {allowed}")

    tensor, pipeline = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    context, expert = size("context_parallel_size"), size("expert_model_parallel_size")
    model = tensor * pipeline * context
    world = getattr(args, "world_size", None) or model
    if world % model:
        raise UserError(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} x "
            f"--context-parallel-size {context} takes {model} ranks, but {world_name} is {world}"
        )
    heads = args.num_attention_heads or tensor
    groups = num_kv_heads_of(args) or heads
    require(
        heads % tensor == 0, "tensor_model_parallel_size", f"a divisor of the {heads} --num-attention-heads"
    )
    require(
        groups % tensor == 0 or tensor % groups == 0,
        "tensor_model_parallel_size",
        f"a divisor or a multiple of the {groups} --num-query-groups",
    )
    layers = args.num_layers or pipeline
    uneven = any(
        getattr(args, name, None)
        for name in (
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
            "pipeline_model_parallel_layout",
        )
    )
    require(
        uneven or layers % pipeline == 0,
        "pipeline_model_parallel_size",
        f"a divisor of the {layers} --num-layers",
    )
    require(
        context == 1 or args.seq_length % (2 * context) == 0,
        "context_parallel_size",
        f"numbers whose double divides the {args.seq_length} tokens of --seq-length",
    )
    experts = getattr(args, "num_experts", None) or expert
    require(experts % expert == 0, "expert_model_parallel_size", f"a divisor of the {experts} --num-experts")
    replicas = world // model
    flexible = any(
        getattr(args, name, None)
        for name in ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
    )
    if args.global_batch_size and args.micro_batch_size and not flexible:
        require(
            args.global_batch_size % (args.micro_batch_size * replicas) == 0,
            "global_batch_size",
            f"a multiple of --micro-batch-size {args.micro_batch_size} times {replicas} data-parallel ranks",
        )
