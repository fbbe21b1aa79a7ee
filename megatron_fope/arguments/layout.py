"""Parallel layouts: into how many ranks a model is cut, and into how many it can be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_fope.arguments.megatron import Rule, check_rules, dashes, num_kv_heads_of
from megatron_fope.common.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of all groups of ranks; TP x PP x CP x DP ranks in all."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    """Tensor-parallel size of experts."""
    dp: int = 1
    vpp: int = 1
    """Model chunks of a rank (interleaved pipeline)."""
    sequence_parallel: bool = False

    @classmethod
    def of(cls, args: Any) -> Layout:
        """What Megatron's arguments ask for, on ``world_size`` ranks where they have it; else with DP 1."""

        def size(name: str, default: int = 1) -> int:
            return getattr(args, name, None) or default

        tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
        cp = size("context_parallel_size")
        per_chunk = size("num_layers_per_virtual_pipeline_stage", 0)
        return cls(
            tp=tp,
            pp=pp,
            cp=cp,
            ep=size("expert_model_parallel_size"),
            etp=size("expert_tensor_parallel_size", tp),
            dp=size("world_size", tp * pp * cp) // (tp * pp * cp),
            vpp=args.num_layers // (pp * per_chunk)
            if per_chunk and args.num_layers
            else size("num_virtual_stages_per_pipeline_rank"),
            sequence_parallel=tp > 1 and bool(getattr(args, "sequence_parallel", False)),
        )

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // (self.etp * self.ep * self.pp)

    def microbatches(self, global_batch: int, micro_batch: int) -> int:
        """Micro-batches of one data-parallel rank in a step; batches in sequences."""
        return global_batch // (micro_batch * self.dp)

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments for it, without the number of ranks."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "num_virtual_stages_per_pipeline_rank": self.vpp if self.vpp > 1 else None,
            "sequence_parallel": self.sequence_parallel,
        }

    def flags(self, moe: bool) -> list[str]:
        """Megatron's flags for it, as words."""
        words = []
        for name, value in self.arguments().items():
            if value and (moe or not name.startswith("expert_")):
                words.append(f"--{dashes(name)}")
                words += [] if value is True else [str(value)]
        return words

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "EP": self.ep, "ETP": self.etp, "DP": self.dp}
        if self.ep == 1:
            del sizes["EP"], sizes["ETP"]
        return " x ".join(f"{name} {size}" for name, size in sizes.items())


def check_layout(args: Any, *, world_name: str = "WORLD_SIZE", complete: bool = False) -> None:
    """Refuse a layout that does not divide the model, the sequence, the batch or the number of processes.

    Args:
        args: Megatron's arguments; not changed.
        world_name: what the message calls the number of ranks.
        complete: also refuse what Megatron itself refuses of a run that has started; needs ``world_size``.
    """
    layout = Layout.of(args)
    model = layout.tp * layout.pp * layout.cp
    world = getattr(args, "world_size", None) or model
    if world % model:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tp} x --pipeline-model-parallel-size {layout.pp} x "
            f"--context-parallel-size {layout.cp} takes {model} ranks, but {world_name} is {world}"
        )
    check_rules(args, _rules(args, layout, world_name, complete))


def _rules(args: Any, layout: Layout, world_name: str, complete: bool) -> Iterator[Rule]:
    yield from _cuts(args, layout)
    if complete:
        yield from _shards(args, layout)
        yield from _chunks(args, layout)
        yield from _experts(args, layout, world_name)
        yield from _exchanges(args, layout)


def _cuts(args: Any, layout: Layout) -> Iterator[Rule]:
    """Heads, layers, sequence, experts and batch."""
    tp, pp, cp, ep = layout.tp, layout.pp, layout.cp, layout.ep
    heads = args.num_attention_heads or tp
    groups = num_kv_heads_of(args) or heads
    layers = args.num_layers or pp
    uneven = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "pipeline_model_parallel_layout",
    )
    experts = getattr(args, "num_experts", None) or ep
    yield "tensor_model_parallel_size", heads % tp == 0, f"a divisor of the {heads} --num-attention-heads"
    yield (
        "tensor_model_parallel_size",
        groups % tp == 0 or tp % groups == 0,
        f"a divisor or a multiple of the {groups} --num-query-groups",
    )
    yield (
        "pipeline_model_parallel_size",
        layers % pp == 0 or _any(args, uneven),
        f"a divisor of the {layers} --num-layers",
    )
    yield (
        "context_parallel_size",
        cp == 1 or args.seq_length % (2 * cp) == 0,
        f"numbers whose double divides the {args.seq_length} tokens of --seq-length",
    )
    yield "expert_model_parallel_size", experts % ep == 0, f"a divisor of the {experts} --num-experts"
    flexible = ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
    if args.global_batch_size and args.micro_batch_size and not _any(args, flexible):
        yield (
            "global_batch_size",
            args.global_batch_size % (args.micro_batch_size * layout.dp) == 0,
            f"a multiple of --micro-batch-size {args.micro_batch_size} times {layout.dp} data-parallel ranks",
        )


