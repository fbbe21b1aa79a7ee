"""A plan: what the user's own layout takes, and which layouts fit with the least communication."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_fope import compat
from megatron_fope.arguments.layout import Layout, check_layout
from megatron_fope.common.errors import UserError
from megatron_fope.tools.planning.activations import Activations, activations
from megatron_fope.tools.planning.cluster import Cluster
from megatron_fope.tools.planning.communication import Communication, communication
from megatron_fope.tools.planning.layout import legal_layouts
from megatron_fope.tools.planning.model import Model, Training, read_model, read_training
from megatron_fope.tools.planning.states import Parameters, States, parameters, states

LONGEST_BUBBLE = 0.1
"""Layouts whose pipeline waits for a larger share of a step come after all others."""

_Change = tuple[tuple[str, ...], dict[str, Any]]
"""Flags, and the settings that they change."""

_RECOMPUTE: _Change = (
    (
        *("--recompute-granularity", "full"),
        *("--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ),
    {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 1},
)
_CHANGES: tuple[_Change, ...] = (
    ((), {}),
    (("--use-distributed-optimizer",), {"distributed": True}),
    _RECOMPUTE,
)
"""What is added, one after the other, as long as no layout fits."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage."""

    stage: int
    parameters: Parameters
    states: States
    activations: Activations
    coefficients: int
    """FoPE's, frozen; learnable ones are among the states."""
    table: int
    """FoPE's sine and cosine of every position of the rank and every frequency, once for all layers."""

    @property
    def total(self) -> float:
        s, a = self.states, self.activations
        between = s.parameters + s.gradients + s.optimizer + self.coefficients + self.table
        return between + a.kept + a.working + a.output + a.inputs


@dataclass(frozen=True)
class Estimate:
    """One layout."""

    layout: Layout
    memory: Memory
    """Of the stage that takes the most."""
    communication: Communication
    """Of the same stage."""
    bubble: float
    """Share of a step in which the pipeline waits."""
    fits: bool

    @property
    def rank(self) -> tuple[bool, float, int, int, int, int]:
        """What layouts are ordered by: a short bubble, then the least communication, then small groups."""
        layout = self.layout
        sizes = (layout.tp, layout.cp, layout.pp, layout.ep)
        return (self.bubble > LONGEST_BUBBLE, self.communication.cost, *sizes)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found."""

    model: Model
    training: Training
    """Of the user's own flags."""
    cluster: Cluster
    own: Estimate | None
    """Of the user's own layout; None where no layout is given and none at all does not divide."""
    best: tuple[Estimate, ...]
    """Layouts that fit, the best first."""
    added: tuple[str, ...]
    """Flags that ``best`` needs besides the user's."""
    recomputed: tuple[Estimate, ...]
    """As ``best``, with :attr:`recompute_flags` added; empty where nothing fits or ``best`` recomputes."""
    legal: int
    """Layouts that divide."""
    smallest: Estimate | None
    """Without one that fits: the layout that takes the least."""
    megatron: tuple[float, float] | None
    """Megatron's own estimate for the user's layout: bytes of weights and optimizer, of activations."""

    @property
    def recompute_flags(self) -> tuple[str, ...]:
        """What turns full recomputation on."""
        return _RECOMPUTE[0]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.model, Layout(), stage=0).total


