"""What was really built: per layer, for logs, examples and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megatron_fope.formula.config import FoPEConfig

if TYPE_CHECKING:
    from megatron_fope.kernels.backend import Backend

Model = torch.nn.Module | Sequence[torch.nn.Module]


@dataclass(frozen=True)
class LayerReport:
    """One attention layer of a model."""

    name: str
    """Qualified module name."""
    layer_number: int
    attention: str
    """Class of the attention."""
    fope: FoPEConfig | None = None
    """None when the layer has no FoPE."""
    coefficients: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every coefficient tensor; all KV heads of the model."""
    d_in: int = 0
    """Frequencies in the basis."""
    d_out: int = 0
    """Channel pairs with a Fourier series."""
    num_pairs: int = 0
    """Channel pairs per head."""
    num_clipped: int = 0
    """Rotary frequencies below the floor."""
    rotates: bool = False
    """False in layers that Megatron leaves without position embedding (``--no-rope-freq``)."""
    path: str = ""
    """Which implementation rotates."""

    def __str__(self) -> str:
        if self.fope is None:
            return f"{self.name}: {self.attention}, no FoPE"
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.coefficients.items())
        path = self.path if self.rotates else "not rotated (no_rope_freq)"
        return f"{self.name}: {self.attention}, {shapes}, D_in {self.d_in}, D_out {self.d_out}, {path}"

    def summary(self) -> str:
        """One line for logs: profile, train length, frequencies and their scaling, channels, gain."""
        fope = self.fope
        if fope is None:
            return "no FoPE"
        scaling = ""
        if fope.scaling != "none":
            order = "before" if fope.scaling_before_clip else "after"
            scaling = f"scaled ({fope.scaling}) {order} the clip, "
        if fope.attention_scaling != 1 or fope.scaling != "none":
            scaling += f"sin and cos times {fope.attention_scaling:g}, "
        return (
            f"profile {fope.profile}, train length {fope.train_length} tokens, {self.d_in} frequencies in "
            f"the basis ({self.num_clipped} clipped), {self.d_out} of {self.num_pairs} channel pairs with a "
            f"series (the others sin,cos = {fope.pad_value}), {scaling}gain {fope.gain:g}, "
            f"{'learnable' if fope.learnable else 'frozen'} coefficients"
        )


def describe(model: Model) -> list[LayerReport]:
    """Every self-attention layer of a model (this rank's share), with or without FoPE.

    Args:
        model: a Megatron model, wrapped or not, or the list of chunks that Megatron trains.

    Returns:
        One report per attention layer; ``print(*describe(model), sep="\\n")`` shows them.
    """
    from megatron.core.transformer.attention import Attention

    from megatron_fope.layers.attention import FoPEAttention

    reports = []
    for name, module in _modules(model):
        if not isinstance(module, Attention) or module.attention_type != "self":
            continue
        common: dict[str, Any] = {
            "name": name,
            "layer_number": module.layer_number,
            "attention": type(module).__name__,
        }
        if not isinstance(module, FoPEAttention):
            reports.append(LayerReport(**common))
            continue
        embedding, geometry = module.fope, module.fope.geometry
        reports.append(
            LayerReport(
                **common,
                fope=geometry.config,
                coefficients={
                    n: tuple(getattr(embedding, n).shape) for n in geometry.config.coefficient_names
                },
                d_in=geometry.d_in,
                d_out=geometry.d_out,
                num_pairs=geometry.head_dim // 2,
                num_clipped=geometry.num_clipped,
                rotates=module.fope_rotates,
                path=str(_backend(module)),
            )
        )
    return reports


def _modules(model: Model) -> Iterator[tuple[str, torch.nn.Module]]:
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        yield from chunk.named_modules()


