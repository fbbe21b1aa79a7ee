"""How FoPE's settings meet those that a checkpoint was trained with."""

from __future__ import annotations

from typing import Any

from megatron_fope.arguments.flags import (
    FIELDS,
    FOPE,
    GROW,
    START_FROM_ROPE,
    fope_config_from_args,
    fope_config_of_checkpoint,
    given_flags,
    given_fope_arguments,
)
from megatron_fope.arguments.megatron import num_kv_heads_of
from megatron_fope.arguments.rope import ROPE_TYPES
from megatron_fope.checkpoint.start import (
    check_outgrown,
    check_rope_start,
    outgrown_config,
    starts_from_rope,
)
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.layers.anneal import is_annealed


def position_type_if_given(args: Any) -> str | None:
    """``--position-embedding-type``, or None when it has Megatron's default and may not have been given."""
    value = getattr(args, "position_embedding_type", None)
    return None if value == "learned_absolute" else value


_OVERWRITTEN = ("rotary_base", "rotary_percent", "rotary_interleaved", "num_query_groups")
"""Arguments that change FoPE's numbers and that ``--use-checkpoint-args`` takes from the checkpoint."""


def adopt_checkpoint_arguments(
    args: Any, checkpoint_args: Any, where: str, asked: str | None, before: Any
) -> None:
    """``--use-checkpoint-args``: take FoPE's settings from a checkpoint.

    Args:
        args: Megatron's arguments, changed in place.
        checkpoint_args: the arguments stored in the checkpoint.
        where: its folder, for messages.
        asked: ``--position-embedding-type`` before Megatron overwrote it from the checkpoint.
        before: all arguments before Megatron overwrote some.

    Raises:
        UserError: a flag that was given and says something else.
    """
    if getattr(args, "fope_change_rotary_base", None):
        args.rotary_base = before.rotary_base
    if FOPE in (asked, getattr(checkpoint_args, "position_embedding_type", None)):
        for name in _OVERWRITTEN:
            text, value = f"--{name.replace('_', '-')}", getattr(before, name, None)
            if text in given_flags() and value != getattr(args, name, None):
                _refuse_difference(text, value, getattr(args, name), where)
    if starts_from_rope(args, checkpoint_args, asked):
        args.position_embedding_type = FOPE
        return
    check_position_type(asked, checkpoint_args, where)
    if getattr(checkpoint_args, "position_embedding_type", None) != FOPE:
        return
    given = given_fope_arguments(args)
    growing = getattr(args, "fope_grow", None)
    for field in FIELDS:
        stored = getattr(checkpoint_args, f"fope_{field.name}", None)
        if stored is None or field.name in FoPEConfig.RUN_ONLY:
            continue
        value = given.get(field.name, stored)
        if growing and field.name in given:
            continue  # what may grow is checked when the checkpoint is loaded
        if value != stored and field.name == "learnable" and args.finetune:
            continue  # keep what was asked for: a new run may start or stop learning
        if value != stored and field.name not in FoPEConfig.FRESH_ONLY:
            _refuse_difference(flag(field.name), value, stored, where)
        setattr(args, f"fope_{field.name}", stored)
    if args.fope_anneal_iters and getattr(args, "fope_start_from_rope", None) is None:
        args.fope_start_from_rope = "function-preserving"


def check_against_checkpoint(
    args: Any, checkpoint_args: Any, where: str, *, iteration: int = 0, release: bool = False
) -> None:
    """Refuse to load coefficients that other settings made, or weights of another shape.

    Args:
        args: Megatron's validated arguments.
        checkpoint_args: the arguments stored in the checkpoint.
        where: its folder, for messages.
        iteration: its iteration.
        release: it is a "release" checkpoint, of which Megatron takes the weights only.

    Raises:
        UserError: naming the flag and both values.
    """
    from_rope = starts_from_rope(args, checkpoint_args, args.position_embedding_type)
    if not from_rope:
        check_position_type(args.position_embedding_type, checkpoint_args, where)
    if args.position_embedding_type != FOPE:
        return
    outgrown = outgrown_config(args, checkpoint_args)
    if from_rope:
        check_rope_start(args, checkpoint_args, where, release)
    elif outgrown is not None:
        check_outgrown(args, checkpoint_args, where, iteration, release)
    else:
        _check_settings(args, checkpoint_args, where, iteration)
    shapes = {
        "kv_channels": "--kv-channels",
        "qk_pos_emb_head_dim": "--qk-pos-emb-head-dim",
        "num_attention_heads": "--num-attention-heads",
    }
    if outgrown is None:
        shapes["fope_kept_frequencies"] = "number of kept frequencies"
        shapes["fope_series"] = "number of Fourier series"
    values = [
        (text, getattr(args, name, None), getattr(checkpoint_args, name, None))
        for name, text in shapes.items()
    ]
    values.append(("--num-query-groups", num_kv_heads_of(args), num_kv_heads_of(checkpoint_args)))
    for text, value, stored in values:
        if value is not None and stored is not None and value != stored:
            _refuse_difference(text, value, stored, where)
    _check_positions(args, checkpoint_args, where)


