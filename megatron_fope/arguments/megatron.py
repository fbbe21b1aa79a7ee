"""What Megatron's own arguments say about a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_fope.common.errors import UserError

Rule = tuple[str, bool, str]
"""An argument, whether its value is allowed, and what is."""

CHECKPOINT_FORMATS = ("torch_dist", "torch")
"""Values of ``--ckpt-format`` whose files FoPE looks into: for damage, and to start from another model."""


def head_dim_of(args: Any) -> int:
    """Channels of a head that are rotated; 0 while the model's size is not known."""
    if getattr(args, "multi_latent_attention", False):
        return args.qk_pos_emb_head_dim
    if getattr(args, "kv_channels", None) is not None:
        return args.kv_channels
    if args.hidden_size and args.num_attention_heads:
        return args.hidden_size // args.num_attention_heads
    return 0


def num_kv_heads_of(args: Any) -> int | None:
    """Heads of keys and values; None while the model's size is not known.

    Megatron leaves ``num_query_groups`` at 1 without ``--group-query-attention`` and ignores it.
    """
    grouped = getattr(args, "group_query_attention", False)
    return getattr(args, "num_query_groups" if grouped else "num_attention_heads", None)


def train_length_of(args: Any) -> int:
    """Sequence length of a training, in tokens; FoPE's own train length where there is one."""
    return getattr(args, "fope_train_length", None) or args.seq_length


def is_hybrid(args: Any) -> bool:
    """Whether Megatron's arguments ask for a hybrid model."""
    return getattr(args, "hybrid_layer_pattern", None) is not None


def check_rules(args: Any, rules: Iterable[Rule]) -> None:
    """Refuse the first value that a rule does not allow."""
    for name, ok, allowed in rules:
        if not ok:
            value = getattr(args, name)
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{dashes(name)} is {shown}; allowed: {allowed}")


def dashes(name: str) -> str:
    """An argument's name as its flag has it, without the leading ones."""
    return name.replace("_", "-")


def check_position_ids(args: Any) -> None:
    """Refuse settings under which restarting position ids would not reach every attention layer."""
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
