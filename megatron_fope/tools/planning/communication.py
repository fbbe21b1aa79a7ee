"""Bytes that one rank sends in a training step, by the kind of parallelism.

FoPE adds nothing to any of them: every rank rotates what it has (``examples/bench`` counts it). Every
formula is the lower bound of a ring: a gather or a scatter over ``n`` ranks moves ``(n - 1) / n`` of the
whole through each rank, a sum of everything twice that. For one layer and one micro-batch, with ``e`` bytes
per number, ``t`` tokens of the rank and ``x = e t h`` the activations between layers:

======= ==================================================================================================
TP      with sequence parallelism 4 gathers or scatters of ``x`` forward and 6 backward; without it, 2 sums
        forward and 2 backward
CP      p2p: the ring passes keys and values ``CP - 1`` times forward, and them and their gradients backward:
        ``3 (CP - 1) e t 2k``. all_gather: the same bytes. a2a: queries, keys, values and the output change
        places forward and their gradients backward: ``2 (CP - 1) / CP e t (2q + 2k)``. a2a+p2p: a2a in the
        inner group, p2p in the outer
PP      ``x`` forward and its gradient backward, once per model chunk
EP      four all-to-alls of the tokens sent to experts: ``4 (EP - 1) / EP x top_k``
DP      once a step: the sum of the gradients; with the distributed optimizer a scatter of gradients and a
        gather of parameters
======= ==================================================================================================

What is recomputed sends again what its forward pass sends.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fope.arguments.layout import Layout
from megatron_fope.tools.planning.cluster import Cluster
from megatron_fope.tools.planning.model import Model, Training
from megatron_fope.tools.planning.states import Parameters, layers_of_stage

OUTSIDE = 8
"""How many bytes inside a node take as long as one that leaves it: about 400 GB/s of NVLink a GPU to 50 GB/s
(one 400 Gbit/s adapter a GPU)."""


KINDS = {
    "tp": "tensor parallel",
    "cp": "context parallel",
    "pp": "pipeline",
    "ep": "expert parallel",
    "dp": "gradients, parameters",
}
"""Fields of :class:`Communication`, and what they are called."""


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a step."""

    tp: float
    cp: float
    pp: float
    ep: float
    dp: float
    outside: frozenset[str]
    """Kinds whose groups reach over nodes."""

    @property
    def inside(self) -> float:
        """Bytes of groups within a node."""
        return sum(getattr(self, kind) for kind in KINDS if kind not in self.outside)

    @property
    def between(self) -> float:
        """Bytes of groups that reach over nodes; part of them may still stay inside one."""
        return sum(getattr(self, kind) for kind in KINDS if kind in self.outside)

    @property
    def cost(self) -> float:
        """What layouts are compared by: bytes, those between nodes counted :data:`OUTSIDE` times."""
        return self.inside + OUTSIDE * self.between


def communication(
    model: Model, training: Training, layout: Layout, cluster: Cluster, count: Parameters, stage: int
) -> Communication:
    """What one rank of a pipeline stage sends.

    Args:
        count: its parameters.
        stage: pipeline stage, from 0.
    """
    numbers, tp, cp, ep = training.parameter, layout.tp, layout.cp, layout.ep
    layers = layers_of_stage(model, layout, stage)
    moe = sum(model.moe[layer] for layer in layers)
    steps = layout.microbatches(training.global_batch, training.micro_batch)
    tokens = training.micro_batch * training.seq_length / cp
    whole = numbers * tokens * model.hidden
    again = training.recompute == "full"
    sums, border = (10, whole / tp) if layout.sequence_parallel else (8, whole)
    sums += 4 if again else 0
    sent = border * model.top_k * moe * (4 + (2 if again else 0)) * (ep - 1) / ep
    replicas = layout.dp * cp
    reduced = training.gradient + (training.parameter if training.distributed else training.gradient)
    return Communication(
        tp=steps * len(layers) * sums * whole * (tp - 1) / tp,
        cp=steps * cp_bytes(model, training, layout, layers),
        pp=0.0 if layout.pp == 1 else steps * 2 * layout.vpp * border,
        ep=steps * sent,
        dp=reduced
        * (
            count.dense * (replicas - 1) / replicas + count.expert * (layout.expert_dp - 1) / layout.expert_dp
        ),
        outside=_outside(layout, cluster),
    )


def cp_bytes(model: Model, training: Training, layout: Layout, layers: list[int]) -> float:
    """Bytes that context parallelism sends for one micro-batch: the formula of the module."""
    heads = model.heads / layout.tp
    groups = max(1, model.groups / layout.tp)
    each = training.parameter * training.micro_batch * training.seq_length / layout.cp * model.head_dim
    recomputed = training.recompute == "full" or (
        training.recompute == "selective" and "core_attn" in training.recompute_modules
    )
    again = 1 if recomputed else 0

    def ring(ranks: int) -> float:
        return (3 + again) * (ranks - 1) * each * 2 * groups

    def exchange(ranks: int) -> float:
        return (2 + again) * (ranks - 1) / ranks * each * (2 * heads + 2 * groups)

    total = 0.0
    for layer in layers:
        kind = training.cp_comm_types[layer]
        if kind == "a2a":
            total += exchange(layout.cp)
        elif kind == "a2a+p2p" and layout.cp > 1:
            inner = training.hierarchical[0]
            total += exchange(inner) + ring(layout.cp // inner)
        else:
            total += ring(layout.cp)
    return total


def _outside(layout: Layout, cluster: Cluster) -> frozenset[str]:
    """Kinds whose groups leave a node, in Megatron's order of ranks: TP, then CP, then DP, then PP."""
    spans = {
        "tp": layout.tp,
        "cp": layout.tp * layout.cp,
        "dp": layout.tp * layout.cp * layout.dp,
        "pp": layout.ranks,
        "ep": layout.etp * layout.ep,
    }
    used = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp * layout.cp, "pp": layout.pp, "ep": layout.ep}
    return frozenset(kind for kind, span in spans.items() if used[kind] > 1 and cluster.crosses_nodes(span))
