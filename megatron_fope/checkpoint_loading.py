"""Loading a checkpoint into a FoPE model: what is checked around Megatron's own loading.

Megatron reads a checkpoint's arguments first and its tensors later, both through one function, which
:func:`load_base_checkpoint` wraps. Coefficients come from the file completely or, for a model that was
trained with RoPE and on request, not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from megatron_fope.arguments import FOPE, START_FROM_ROPE, fope_config_from_args
from megatron_fope.checkpoint import (
    describe_error,
    find_damage,
    find_missing_legacy_file,
    is_coefficient,
    is_legacy,
    newer_than,
    read_stored_args,
    tracked_iteration,
)
from megatron_fope.checkpoint_arguments import (
    check_against_checkpoint,
    check_legacy_layout,
    position_type_if_given,
    starts_from_rope,
)
from megatron_fope.embedding import KEEP
from megatron_fope.errors import UserError


def load_base_checkpoint(original: Callable, load_dir: Any, args: Any, options: dict[str, Any]) -> Any:
    """Megatron's ``_load_base_checkpoint`` with FoPE's checks.

    Args:
        original: Megatron's function.
        load_dir: the folder.
        args: Megatron's arguments.
        options: the function's further arguments by name. With ``rank0`` only the checkpoint's arguments
            are wanted; otherwise ``sharded_state_dict`` says which tensors.

    Returns:
        What Megatron's function returns: state dict, name, whether it is a release, format.

    Raises:
        UserError: other settings than the checkpoint's, damaged files, or no coefficients in them.
    """
    validated = hasattr(args, "data_parallel_size")  # not yet when --use-checkpoint-args is at work
    asked = args.position_embedding_type if validated else position_type_if_given(args)
    ours = asked == FOPE or (asked is None and not validated)
    step = _step(load_dir, args) if ours else None
    with_tensors = ours and not options.get("rank0", False)
    names = _coefficient_names(options.get("sharded_state_dict")) if with_tensors else {}
    if names and getattr(args, "fope_start_from_rope", None):
        stored = (original(load_dir, args, rank0=True)[0] or {}).get("args")
        if starts_from_rope(args, stored, asked):
            options = {**options, "sharded_state_dict": _without(names, options["sharded_state_dict"])}
    keys = _keys(options.get("sharded_state_dict"), names)
    if step is not None and with_tensors and _is_rank0():
        _check_files(load_dir, step, keys, args)
    try:
        result = original(load_dir, args, **options)
    except (Exception, SystemExit) as error:  # for some of them Megatron exits, with code 0
        damage = None if step is None else find_damage(load_dir, step, expected=keys)
        if damage is None and step is not None and isinstance(error, SystemExit) and not error.code:
            damage = f"Megatron cannot load iteration {step} of {load_dir} and says why above"
        if damage is None:
            raise
        raise UserError(f"{damage} ({describe_error(error)})") from error

    state, _, release, kind = result[:4]
    stored = state.get("args") if state else None
    if stored is not None and validated:
        check_against_checkpoint(args, stored, load_dir, release=release)
    if stored is not None and with_tensors:
        legacy = getattr(kind, "name", None) == "LEGACY"
        if legacy:
            check_legacy_layout(args, stored, load_dir)
        _settle_coefficients(state, _names_beside_attention(state, args) if legacy else names, args, load_dir)
    return result


def _step(load_dir: Any, args: Any) -> int | str | None:
    """The iteration that Megatron will load, or None where its files are not for us to judge."""
    if load_dir is None or "://" in str(load_dir) or args.ckpt_format not in ("torch_dist", "torch"):
        return None
    if getattr(args, "non_persistent_ckpt_type", None) is not None:
        return None
    return getattr(args, "ckpt_step", None) or tracked_iteration(load_dir)


def _check_files(load_dir: Any, step: int | str, keys: list[str], args: Any) -> None:
    """Find damage before any rank starts to read, because afterwards each would fail in its own way.

    Only rank 0 looks. It reads the table of contents once more than Megatron does.
    """
    if isinstance(step, int) and not getattr(args, "ckpt_step", None):
        newer = newer_than(load_dir, step)
        if newer:
            print(
                f"> FoPE: {', '.join(newer)} in {load_dir} never became the latest checkpoint: a save "
                f"did not finish; loading iteration {step}",
                flush=True,
            )
    damage = find_damage(load_dir, step, expected=keys)
    if damage is not None:
        raise UserError(damage)
    if is_legacy(load_dir, step):
        stored = read_stored_args(load_dir, step)
        if stored is not None:
            check_legacy_layout(args, stored, load_dir)
        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        missing = find_missing_legacy_file(load_dir, step, *sizes)
        if missing is not None:
            raise UserError(missing)


def _settle_coefficients(state: Any, names: dict[str, list[str]], args: Any, load_dir: Any) -> None:
    """Make sure that every coefficient was in the file, or mark those that shall stay as they are."""
    from_rope = starts_from_rope(args, state["args"], FOPE)
    for part, wanted in names.items():
        for name in wanted:
            if from_rope:
                state[part][name] = KEEP
            elif name not in state.get(part, {}):
                raise UserError(f"the checkpoint in {load_dir} has no {name}; load one that is complete")
    if not getattr(args, "fope_start_from_rope", None) or not _is_rank0():
        return
    if not from_rope:
        print(
            f"> FoPE: {START_FROM_ROPE} has no effect: {load_dir} holds coefficients, which are loaded",
            flush=True,
        )
        return
    config = fope_config_from_args(args)
    base = getattr(state["args"], "rotary_base", config.rotary_base)
    note = "" if base == config.rotary_base else f" with --rotary-base {base}"
    print(
        f"> FoPE: the coefficients are fresh (seed {config.seed}): {load_dir} is a RoPE model{note}; "
        "everything else is loaded from it",
        flush=True,
    )


def _parts(state: Any) -> list[str]:
    """Where a state dict keeps the model: ``model``, or ``model0``, ``model1``, ... for virtual stages."""
    return [key for key in state or {} if re.fullmatch(r"model\d*", key)]


def _coefficient_names(template: Any) -> dict[str, list[str]]:
    """Names of the coefficients in a state dict, by the part that holds them."""
    return {part: [name for name in template[part] if is_coefficient(name)] for part in _parts(template)}


def _names_beside_attention(state: Any, args: Any) -> dict[str, list[str]]:
    """Names that coefficients must have where nothing but the file's own names is known."""
    both = fope_config_from_args(args).separate_basis
    leaves = ("sin_coef", "cos_coef") if both else ("fourier_coef",)
    projection = "self_attention.linear_qkv.weight"
    return {
        part: [
            f"{name.removesuffix('linear_qkv.weight')}fope.{leaf}"
            for name in state[part]
            if name.endswith(projection)
            for leaf in leaves
        ]
        for part in _parts(state)
    }


def _without(names: dict[str, list[str]], template: Any) -> dict[str, Any]:
    """A state dict without some tensors of the model."""
    parts = {
        part: {name: tensor for name, tensor in template[part].items() if name not in removed}
        for part, removed in names.items()
    }
    return {**template, **parts}


def _keys(template: Any, names: dict[str, list[str]]) -> list[str]:
    """The names that a distributed checkpoint uses for tensors of a state dict that has them."""
    tensors = [template[part][name] for part in names for name in names[part] if name in template[part]]
    return sorted({tensor.key for tensor in tensors if hasattr(tensor, "key")})


def _is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"
