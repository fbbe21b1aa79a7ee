"""What a checkpoint may be that a run goes on from with other settings: RoPE, a shorter length, halfway."""

from __future__ import annotations

from typing import Any

from megatron_fope.arguments.flags import (
    CHANGE_BASE,
    FOPE,
    GROW,
    START_FROM_ROPE,
    fope_config_from_args,
    fope_config_of_checkpoint,
)
from megatron_fope.arguments.rope import ROPE_TYPES, check_same_rope
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.formula.growth import check_growth
from megatron_fope.layers import anneal


def check_start(args: Any) -> None:
    """Refuse to continue a RoPE model that is nowhere: Megatron would start from random weights.

    Raises:
        UserError: naming the folders.
    """
    if args.position_embedding_type != FOPE or not getattr(args, "fope_start_from_rope", None):
        return
    from megatron.training.checkpointing import checkpoint_exists

    folders = [args.load, getattr(args, "pretrained_checkpoint", None)]
    if getattr(args, "non_persistent_ckpt_type", None) is None and not any(map(checkpoint_exists, folders)):
        given = (
            " or ".join(str(folder) for folder in folders if folder) or "--load or --pretrained-checkpoint"
        )
        raise UserError(f"{START_FROM_ROPE} is given, but there is no checkpoint in {given}")


def starts_from_rope(args: Any, checkpoint_args: Any, asked: str | None) -> bool:
    """Whether the run asks to continue a RoPE checkpoint with FoPE, and this is one.

    Args:
        args: Megatron's arguments.
        checkpoint_args: the arguments stored in the checkpoint.
        asked: the position embedding type that the run asks for.
    """
    wanted = asked == FOPE and getattr(args, "fope_start_from_rope", None)
    return bool(wanted) and getattr(checkpoint_args, "position_embedding_type", None) in ROPE_TYPES


def outgrown_config(args: Any, checkpoint_args: Any) -> FoPEConfig | None:
    """The settings of a FoPE checkpoint whose coefficients the run asks to grow, or None.

    Args:
        args: Megatron's validated arguments.
        checkpoint_args: the arguments stored in the checkpoint.
    """
    if not getattr(args, "fope_grow", None):
        return None
    if getattr(checkpoint_args, "position_embedding_type", None) != FOPE:
        return None
    stored = fope_config_of_checkpoint(checkpoint_args, args)
    changed = fope_config_from_args(args).differences(stored).keys() - {"learnable", "anneal_iters"}
    return stored if changed else None


def check_rope_start(args: Any, checkpoint_args: Any, where: str, release: bool) -> None:
    """Refuse to continue a RoPE checkpoint as something that it is not.

    Args:
        args: Megatron's validated arguments.
        checkpoint_args: the arguments stored in the checkpoint.
        where: its folder, for messages.
        release: it is a "release" checkpoint, of which Megatron takes the weights only.

    Raises:
        UserError: naming the flag.
    """
    _check_base(args, checkpoint_args, where)
    config, start = fope_config_from_args(args), args.fope_start_from_rope
    base = getattr(checkpoint_args, "rotary_base", args.rotary_base)
    if start == "function-preserving" and float(base) != config.rotary_base:
        raise UserError(
            f"--rotary-base is {args.rotary_base}, but the checkpoint in {where} was trained with {base}; "
            f"{START_FROM_ROPE} function-preserving keeps it, change it with immediate or later with {GROW}"
        )
    check_same_rope(args, checkpoint_args, config, where, strict=start != "immediate")
    _check_optimizer_state(args, checkpoint_args, where, release, "the RoPE checkpoint")
    if getattr(args, "fope_learnable", None) and getattr(args, "load_main_params_from_ckpt", False):
        raise UserError(
            f"--load-main-params-from-ckpt is given, but the RoPE checkpoint in {where} has no learnable "
            "coefficients; leave it out"
        )


def check_outgrown(args: Any, checkpoint_args: Any, where: str, iteration: int, release: bool) -> None:
    """Refuse growth that cannot be; arguments as for :func:`check_rope_start`, and the stored iteration.

    Raises:
        UserError: naming the flag and both values.
    """
    config, stored = fope_config_from_args(args), fope_config_of_checkpoint(checkpoint_args, args)
    check_growth(stored, config, f"the checkpoint in {where}")
    _check_base(args, checkpoint_args, where)
    if not anneal.is_annealed(checkpoint_args, iteration):
        done = anneal.annealed_iterations(checkpoint_args, iteration)
        raise UserError(
            f"{GROW} is given, but the start of the checkpoint in {where} is at {done} of "
            f"{stored.anneal_iters} iterations; finish it first"
        )
    if config.learnable != stored.learnable and not args.finetune:
        raise UserError(
            f"{flag('learnable')} is {config.learnable}, but the checkpoint in {where} was trained with "
            f"{stored.learnable}; use --finetune to accept that"
        )
    _check_optimizer_state(args, checkpoint_args, where, release, "the smaller checkpoint")


def begin_annealing(
    args: Any, checkpoint_args: Any, iteration: int, *, from_rope: bool, release: bool
) -> None:
    """Set where the start is, for this process and for the checkpoints that it saves.

    Args:
        args: Megatron's arguments; ``fope_anneal_start`` is written.
        checkpoint_args: the arguments stored in the checkpoint that was loaded.
        iteration: its iteration.
        from_rope: it is a RoPE model.
        release: it is a "release" checkpoint.
    """
    total = getattr(args, "fope_anneal_iters", None) or 0
    completed = 0 if release or args.finetune else iteration  # as Megatron counts
    done = 0
    if not from_rope:
        annealed = anneal.is_annealed(checkpoint_args, iteration)
        done = total if annealed else anneal.annealed_iterations(checkpoint_args, iteration)
    args.fope_anneal_start = completed - done
    anneal.begin(args.fope_anneal_start, completed)


def _check_base(args: Any, checkpoint_args: Any, where: str) -> None:
    stored = getattr(checkpoint_args, "rotary_base", None)
    if stored is None or float(stored) == float(args.rotary_base):
        return
    if not getattr(args, "fope_change_rotary_base", None):
        raise UserError(
            f"--rotary-base is {args.rotary_base}, but the checkpoint in {where} was trained with {stored}; "
            f"{CHANGE_BASE} accepts the change"
        )


def _check_optimizer_state(args: Any, checkpoint_args: Any, where: str, release: bool, what: str) -> None:
    """Coefficients that learn need an optimizer state, which there is none of for those that are new."""
    if not getattr(args, "fope_learnable", None):
        return
    without_state = (args.finetune, args.no_load_optim, getattr(checkpoint_args, "no_save_optim", False))
    if not release and not any(without_state):
        raise UserError(
            f"--fope-learnable is given, but {what} in {where} has no optimizer state for the "
            "coefficients; use --no-load-optim or --finetune"
        )
