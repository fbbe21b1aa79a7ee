"""A plan as text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_fope.tools.planning.communication import KINDS, OUTSIDE
from megatron_fope.tools.planning.search import LONGEST_BUBBLE, Estimate, Plan

LEFT_OUT = (
    "Not counted, what the margin is for: CUDA context and NCCL buffers, fragmentation, padding of the "
    "distributed optimizer, workspaces of kernels, an uneven load of experts, FP8 copies, CUDA graphs.",
    "Attention is taken to be a flash kernel.",
)


def render(plan: Plan, show: int = 5) -> str:
    """The plan as text.

    Args:
        plan: what to show.
        show: layouts to list.
    """
    cluster, training = plan.cluster, plan.training
    lines = [
        f"cluster  {cluster.gpus} GPUs of {cluster.gpu_memory:g} GiB, {cluster.gpus_per_node} a node; "
        f"{cluster.margin:.0%} stay free, so {cluster.usable / 2**30:.1f} GiB to use",
        f"model    {plan.parameters / 1e9:.2f} billion parameters, {plan.model.layers} layers",
        f"batch    {training.global_batch} sequences of {training.seq_length:,} tokens a step, "
        f"{training.micro_batch} at a time",
        "",
    ]
    if plan.own is None:
        lines += ["Your flags name no layout, and without one the batch does not divide among the GPUs."]
    else:
        lines += _own(plan, plan.own)
    lines += ["", *_search(plan, show), "", *LEFT_OUT]
    if not training.flash:
        lines.append("Your flags choose attention that keeps S x S scores in every layer: they are counted.")
    if training.mask:
        lines.append(
            "The data loader makes a mask of S x S bytes for every sample, which flash attention does not "
            "read; turn it off with --no-create-attention-mask-in-dataloader"
        )
    return "\n".join(lines)


def _own(plan: Plan, own: Estimate) -> list[str]:
    memory, layout = own.memory, own.layout
    states, kept = memory.states, memory.activations
    count = memory.parameters.total
    where = "every rank" if layout.pp == 1 else f"a rank of pipeline stage {memory.stage + 1} of {layout.pp}"
    shared = "this rank's share" if plan.training.distributed else "all of it"
    rows = [
        ("parameters", states.parameters, f"{count / 1e9:.3f} billion"),
        ("gradients", states.gradients, ""),
        ("optimizer", states.optimizer, shared),
        ("activations kept", kept.kept, ""),
        ("activations at work", kept.working, "one layer"),
    ]
    if kept.output:
        rows.append(("last norm and logits", kept.output, ""))
    rows.append(("batch and its mask", kept.inputs, ""))
    if plan.model.fope is not None:
        learnable = plan.model.fope.learnable
        note = "learnable: among the parameters" if learnable else "all KV heads of its layers"
        rows.append(("FoPE coefficients", memory.coefficients, note))
        rows.append(("FoPE table", memory.table, "once for all layers"))
    rows.append(("total", memory.total, f"of {_size(plan.cluster.usable)}"))
    verdict = "fits"
    if not own.fits:
        largest = max(rows[:-1], key=lambda row: row[1])[0]
        verdict = (
            f"DOES NOT FIT, {_size(memory.total - plan.cluster.usable)} too much, most of it for {largest}"
        )
    lines = [f"Your layout, {layout}: {verdict}", f"  {where} holds"]
    lines += _sizes(rows)
    lines.append("  and sends in a step")
    sent = own.communication
    lines += _sizes(
        [
            (name, getattr(sent, kind), "between nodes" if kind in sent.outside else "inside a node")
            for kind, name in KINDS.items()
            if getattr(sent, kind)
        ]
    )
    if layout.pp > 1:
        lines.append(f"  The pipeline waits for {own.bubble:.0%} of a step.")
    if plan.megatron is not None:
        weights, activations = map(_size, plan.megatron)
        ours = _size(states.parameters + states.gradients + states.optimizer)
        lines.append(
            f"  Megatron's own estimate: weights and optimizer {weights} (here {ours}), activations "
            f"{activations} (here {_size(kept.kept + kept.working + kept.output)})"
        )
    return lines


def _sizes(rows: Sequence[tuple[str, float, str]]) -> list[str]:
    return [f"    {name:20} {_size(size):>12}  {note}".rstrip() for name, size, note in rows]


def _search(plan: Plan, show: int) -> list[str]:
    if not plan.best:
        least = plan.smallest
        if least is None:
            return ["No layout divides the model, the sequence and the batch among these GPUs."]
        tried = f", also with {shlex.join(plan.added)}" if plan.added else ""
        return [
            f"None of {plan.legal} layouts fits{tried}. The one that takes the least is {least.layout}: "
            f"{_size(least.memory.total)} of {_size(plan.cluster.usable)}."
        ]
    lines = []
    if plan.added:
        lines.append(f"Nothing fits with your flags as they are. With {shlex.join(plan.added)} added:")
    lines += [
        f"{len(plan.best)} of {plan.legal} layouts fit. In the order of what a rank sends in a step, bytes "
        f"of groups over several nodes counted {OUTSIDE} times",
        "and overlap with computing not looked at; those whose pipeline waits for more than "
        f"{LONGEST_BUBBLE:.0%} of a step come last:",
        "",
        _row("TP", "PP", "CP", "EP", "DP", "memory", "sent inside", "between nodes", "CP alone", "waits"),
    ]
    for one in plan.best[:show]:
        at, sent = one.layout, one.communication
        sizes = map(_size, (one.memory.total, sent.inside, sent.between, sent.cp))
        lines.append(_row(at.tp, at.pp, at.cp, at.ep, at.dp, *sizes, f"{one.bubble:.0%}"))
    moe = bool(plan.model.experts)
    lines += ["", f"The first one: {shlex.join([*plan.best[0].layout.flags(moe), *plan.added])}"]
    if plan.recomputed:
        first = plan.recomputed[0]
        inside, between = map(_size, (first.communication.inside, first.communication.between))
        lines.append(
            f"With full recomputation, a third more computing, {len(plan.recomputed)} fit. The first one: "
            f"{first.layout}, {_size(first.memory.total)}, sends {inside} inside, {between} between nodes"
        )
    return lines


def _row(*cells: object) -> str:
    widths = (3, 3, 4, 3, 4, 12, 12, 14, 12, 6)
    return "  " + " ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _size(size: float) -> str:
    """Bytes with a unit: powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