def plan(args: Any, cluster: Cluster) -> Plan:
    """Estimate memory and communication of a run on a cluster and look for layouts that fit.

    Args:
        args: Megatron's arguments as its parser makes them (:mod:`megatron_fope.arguments.parser`), or as
            they are in a run; not changed.
        cluster: the machines.

    Raises:
        UserError: a flag is missing, its memory is not known, or the given layout does not divide.
    """
    model, training = read_model(args), read_training(args)
    own = _own(args, model, training, cluster)
    given_etp = getattr(args, "expert_tensor_parallel_size", None)
    added: tuple[str, ...] = ()
    changed, found = training, []
    for flags, settings in _CHANGES:
        new = dataclasses.replace(changed, **settings)
        if flags and new == changed:
            continue
        changed, added = new, added + flags
        found = _estimates(model, changed, cluster, given_etp)
        if any(one.fits for one in found):
            break
    fitting = _fitting(found)
    recomputed: list[Estimate] = []
    if fitting and changed.recompute != "full":
        changed = dataclasses.replace(changed, **_RECOMPUTE[1])
        recomputed = _fitting(_estimates(model, changed, cluster, given_etp))
    return Plan(
        model,
        training,
        cluster,
        own=own,
        best=tuple(fitting),
        added=added,
        recomputed=tuple(recomputed),
        legal=len(found),
        smallest=None if fitting else min(found, key=lambda one: one.memory.total, default=None),
        megatron=None if own is None else _megatron(args, model, training, own.layout),
    )


def _estimates(model: Model, training: Training, cluster: Cluster, etp: int | None) -> list[Estimate]:
    layouts = legal_layouts(model, training, cluster, etp)
    return [estimate(model, training, layout, cluster) for layout in layouts]


def _fitting(found: list[Estimate]) -> list[Estimate]:
    return sorted((one for one in found if one.fits), key=lambda one: one.rank)


def estimate(model: Model, training: Training, layout: Layout, cluster: Cluster) -> Estimate:
    """Memory and communication of one layout, both of the stage that takes the most memory."""
    stages: Iterable[int] = range(layout.pp)
    if layout.pp > 2 and len(set(model.moe)) == 1:
        stages = (0, 1, layout.pp - 1)  # those between hold less than the second
    memory = max((memory_of(model, training, layout, s) for s in stages), key=lambda one: one.total)
    steps = layout.microbatches(training.global_batch, training.micro_batch)
    return Estimate(
        layout,
        memory,
        communication(model, training, layout, cluster, memory.parameters, memory.stage),
        # (PP - 1) of every (micro-batches x VPP + PP - 1) steps of the pipeline
        bubble=(layout.pp - 1) / (steps * layout.vpp + layout.pp - 1),
        fits=memory.total <= cluster.usable,
    )


def memory_of(model: Model, training: Training, layout: Layout, stage: int) -> Memory:
    """Everything that a rank of a stage holds."""
    count = parameters(model, layout, stage)
    fope = model.fope
    frozen = fope is not None and not fope.learnable
    tokens = training.seq_length // layout.cp
    return Memory(
        stage,
        count,
        states(count, training, layout),
        activations(model, training, layout, stage),
        coefficients=4 * model.coefficients() * (model.layers // layout.pp) if frozen else 0,
        table=2 * tokens * model.geometry.d_in * 4 if fope is not None else 0,
    )


_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_distributed_optimizer_instances"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    "hierarchical_context_parallel_sizes",
)
"""Arguments that make up a layout; None or 1 where none is given."""


def _own(args: Any, model: Model, training: Training, cluster: Cluster) -> Estimate | None:
    checked = copy.copy(args)
    checked.world_size, checked.ffn_hidden_size = cluster.gpus, model.ffn
    try:
        check_layout(checked, world_name="--gpus", complete=True)
    except UserError:
        if all((getattr(args, name, None) or 1) == 1 for name in _SIZES):
            return None  # no layout is given: one is looked for
        raise
    return estimate(model, training, Layout.of(checked), cluster)


def _megatron(args: Any, model: Model, training: Training, layout: Layout) -> tuple[float, float]:
    filled = argparse.Namespace(**vars(args))
    filled.ffn_hidden_size, filled.kv_channels = model.ffn, model.head_dim
    filled.moe_ffn_hidden_size = model.expert_ffn
    filled.padded_vocab_size = model.padded_vocabulary(layout.tp)
    filled.world_size, filled.data_parallel_size = layout.ranks, layout.dp
    filled.expert_tensor_parallel_size = layout.etp
    filled.virtual_pipeline_model_parallel_size = layout.vpp if layout.vpp > 1 else None
    return compat.theoretical_memory(filled, layout.microbatches(training.global_batch, training.micro_batch))