def _check_positions(args: Any, checkpoint_args: Any, where: str) -> None:
    """Refuse another use of positions by Megatron itself, which the shapes of weights do not show."""
    names = ["rotary_interleaved", "no_rope_freq"]
    if getattr(args, "multi_latent_attention", False):
        names += ["rotary_scaling_factor", "mscale_all_dim"]  # factors of the attention scores
    for name in names:
        if not hasattr(args, name) or not hasattr(checkpoint_args, name):
            continue
        value, stored = getattr(args, name), getattr(checkpoint_args, name)
        if name == "no_rope_freq":
            value, stored = (_unrotated(of, args.num_layers) for of in (value, stored))
        if value != stored:
            _refuse_difference(f"--{name.replace('_', '-')}", value, stored, where)


def _unrotated(no_rope_freq: int | list[int] | None, num_layers: int | None) -> list[int] | None:
    """1 for every layer without positions, as Megatron expands ``--no-rope-freq``."""
    if isinstance(no_rope_freq, int) and num_layers:
        return [int((layer + 1) % no_rope_freq == 0) for layer in range(num_layers)]
    return no_rope_freq


def check_legacy_layout(args: Any, checkpoint_args: Any, where: str) -> None:
    """Refuse another layout for the format that cannot change it (``--ckpt-format torch``).

    Raises:
        UserError: naming the flag and both sizes.
    """
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        value, stored = getattr(args, name), getattr(checkpoint_args, name, None)
        if stored is not None and value != stored:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but the checkpoint in {where} has the format torch, "
                f"which keeps its layout; allowed: {stored} (or save it with --ckpt-format torch_dist first)"
            )


def check_position_type(asked: str | None, checkpoint_args: Any, where: str) -> None:
    """Refuse a RoPE checkpoint in a FoPE run and the other way round.

    Raises:
        UserError: naming both types.
    """
    stored = getattr(checkpoint_args, "position_embedding_type", None)
    if stored is not None and asked is not None and asked != stored and FOPE in (asked, stored):
        hint = f"; {START_FROM_ROPE} continues it with fresh coefficients" if stored in ROPE_TYPES else ""
        _refuse_difference("--position-embedding-type", asked, stored, where, hint)


def _check_settings(args: Any, checkpoint_args: Any, where: str, iteration: int) -> None:
    config = fope_config_from_args(args)
    stored_config = fope_config_of_checkpoint(checkpoint_args, args)
    differences = config.differences(stored_config)
    if args.finetune:
        differences.pop("learnable", None)  # a new run may start or stop learning; the numbers are the same
    if is_annealed(checkpoint_args, iteration):
        differences.pop("anneal_iters", None)
    if differences and config.profile != stored_config.profile:
        _refuse_difference("--fope-profile", config.profile, stored_config.profile, where)
    for field, (value, stored) in differences.items():
        _refuse_difference(flag(field), value, stored, where, _hint(field, value, stored))


def _hint(field: str, value: Any, stored: Any) -> str:
    if field == "anneal_iters":
        return f" and is in the middle; give {START_FROM_ROPE} function-preserving {flag(field)} {stored}"
    if field == "train_length" and value > stored:
        return f"; {GROW} grows the coefficients"
    return ""


def _refuse_difference(name: str, value: Any, stored: Any, where: str, hint: str = "") -> None:
    raise UserError(f"{name} is {value!r}, but the checkpoint in {where} was trained with {stored!r}{hint}")