def _backend(attention: Any) -> Backend:
    """What will rotate a layer's queries and keys."""
    from megatron_fope.kernels.backend import current_device

    embedding, ranks = attention.fope, attention.pg_collection.tp.size()
    return embedding.backend(
        current_device(),
        attention.config.params_dtype,
        heads=attention.config.num_attention_heads // ranks,
        groups=max(1, embedding.geometry.num_kv_heads // ranks),
        rows=embedding.fope.train_length,
    )


def assert_fope_active(model: Model) -> list[LayerReport]:
    """Check that every self-attention layer has FoPE, and that nothing else embeds positions.

    Returns:
        The layers' reports.

    Raises:
        RuntimeError: a layer without FoPE, or no attention layer at all (a model built before
            registration, for example); rotary or learned absolute embeddings beside FoPE.
    """
    reports = describe(model)
    without = [report.name for report in reports if report.fope is None]
    if without:
        raise RuntimeError(
            f"{len(without)} of {len(reports)} attention layers have no FoPE: {', '.join(without)}"
        )
    if not reports:
        raise RuntimeError("the model has no self-attention layer")
    for name in _other_position_embeddings(model):
        raise RuntimeError(
            f"the model has another position embedding besides FoPE, {name}; use "
            "position_embedding_type='none' for models built from a layer spec (and the same in a "
            "config.position_embedding_type, which wins over the argument)"
        )
    return reports


def _other_position_embeddings(model: Model) -> Iterator[str]:
    """Names of what embeds positions outside the attention layers."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule

    for name, module in _modules(model):
        if isinstance(module, LanguageModule) and getattr(module, "rotary_pos_emb", None) is not None:
            yield f"{name}.rotary_pos_emb".lstrip(".")
        if isinstance(module, LanguageModelEmbedding) and module.add_position_embedding:
            yield f"{name}.position_embeddings".lstrip(".")


def layer_list(model: Model) -> str:
    """One line for logs: which layers have FoPE, and which have no position embedding on purpose.

    Args:
        model: as for :func:`describe`.

    Returns:
        For example ``6 attention layers: decoder 1-4, mtp 1-2; not rotated (--no-rope-freq): decoder 4``.
        What stands where attention could stand and has no position embedding (linear attention, Mamba,
        cross-attention: with RoPE neither) is counted behind them.
    """
    reports = [report for report in describe(model) if report.fope is not None]
    still = [report for report in reports if not report.rotates]
    text = f"{len(reports)} attention layers: {_layer_numbers(reports)}"
    if still:
        text += f"; not rotated (--no-rope-freq): {_layer_numbers(still)}"
    others = _layers_without_positions(model)
    if others:
        text += "; without position embedding: " + ", ".join(f"{n} {name}" for name, n in others.items())
    return text


def _layer_numbers(reports: list[LayerReport]) -> str:
    """``decoder 1-4, mtp 1``: Megatron's layer numbers by stack, runs shortened."""
    numbers: dict[str, list[int]] = {}
    for report in reports:
        stack = "mtp" if "mtp." in report.name else "decoder"
        numbers.setdefault(stack, []).append(report.layer_number)
    texts = []
    for stack, values in numbers.items():
        runs: list[list[int]] = []
        for value in values:
            if runs and value == runs[-1][-1] + 1:
                runs[-1].append(value)
            else:
                runs.append([value])
        texts += [f"{stack} " + ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)]
    return ", ".join(texts)


def _layers_without_positions(model: Model) -> dict[str, int]:
    """Classes in the place of attention that get no position embedding, with their number."""
    from megatron.core.ssm.mamba_mixer import MambaMixer
    from megatron.core.transformer.attention import Attention, CrossAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_layer import TransformerLayer

    names: Counter[str] = Counter()
    for _, module in _modules(model):
        if isinstance(module, (CrossAttention, MambaMixer)):
            names[type(module).__name__] += 1
        attention = module.self_attention if isinstance(module, TransformerLayer) else None
        if attention is not None and not isinstance(attention, (Attention, IdentityOp)):
            names[type(attention).__name__] += 1
    return names
