"""Which parallel layouts a model can be cut into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace

from megatron_fope.arguments.layout import Layout, check_layout
from megatron_fope.common.errors import UserError
from megatron_fope.tools.planning.cluster import Cluster
from megatron_fope.tools.planning.model import Model, Training


def legal_layouts(model: Model, training: Training, cluster: Cluster, etp: int | None) -> Iterator[Layout]:
    """Every layout into which model, sequence, batch and cluster divide.

    TP stays within a node; with TP there is sequence parallelism; no interleaved pipeline.

    Args:
        etp: ``--expert-tensor-parallel-size`` where it is given; None: 1.
    """
    for tp, pp in itertools.product(_divisors(cluster.gpus_per_node), _divisors(model.layers)):
        if cluster.gpus % (tp * pp):
            continue
        for cp in _divisors(cluster.gpus // (tp * pp)):
            dp = cluster.gpus // (tp * pp * cp)
            for ep in _divisors(model.experts) if model.experts else (1,):
                chosen = (etp or 1) if model.experts else tp
                layout = Layout(tp, pp, cp, ep, chosen, dp, sequence_parallel=tp > 1)
                if divides(model, training, layout):
                    yield layout


def divides(model: Model, training: Training, layout: Layout) -> bool:
    """Whether a model, its sequence and its batch can be cut like this."""
    asked = SimpleNamespace(
        world_size=layout.ranks,
        num_layers=model.layers,
        num_attention_heads=model.heads,
        group_query_attention=True,
        num_query_groups=model.groups,
        ffn_hidden_size=model.ffn,
        num_experts=model.experts,
        moe_ffn_hidden_size=model.expert_ffn,
        moe_shared_expert_intermediate_size=model.shared_ffn,
        seq_length=training.seq_length,
        micro_batch_size=training.micro_batch,
        global_batch_size=training.global_batch,
        num_distributed_optimizer_instances=training.instances,
        cp_comm_type=list(set(training.cp_comm_types)),
        hierarchical_context_parallel_sizes=list(training.hierarchical),
        **layout.arguments(),
    )
    try:
        check_layout(asked, complete=True)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d < number]
