"""Parameters of a rank, and the bytes of everything that is held per parameter between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fope.arguments.layout import Layout
from megatron_fope.tools.planning.model import Model, Training


@dataclass(frozen=True)
class Parameters:
    """How many numbers one rank trains."""

    dense: int
    """Held by TP x PP ranks together, and copied over the others."""
    expert: int
    """Held by ETP x EP x PP ranks together."""
    coefficients: int
    """FoPE's, if they are learnable; float32 whatever the model is."""

    @property
    def total(self) -> int:
        return self.dense + self.expert + self.coefficients


def parameters(model: Model, layout: Layout, stage: int) -> Parameters:
    """Count the parameters of one rank, exactly as Megatron's local and TE layer specs create them.

    Args:
        stage: pipeline stage, from 0. Embedding and output layer belong to the first and the last one; a
            model in which both are one matrix has a copy on each.
    """
    tp, hidden, norm = layout.tp, model.hidden, model.norm
    first, last = stage == 0, stage == layout.pp - 1
    moe = sum(model.moe[layer] for layer in layers_of_stage(model, layout, stage))
    layers = model.layers // layout.pp
    dense = layers * (_attention(model, tp) + 2 * norm * hidden)
    dense += (layers - moe) * _mlp(model, model.ffn, tp)
    expert = 0
    if moe:
        router = hidden * model.experts + (model.experts if model.bias else 0)
        shared = _mlp(model, model.shared_ffn, tp) if model.shared_ffn else 0
        gate = hidden if model.shared_ffn and model.shared_gate else 0
        dense += moe * (router + shared + gate)
        expert = moe * (model.experts // layout.ep) * _mlp(model, model.expert_ffn, layout.etp)
    vocabulary = model.padded_vocabulary(tp) // tp * hidden
    if first:
        dense += vocabulary + model.positions * hidden
    if last:
        dense += norm * hidden
        if layout.pp > 1 or not model.tied:
            dense += vocabulary
    learnable = model.fope is not None and model.fope.learnable
    return Parameters(dense, expert, layers * model.coefficients() if learnable else 0)


@dataclass(frozen=True)
class States:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: float
    """Main parameters and Adam's moments; this rank's share under the distributed optimizer."""


def states(count: Parameters, training: Training, layout: Layout) -> States:
    """Bytes of parameters, gradients and optimizer.

    The distributed optimizer shares its part among DP x CP ranks, that of experts among the ranks that hold
    the same ones. Its buffers are padded to multiples of 64 numbers a tensor; the padding is left out.
    """
    copies = {"dense": layout.dp * layout.cp, "expert": layout.expert_dp}
    shares = {
        kind: max(1, ranks // training.instances) if training.distributed else 1
        for kind, ranks in copies.items()
    }
    model = count.dense + count.expert
    per_share = count.dense / shares["dense"] + count.expert / shares["expert"]
    kept = count.coefficients / shares["dense"]
    return States(
        parameters=training.parameter * model + 4 * count.coefficients,
        gradients=round(
            training.gradient * model + training.main_gradient * per_share + 4 * count.coefficients
        ),
        optimizer=(training.main + training.adam) * per_share + 8 * kept,
    )


def _attention(model: Model, tp: int) -> int:
    query, both = model.heads * model.head_dim, 2 * model.groups * model.head_dim
    count = (model.hidden * (query + both) + query * model.hidden) // tp
    if model.qkv_bias:
        count += (query + both) // tp
    if model.bias:
        count += model.hidden
    if model.qk_norm:
        count += 2 * model.norm * model.head_dim
    return count


def _mlp(model: Model, width: int, tp: int) -> int:
    count = (model.gate + 1) * model.hidden * width // tp
    if model.bias:
        count += model.gate * width // tp + model.hidden
    return count


def layers_of_stage(model: Model, layout: Layout, stage: int) -> list[int]:
    """Layers of a pipeline stage, from 0, in the order of its chunks."""
    size = model.layers // (layout.pp * layout.vpp)
    starts = [(chunk * layout.pp + stage) * size for chunk in range(layout.vpp)]
    return [layer for start in starts for layer in range(start, start + size)]