def _any(args: Any, names: tuple[str, ...]) -> bool:
    return any(getattr(args, name, None) for name in names)


def _shards(args: Any, layout: Layout) -> Iterator[Rule]:
    """Sequence and tensor parallelism, and instances of the distributed optimizer."""
    tp, name = layout.tp, "tensor_model_parallel_size"
    if layout.sequence_parallel:
        tokens = args.seq_length // layout.cp
        parts = f"a divisor of the {tokens} tokens of a context-parallel rank with --sequence-parallel"
        yield name, tokens % tp == 0, parts
    for wide in ("ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = getattr(args, wide, None) or tp
        yield name, width % tp == 0, f"a divisor of the {width} --{dashes(wide)}"
    instances = getattr(args, "num_distributed_optimizer_instances", None) or 1
    yield (
        "num_distributed_optimizer_instances",
        layout.dp * layout.cp % instances == 0,
        f"divisors of the {layout.dp * layout.cp} data- and context-parallel ranks",
    )


def _chunks(args: Any, layout: Layout) -> Iterator[Rule]:
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
    layers = args.num_layers // layout.pp
    yield name, layers % (per_chunk or chunks) == 0, f"divisors of the {layers} layers of a pipeline rank"
    if (layers // per_chunk if chunks is None else chunks) > 1:
        steps = layout.microbatches(args.global_batch_size, args.micro_batch_size)
        single = 1 if per_chunk is None else layers
        yield name, layout.pp > 1, f"{single} with one pipeline rank"
        yield (
            name,
            steps >= layout.pp,
            f"{single} with fewer than {layout.pp} micro-batches of a rank in a step, here {steps}",
        )


def _experts(args: Any, layout: Layout, world_name: str) -> Iterator[Rule]:
    ep, etp = layout.ep, layout.etp
    if not getattr(args, "num_experts", None):
        yield "expert_model_parallel_size", ep == 1, "1 without --num-experts"
        return
    own = getattr(args, "expert_tensor_parallel_size", None)
    width = getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "ffn_hidden_size", None) or etp
    yield (
        "expert_tensor_parallel_size" if own else "tensor_model_parallel_size",
        width % etp == 0,
        f"a divisor of the {width} channels of an expert",
    )
    yield (
        "expert_model_parallel_size",
        args.world_size % (etp * ep * layout.pp) == 0,
        f"numbers that, times {etp} expert-tensor-parallel and {layout.pp} pipeline ranks, divide the "
        f"{args.world_size} {world_name}",
    )


def _exchanges(args: Any, layout: Layout) -> Iterator[Rule]:
    """Context parallelism by heads."""
    kinds = getattr(args, "cp_comm_type", None) or ["p2p"]
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    sizes = getattr(args, "hierarchical_context_parallel_sizes", None) or []
    if sizes:
        yield (
            "hierarchical_context_parallel_sizes",
            math.prod(sizes) == layout.cp,
            f"numbers whose product is the {layout.cp} --context-parallel-size",
        )
    if layout.cp == 1 or not args.num_attention_heads or not kinds & {"a2a", "a2a+p2p"}:
        return
    if "a2a+p2p" in kinds:
        yield (
            "cp_comm_type",
            len(sizes) == 2,
            "p2p, all_gather, a2a, or a2a+p2p with two --hierarchical-context-parallel-sizes",
        )
    heads = args.num_attention_heads // layout.tp
    groups = max(1, (num_kv_heads_of(args) or 1) // layout.tp)
    ranks = layout.cp if "a2a" in kinds else sizes[0]
    yield (
        "context_parallel_size" if "a2a" in kinds else "hierarchical_context_parallel_sizes",
        heads % ranks == groups % ranks == 0,
        f"{'' if 'a2a' in kinds else 'first '}a common divisor of the {heads} heads and {groups} KV heads of "
        f"a tensor-parallel rank with {' and '.join(sorted(kinds))}",
    )
