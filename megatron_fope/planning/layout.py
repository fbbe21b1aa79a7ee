"""A parallel layout: how a model is cut among the ranks, and which layouts a model can be cut into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fope.planning.cluster import Cluster
from megatron_fope.planning.model import Model, Training


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
    tp, cp = layout.tp, layout.cp
    whole = [
        model.heads % tp == 0,
        model.groups % tp == 0 or tp % model.groups == 0,
        model.ffn % tp == 0 and model.shared_ffn % tp == 0,
        model.layers % (layout.pp * layout.vpp) == 0,
        cp == 1 or training.seq_length % (2 * cp) == 0,
        not layout.sequence_parallel or training.seq_length // cp % tp == 0,
        training.global_batch % (training.micro_batch * layout.dp) == 0,
        all(_exchange_divides(kind, model, training, layout) for kind in set(training.cp_comm_types)),
    ]
    if model.experts:
        whole += [
            model.experts % layout.ep == 0,
            model.expert_ffn % layout.etp == 0,
            layout.ranks % (layout.etp * layout.ep * layout.pp) == 0,
        ]
    return all(whole)


def _exchange_divides(kind: str, model: Model, training: Training, layout: Layout) -> bool:
    """Whether a kind of context parallelism can cut the heads of a tensor-parallel rank."""
    if layout.cp == 1 or kind not in ("a2a", "a2a+p2p"):
        return True
    ranks = layout.cp
    if kind == "a2a+p2p":
        if math.prod(training.hierarchical) != layout.cp or len(training.hierarchical) != 2:
            return False
        ranks = training.hierarchical[0]
    return model.heads // layout.tp % ranks == 0 and max(1, model.groups // layout.tp) % ranks == 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
