"""How FoPE's settings meet those that a checkpoint was trained with."""

from __future__ import annotations

from typing import Any

from megatron_fope.arguments.flags import (
    FIELDS,
    FOPE,
    check_names,
    given_flags,
    given_fope_arguments,
)
from megatron_fope.arguments.megatron import dashes
from megatron_fope.checkpoint.start import (
    check_position_type,
    position_type_of,
    refuse_difference,
    starts_from_rope,
)
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag


def position_type_if_given(args: Any) -> str | None:
    """``--position-embedding-type``, or None when it has Megatron's default and may not have been given."""
    value = getattr(args, "position_embedding_type", None)
    return None if value == "learned_absolute" else value


_OVERWRITTEN = ("rotary_base", "rotary_percent", "rotary_interleaved", "num_query_groups")
"""Arguments that change FoPE's numbers and that ``--use-checkpoint-args`` takes from the checkpoint."""


def adopt_checkpoint_arguments(
    args: Any, stored_args: Any, folder: str, asked: str | None, before: Any
) -> None:
    """``--use-checkpoint-args``: take FoPE's settings from a checkpoint.

    Args:
        args: Megatron's arguments, changed in place.
        stored_args: the arguments stored in the checkpoint.
        folder: where it is, for messages.
        asked: ``--position-embedding-type`` before Megatron overwrote it from the checkpoint.
        before: all arguments before Megatron overwrote some.

    Raises:
        UserError: a flag that was given and says something else.
    """
    if getattr(args, "fope_change_rotary_base", None):
        args.rotary_base = before.rotary_base
    where = f"the checkpoint in {folder}"
    if FOPE in (asked, position_type_of(stored_args)):
        for name in _OVERWRITTEN:
            text, value = f"--{dashes(name)}", getattr(before, name, None)
            if text in given_flags() and value != getattr(args, name, None):
                refuse_difference(text, value, getattr(args, name), where)
    if starts_from_rope(args, stored_args, asked):
        args.position_embedding_type = FOPE
        return
    check_position_type(asked, stored_args, folder)
    if position_type_of(stored_args) != FOPE:
        return
    check_names(stored_args)
    given = given_fope_arguments(args)
    growing = getattr(args, "fope_grow", None)
    for field in FIELDS:
        stored = getattr(stored_args, f"fope_{field.name}", None)
        if stored is None or field.name in FoPEConfig.RUN_ONLY:
            continue
        value = given.get(field.name, stored)
        if given.get("fold_padding") and field.name in ("fold_padding", "pad_value"):
            continue  # decided when the checkpoint is loaded
        if growing and field.name in given:
            continue  # what may grow is checked when the checkpoint is loaded
        if value != stored and field.name == "learnable" and args.finetune:
            continue  # keep what was asked for: a new run may start or stop learning
        if value != stored and field.name not in FoPEConfig.FRESH_ONLY:
            refuse_difference(flag(field.name), value, stored, where)
        setattr(args, f"fope_{field.name}", stored)
    if args.fope_anneal_iters and getattr(args, "fope_start_from_rope", None) is None:
        args.fope_start_from_rope = "function-preserving"


def check_legacy_layout(args: Any, checkpoint_args: Any, where: str) -> None:
    """Refuse another layout for the format that cannot change it (``--ckpt-format torch``)."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        value, stored = getattr(args, name), getattr(checkpoint_args, name, None)
        if stored is not None and value != stored:
            raise UserError(
                f"--{dashes(name)} is {value}, but the checkpoint in {where} has the format torch, "
                f"which keeps its layout; allowed: {stored} (or save it with --ckpt-format torch_dist first)"
            )
