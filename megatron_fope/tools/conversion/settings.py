"""The arguments of a converted checkpoint."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_fope.arguments.flags import (
    FIELDS,
    FOPE,
    START_FROM_ROPE,
    check_start_flags,
    fope_config_from_args,
    fope_config_of_checkpoint,
    resolve_fope_arguments,
)
from megatron_fope.arguments.rope import ROPE_TYPES
from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.checkpoint.start import FromRope, Grow
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig

ROPE = "rope"


@dataclass(frozen=True)
class Settings:
    """What a conversion turns into what."""

    args: argparse.Namespace
    """The new checkpoint's arguments."""
    old: FoPEConfig | None
    """None: the source is a RoPE model."""
    new: FoPEConfig | None
    """None: the result is a RoPE model."""
    folds: bool = False
    """Whether the padding's factor goes into the weights."""
    effect: str | None = None
    """What a start from RoPE does to the model's function, in one line."""


def plan(
    checkpoint: Checkpoint,
    position_embedding_type: str,
    given: dict[str, Any],
    *,
    rotary_base: float | None = None,
    seq_length: int | None = None,
    start: str | None = None,
) -> Settings:
    """Settle the new arguments.

    Args:
        checkpoint: the source.
        position_embedding_type: of the result, "fope" or "rope".
        given: FoPE's settings by field; the others are the source's, or the profile's defaults.
        rotary_base: new base; None: the source's.
        seq_length: new ``seq_length`` in tokens; None: the source's.
        start: how a RoPE model becomes FoPE, one of :data:`megatron_fope.arguments.flags.STARTS`.

    Raises:
        UserError: a setting that is not allowed, or does not fit the source.
    """
    kind = checkpoint.position_embedding_type
    allowed = (*ROPE_TYPES, FOPE)
    if kind not in allowed:
        raise UserError(
            f"SOURCE is {str(checkpoint.folder)!r} with position embedding {kind!r}; allowed: "
            f"{', '.join(allowed)}"
        )
    args = argparse.Namespace(**copy.deepcopy(vars(checkpoint.args)))
    if rotary_base is not None:
        _require_positive("--rotary-base", rotary_base)
        args.rotary_base = type(args.rotary_base)(rotary_base)
    if seq_length is not None:
        _require_positive("--seq-length", seq_length)
        args.seq_length = seq_length
        args.max_position_embeddings = max(args.max_position_embeddings or 0, seq_length)
    old = fope_config_of_checkpoint(checkpoint.args, checkpoint.args) if kind == FOPE else None
    _refuse_optimizer_of_learnable(checkpoint, old)
    if start is not None and (old is not None or position_embedding_type == ROPE):
        raise UserError(f"{START_FROM_ROPE} is {start!r}; requires a SOURCE of RoPE that becomes FoPE")
    if position_embedding_type == ROPE:
        return _to_rope(checkpoint, args, given, old)
    args.position_embedding_type, args.add_position_embedding = FOPE, False
    if getattr(args, "multi_latent_attention", False):
        args.rope_type = ROPE  # lengths are extended by FoPE's own settings
    folds, stored = bool(given.get("fold_padding")), checkpoint.args
    if folds and old is not None:
        if old.pad_value != "0,1":
            raise UserError(
                f"--fope-fold-padding is given, but SOURCE {str(checkpoint.folder)!r} has --fope-pad-value "
                f"{old.pad_value}; requires 0,1"
            )
        given = {"pad_value": "1,1"} | given
        stored = argparse.Namespace(**vars(stored) | {"fope_pad_value": given["pad_value"]})
        old = dataclasses.replace(old, pad_value=given["pad_value"])
    for field in FIELDS:
        value = given.get(field.name)
        if value is None and old is not None:
            value = getattr(old, field.name)
        setattr(args, f"fope_{field.name}", value)
    effect = None
    if old is None:
        new, effect = _start(checkpoint, args, start)
    else:
        new = fope_config_from_args(args)
        Grow(args, stored, "SOURCE", _number(checkpoint)).check_model()
    _refuse_optimizer_of_learnable(checkpoint, new)
    resolve_fope_arguments(args, new)
    if folds and checkpoint.has_optimizer:
        args.no_save_optim = True  # the states are left out: they belong to the weights as they were
    return Settings(args, old, new, folds, effect)


def _start(checkpoint: Checkpoint, args: Any, start: str | None) -> tuple[FoPEConfig, str]:
    """The settings of a FoPE model that was RoPE, and what the start does; checks what the flag checks."""
    args.fope_start_from_rope = start
    check_start_flags(args)
    config = fope_config_from_args(args)
    trained = checkpoint.args.seq_length
    if config.train_length < trained:
        raise UserError(
            f"--fope-train-length is {config.train_length}, but SOURCE was trained with {trained}; "
            f"allowed: at least {trained}"
        )
    begun = FromRope(args, checkpoint.args, f"the checkpoint in {checkpoint.folder}")
    begun.check_model()
    if config.anneal_iters:
        args.fope_anneal_start = _number(checkpoint)
    return config, begun.effect()


def _number(checkpoint: Checkpoint) -> int:
    """Its iteration as Megatron counts, 0 for a release."""
    return checkpoint.iteration if isinstance(checkpoint.iteration, int) else 0


def _to_rope(checkpoint: Checkpoint, args: Any, given: dict[str, Any], old: FoPEConfig | None) -> Settings:
    if old is None:
        raise UserError(f"SOURCE is {str(checkpoint.folder)!r}, a RoPE model already; nothing to convert")
    if given:
        name = next(iter(given)).replace("_", "-")
        raise UserError(f"--fope-{name} is given, but --position-embedding-type is 'rope'; leave it out")
    args.position_embedding_type, args.add_position_embedding = ROPE, True
    for name in [name for name in vars(args) if name.startswith("fope_")]:
        delattr(args, name)
    return Settings(args, old, None)


def _refuse_optimizer_of_learnable(checkpoint: Checkpoint, config: FoPEConfig | None) -> None:
    """Optimizer states of coefficients can neither be made up nor taken out of those of other parameters."""
    if config is not None and config.learnable and checkpoint.has_optimizer:
        raise UserError(
            f"--fope-learnable is set and SOURCE {str(checkpoint.folder)!r} holds optimizer states, which do "
            "not go with other coefficients; use frozen coefficients (later learnable with --finetune "
            "--fope-learnable), or a checkpoint saved with --no-save-optim"
        )


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} is {value}; allowed: greater than 0")
