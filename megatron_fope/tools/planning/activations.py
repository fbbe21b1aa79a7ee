"""Bytes that one rank keeps from a forward pass for the backward pass, and what it works with.

The attention is taken to be a flash kernel, which keeps queries, keys, values, its output and one float32 per
query and head; where the flags choose another one, its scores come on top. What each module keeps, in bytes
per token of the rank, with ``e`` bytes per number, ``h`` the hidden size, ``q`` and ``k`` the query and KV
channels of the rank, ``f`` its share of the MLP's width:

=================== ==================================================================================
norms               ``4 e h`` (input and output of both), cut by sequence parallelism
query, key, value   ``e (q + 2 k)``: one buffer, of which the value stays a part
rotated             ``e (q + k)``
attention           ``e q + 4`` per head
not a flash kernel  ``e`` for every key of the sequence and head, with dropout ``3 e``
MLP                 ``e f`` for its second matrix, ``e f`` or with a gate ``2 e f`` for the activation; a
                    gated one that is not fused keeps ``2 e f`` more
experts             the same for every token sent to the rank's experts, ``e h`` for each of them, with an
                    activation that is not fused ``e f`` more; 14 for every expert in the router; the load is
                    taken to be balanced
dropout             ``h`` after attention, MLP and embedding each
output              ``2 e h`` of the last norm; logits ``(e + 4)`` per entry of the vocabulary
=================== ==================================================================================

Full recomputation keeps the inputs of layers, ``e h`` each, and works with the layers that are recomputed at
once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fope.arguments.layout import Layout
from megatron_fope.tools.planning.model import Model, Training
from megatron_fope.tools.planning.states import layers_of_stage


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank when it holds the most."""

    kept: float
    """For the backward passes of the micro-batches in flight."""
    working: float
    """For the layer that is worked on: its recomputed activations and its gradients."""
    output: float
    """Last norm and logits of one micro-batch, on the last stage."""
    inputs: float
    """Tokens, labels, positions and masks of one micro-batch."""


def activations(model: Model, training: Training, layout: Layout, stage: int) -> Activations:
    """What one rank of a pipeline stage holds."""
    numbers = training.parameter
    tokens = training.micro_batch * training.seq_length / layout.cp
    cut = layout.tp if layout.sequence_parallel else 1
    border = numbers * model.hidden * tokens / cut
    layers = layers_of_stage(model, layout, stage)
    whole = {moe: layer_bytes(model, training, layout, moe=moe) for moe in {model.moe[i] for i in layers}}
    kept = sum(whole[model.moe[layer]] for layer in layers)
    embedding = border / numbers if stage == 0 and training.hidden_dropout else 0.0
    widths = [model.top_k * model.expert_ffn / cut if moe else model.ffn / layout.tp for moe in whole]
    # Gradients of an MLP's two hidden tensors, and the input that sequence parallelism gathers.
    working = numbers * tokens * ((model.gate + 1) * max(widths) + model.hidden)
    if not training.flash:  # Megatron's buffer, and the gradients of scores and probabilities
        working += 3 * _scores(model, training, layout)
    if training.recompute == "full":
        saved = border / layout.tp if training.distribute_saved and cut == 1 else border
        at_once = training.recompute_layers if training.recompute_method == "uniform" else 1
        chunk = len(layers) // layout.vpp
        if training.recompute_method == "uniform":
            kept = layout.vpp * -(-chunk // training.recompute_layers) * saved
        else:
            recomputed = min(training.recompute_layers, chunk)
            rest = [layer for i, layer in enumerate(layers) if i % chunk >= recomputed]
            kept = layout.vpp * recomputed * saved + sum(whole[model.moe[layer]] for layer in rest)
        working += min(at_once, chunk) * max(whole.values())
    output = 0.0
    if stage == layout.pp - 1:
        logits = model.padded_vocabulary(layout.tp) / layout.tp
        output = 2 * border + tokens * logits * (numbers if training.loss_in_place else numbers + 4)
    samples = training.micro_batch * training.seq_length
    return Activations(
        kept=(kept + embedding) * in_flight(training, layout, stage),
        working=working,
        output=output,
        inputs=samples * 28 + (samples * training.seq_length if training.mask else 0),
    )


def in_flight(training: Training, layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once, in passes through all its layers.

    One forward, one backward: PP minus the stage. Interleaved, in chunks: PP x VPP + PP - 1 on the first
    stage, two fewer on each that follows.
    """
    count = layout.microbatches(training.global_batch, training.micro_batch)
    if layout.vpp == 1:
        return min(count, layout.pp - stage)
    chunks = layout.pp * layout.vpp + layout.pp - 1 - 2 * stage
    return min(count, chunks / layout.vpp)


def layer_bytes(model: Model, training: Training, layout: Layout, *, moe: bool) -> float:
    """Bytes that one layer keeps of one micro-batch, less what selective recomputation leaves out."""
    numbers, tp = training.parameter, layout.tp
    tokens = training.micro_batch * training.seq_length / layout.cp
    border = tokens / (tp if layout.sequence_parallel else 1)
    modules = training.recompute_modules if training.recompute == "selective" else ()
    heads = model.heads / tp
    query, key = heads * model.head_dim, max(1, model.groups / tp) * model.head_dim
    kept = border * model.hidden * numbers * (2 if "layernorm" in modules else 4)
    kept += tokens * numbers * (query + 2 * key + query)
    if "core_attn" not in modules:
        kept += tokens * 4 * heads
        if not training.flash:
            kept += (3 if training.attention_dropout else 1) * _scores(model, training, layout)
    if model.rotary:
        kept += tokens * numbers * (query + key)
    if training.hidden_dropout:
        kept += 2 * border * model.hidden
    hidden = 1 if training.fused_activation or not model.gated else 3
    if not moe:
        return (
            kept if "mlp" in modules else kept + _hidden(model.ffn / tp, model.gate, hidden, tokens, numbers)
        )
    if "moe" in modules:
        return kept
    sent = border * model.top_k * layout.etp
    scores = 0 if training.fused_activation else 1  # not fused, they are multiplied in afterwards
    act = 0 if "moe_act" in modules else hidden + scores
    kept += border * model.experts * 14
    kept += sent * numbers * model.hidden
    kept += _hidden(model.expert_ffn / layout.etp, model.gate, act, sent, numbers)
    if model.shared_ffn and "shared_experts" not in modules:
        kept += _hidden(model.shared_ffn / tp, model.gate, hidden, tokens, numbers)
    return kept


def _scores(model: Model, training: Training, layout: Layout) -> float:
    """One number for every query, key and head of the rank."""
    tokens = training.micro_batch * training.seq_length / layout.cp
    return training.parameter * tokens * training.seq_length * model.heads / layout.tp


def _hidden(width: float, gate: int, activation: int, tokens: float, numbers: int) -> float:
    """What an MLP keeps besides its input."""
    return tokens * width * numbers * (gate + activation)
