"""The RoPE that this Megatron computes for a model, asked from Megatron's own code.

What a flag says and what a model does are not always the same: a builder may drop a flag on its way to the
model, a model class may have no place for it. So the arguments go through Megatron's builder and the model
class's signature into Megatron's own rotary module, and its angles are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from megatron_fope import compat
from megatron_fope.arguments.megatron import head_dim_of, is_hybrid
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import quiet_imports
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.formula.geometry import rotary_frequencies

ROPE_TYPES = ("rope", "yarn")
"""Values of ``--position-embedding-type`` that rotate pairs of channels by RoPE's angles."""

Scalable = Literal["never", "unscaled", "any"]
"""Which RoPE models a start may scale anew."""

_PASSED: set[str] | None = None
"""What the training script passed to the model that it built last; None: it has built none."""


@dataclass(frozen=True)
class Rope:
    """What a RoPE model does with a head's channels."""

    angles: Tensor
    """Angle at position 1 of every rotated pair, ``[pairs]`` float32 on CPU."""
    amplitude: float
    """Factor on sin and cos."""


class _Arguments(argparse.Namespace):
    """Arguments of which an older checkpoint may lack some."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def note_construction(arguments: dict[str, Any]) -> None:
    """Remember what a training script's builder passes to its model class.

    Megatron has builders that drop different flags, and every training script may bring its own.

    Args:
        arguments: the constructor's, by name.
    """
    global _PASSED
    _PASSED = set(arguments)


def rope_of(args: Any) -> Rope:
    """The RoPE of a model that this Megatron builds from arguments.

    Args:
        args: a run's or a checkpoint's arguments, with ``position_embedding_type`` "rope" or "yarn".

    Raises:
        UserError: its RoPE is no rotation of channel pairs, or this Megatron cannot build it.
    """
    # Megatron's modules move their frequencies to the current GPU before they answer.
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"), quiet_imports():
        module = _module(args)
        embedding = module.get_emb(2)
    embedding, amplitude = embedding if isinstance(embedding, tuple) else (embedding, 1.0)
    angles = embedding[1, 0, 0]
    interleaved = getattr(module, "rotary_interleaved", False)
    if interleaved != bool(getattr(args, "rotary_interleaved", False)):
        raise UserError(
            "--rotary-interleaved is given, but this Megatron's hybrid models then rotate channels by angles "
            "of other pairs, which is no RoPE"
        )
    return Rope(angles[::2] if interleaved else angles[: angles.numel() // 2], float(amplitude))


def scaling_of(args: Any) -> dict[str, Any]:
    """FoPE's settings for what Megatron's own flags do to RoPE's frequencies.

    Args:
        args: a run's arguments.

    Returns:
        Fields of :class:`FoPEConfig`; empty where this Megatron's RoPE ignores the flags, or there are none.

    Raises:
        UserError: two of them at once.
    """
    if not _flags_of(args) or getattr(args, "multi_latent_attention", False):
        return {}
    passed = _model_arguments(args)
    linear = passed.get("seq_len_interpolation_factor")
    if passed.get("rope_scaling"):
        if linear is not None:
            raise UserError(
                "--use-rope-scaling is given with --rotary-seq-len-interpolation-factor, but FoPE scales "
                "frequencies in one way; use one of them, or --fope-scaling"
            )
        factor = float(passed["rope_scaling_factor"])
        # The length is built in there.
        return {"scaling": "llama3", "scaling_factor": factor, "original_length": 8192}
    return {"scaling": "linear", "scaling_factor": float(linear)} if linear is not None else {}


def ignored_flags(args: Any) -> list[str]:
    """One line for every flag about RoPE's frequencies that this Megatron does not apply as given."""
    scaling = scaling_of(args)
    lines = []
    for name, (field, value, way) in _flags_of(args).items():
        if scaling.get("scaling") != way:
            lines.append(
                f"{name} has no effect on RoPE in this Megatron, and none on FoPE; {_advice(way, value)}"
            )
        elif scaling["scaling_factor"] != value:
            used = scaling["scaling_factor"]
            lines.append(
                f"{field} is {value:g}, but RoPE uses {used:g} in this Megatron, and so does FoPE; "
                f"{_advice(way, value)}"
            )
    return lines


def check_same_rope(
    args: Any, stored: Any, config: FoPEConfig, where: str, *, may_scale: Scalable = "never"
) -> bool:
    """Refuse to continue a RoPE model whose angles FoPE does not have.

    Args:
        args: the run's arguments.
        stored: the RoPE checkpoint's; what they lack is taken from ``args``.
        config: the run's settings.
        where: how messages name the checkpoint: "the checkpoint in FOLDER".
        may_scale: of which models FoPE's settings may scale the frequencies anew: of none, of those that
            were trained without a scaling, of all.

    Returns:
        Whether the frequencies are the checkpoint's; False: they are scaled anew.

    Raises:
        UserError: naming the difference and what to do.
    """
    stored = argparse.Namespace(**{**vars(args), **vars(stored), "rotary_base": args.rotary_base})
    head_dim = head_dim_of(args)
    rope = rope_of(stored)
    if rope.angles.numel() * 2 != head_dim:
        raise UserError(
            f"--rotary-percent was {stored.rotary_percent} for {where}; FoPE rotates the whole head and "
            "cannot continue it"
        )
    if _equal(config, rope, head_dim):
        return True
    unscaled = dataclasses.replace(config, scaling="none", attention_scaling=1.0)
    if _scaled(config) and (
        may_scale == "any" or (may_scale == "unscaled" and _equal(unscaled, rope, head_dim))
    ):
        return False
    right = next(
        (s for s in _candidates(stored, rope) if _equal(dataclasses.replace(config, **s), rope, head_dim)),
        None,
    )
    if right is None:
        raise UserError(
            f"the RoPE frequencies of {where} are none that FoPE can have with --rotary-base "
            f"{args.rotary_base:g} and any --fope-scaling"
        )
    flags = " ".join(f"{flag(name)} {value}" for name, value in right.items())
    raise UserError(
        f"{where} has other RoPE frequencies than this run, as this Megatron computes them; use {flags}"
    )


