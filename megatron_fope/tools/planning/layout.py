"""A parallel layout: how a model is cut among the ranks, and which layouts a model can be cut into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from megatron_fope.arguments.checks import check_run_layout
from megatron_fope.common.errors import UserError
from megatron_fope.tools.planning.cluster import Cluster
from megatron_fope.tools.planning.model import Model, Training


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

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // (self.etp * self.ep * self.pp)

    def microbatches(self, training: Training) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return training.global_batch // (training.micro_batch * self.dp)

    def bubble(self, training: Training) -> float:
        """Share of a step in which the pipeline waits: (PP - 1) of every (micro-batches x VPP + PP - 1)."""
        return (self.pp - 1) / (self.microbatches(training) * self.vpp + self.pp - 1)

    def flags(self, moe: bool) -> list[str]:
        """Megatron's flags for it, as words."""
        sizes = {
            "tensor-model-parallel-size": self.tp,
            "pipeline-model-parallel-size": self.pp,
            "context-parallel-size": self.cp,
        }
        if moe:
            sizes |= {"expert-model-parallel-size": self.ep, "expert-tensor-parallel-size": self.etp}
        if self.vpp > 1:
            sizes["num-virtual-stages-per-pipeline-rank"] = self.vpp
        words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        return [*words, "--sequence-parallel"] if self.sequence_parallel else words

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "EP": self.ep, "ETP": self.etp, "DP": self.dp}
        if self.ep == 1:
            del sizes["EP"], sizes["ETP"]
        return " x ".join(f"{name} {size}" for name, size in sizes.items())


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
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_virtual_stages_per_pipeline_rank=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
    )
    try:
        check_run_layout(asked)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d < number]