def _flags_of(args: Any) -> dict[str, tuple[str, float, str]]:
    """Megatron's flags about RoPE's frequencies that are given: the one with the factor, it, FoPE's way."""
    flags = {}
    if getattr(args, "use_rope_scaling", False):
        flags["--use-rope-scaling"] = ("--rope-scaling-factor", float(args.rope_scaling_factor), "llama3")
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor is not None:
        name = "--rotary-seq-len-interpolation-factor"
        flags[name] = (name, float(factor), "linear")
    return flags


def _advice(way: str, value: float) -> str:
    length = " --fope-original-length 8192" if way == "llama3" else ""
    return f"for FoPE alone: --fope-scaling {way} --fope-scaling-factor {value:g}{length}"


def _scaled(config: FoPEConfig) -> bool:
    return config.scaling != "none" or config.attention_scaling != 1.0


def _equal(config: FoPEConfig, rope: Rope, head_dim: int) -> bool:
    mine = rotary_frequencies(config, head_dim).float()
    amplitude = abs(config.attention_scaling - rope.amplitude) <= 1e-6 * rope.amplitude
    return amplitude and torch.allclose(mine, rope.angles, rtol=1e-5, atol=0.0)


def _candidates(stored: Any, rope: Rope) -> list[dict[str, Any]]:
    """Settings with which FoPE may have a checkpoint's angles."""
    ways: list[dict[str, Any]] = [{"scaling": "none"}]
    if scaling := scaling_of(stored):
        ways.append(scaling)
    yarn = _yarn_settings(stored)
    if yarn is not None:
        ways.append(
            {
                "scaling": "yarn",
                "scaling_factor": float(yarn["scaling_factor"]),
                "original_length": yarn["original_max_position_embeddings"],
                "yarn_beta_fast": float(yarn["beta_fast"]),
                "yarn_beta_slow": float(yarn["beta_slow"]),
            }
        )
    return [{**way, "attention_scaling": rope.amplitude} for way in ways]


def _module(args: Any) -> Any:
    """The rotary module as the model builds it or, under latent attention, ``MLASelfAttention``."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    yarn = _yarn_settings(args)
    if getattr(args, "multi_latent_attention", False):
        config = _latent_config(args)
        passed = {name: config[name] for name in ("rotary_base", "rotary_percent")}
    else:
        if yarn is None and args.position_embedding_type == "yarn":
            raise UserError(
                "the checkpoint was trained with --position-embedding-type yarn, which this Megatron cannot "
                "build from its flags; use a newer one"
            )
        passed = _model_arguments(args)
        if issubclass(_model_class(args), compat.model_classes()[0][0]):  # only GPT models pass it on
            passed["rotary_interleaved"] = bool(getattr(args, "rotary_interleaved", False))
    module_class = RotaryEmbedding if yarn is None else YarnRotaryEmbedding
    known = inspect.signature(module_class).parameters
    passed = {name: value for name, value in passed.items() if name in known} | (yarn or {})
    return module_class(head_dim_of(args), use_cpu_initialization=True, **passed)


def _latent_config(args: Any) -> dict[str, Any]:
    """Fields of ``MLATransformerConfig`` as Megatron fills them: from the arguments, else their defaults."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    values = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
    given = {name: getattr(args, name) for name in values if hasattr(args, name)}
    if given.get("rope_type") is None:
        given.pop("rope_type", None)
    return values | given


def _yarn_settings(args: Any) -> dict[str, Any] | None:
    """Arguments of ``YarnRotaryEmbedding``; None for a model without YaRN."""
    if getattr(args, "multi_latent_attention", False):
        config = _latent_config(args)
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if config["rope_type"] != "yarn":
            return None
        return {name: config[name] for name in names} | {"scaling_factor": config["rotary_scaling_factor"]}
    if args.position_embedding_type != "yarn":
        return None
    return compat.yarn_settings(args)


def _model_class(args: Any) -> type:
    return compat.model_classes()[-1 if is_hybrid(args) else 0][0]


def _model_arguments(args: Any) -> dict[str, Any]:
    """Arguments about RoPE that reach the model class, its defaults filled in."""
    model_class = _model_class(args)
    lenient = _Arguments(**{**vars(args), "position_embedding_type": "rope", "padded_vocab_size": 1})
    passed = compat.rope_arguments(lenient, hybrid=is_hybrid(args))
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    reached = {name for name in passed if name in known and (_PASSED is None or name in _PASSED)}
    # An older checkpoint does not name every argument.
    return known | {name: passed[name] for name in reached if passed[name] is not None}
