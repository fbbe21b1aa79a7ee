"""Loading a checkpoint into a FoPE model: what is checked around Megatron's own loading.

Megatron reads a checkpoint's arguments first and its tensors later, both through one function, which
:func:`load_base_checkpoint` wraps. Coefficients come from the file completely or, for a model that was
trained with RoPE and on request, not at all. On request those of a shorter train length are read as they are
and grown by the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from megatron_fope.arguments.flags import FOPE, fope_config_from_args
from megatron_fope.arguments.megatron import CHECKPOINT_FORMATS
from megatron_fope.checkpoint.arguments import check_legacy_layout, position_type_if_given
from megatron_fope.checkpoint.files import (
    describe_error,
    find_damage,
    find_missing_legacy_file,
    is_coefficient,
    is_legacy,
    load_errors,
    newer_than,
    read_legacy_args,
    tracked_iteration,
)
from megatron_fope.checkpoint.start import Start, check_position_type, decide
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import announce, is_rank0


def load_base_checkpoint(original: Callable, load_dir: Any, args: Any, options: dict[str, Any]) -> Any:
    """Megatron's ``_load_base_checkpoint`` with FoPE's checks.

    Args:
        original: Megatron's function.
        load_dir: its first argument, the folder.
        args: its second argument.
        options: its further arguments by name. With ``rank0`` only the checkpoint's arguments are wanted;
            otherwise ``sharded_state_dict`` says which tensors.

    Returns:
        What Megatron's function returns: state dict, name, whether it is a release, format.

    Raises:
        UserError: other settings than the checkpoint's, damaged files, or no coefficients in them.
    """
    if not hasattr(args, "position_embedding_type"):
        return original(load_dir, args, **options)  # a program's own arguments: nothing to compare with
    loading = _Loading(original, load_dir, args)
    if not loading.ours:
        result = original(load_dir, args, **options)
        stored = result[0].get("args") if result[0] else None
        if stored is not None and loading.validated:
            check_position_type(args.position_embedding_type, stored, load_dir)
        return result
    if options.get("rank0", False):
        return loading.read_arguments(options)
    return loading.read_tensors(options)


class _Loading:
    """One call of Megatron's function for a run with FoPE."""

    def __init__(self, original: Callable, load_dir: Any, args: Any) -> None:
        self.original, self.load_dir, self.args = original, load_dir, args
        self.validated = hasattr(args, "data_parallel_size")  # not yet when --use-checkpoint-args is at work
        asked = args.position_embedding_type if self.validated else position_type_if_given(args)
        self.ours = asked == FOPE or (asked is None and not self.validated)
        self.step = self._find_step() if self.ours else None

    def _find_step(self) -> int | str | None:
        """The iteration that Megatron will load, or None where its files are not for us to judge."""
        remote = self.load_dir is None or "://" in str(self.load_dir)
        local = getattr(self.args, "non_persistent_ckpt_type", None) is not None
        if remote or local or self.args.ckpt_format not in CHECKPOINT_FORMATS:
            return None
        return getattr(self.args, "ckpt_step", None) or tracked_iteration(self.load_dir)

    def read_arguments(self, options: dict[str, Any]) -> Any:
        def check_files() -> None:
            # PyTorch logs a traceback of its own about a file that it cannot read.
            if self.step is not None and is_rank0():
                _refuse_damage(self.load_dir, self.step)

        self._agree(check_files)
        return self._agree(lambda: self._read_arguments(options))

    def _read_arguments(self, options: dict[str, Any]) -> Any:
        result = self._call(options)
        if self.validated:
            self._start(result)
        return result

    def read_tensors(self, options: dict[str, Any]) -> Any:
        template = options.get("sharded_state_dict")
        names = _coefficient_names(template)
        if names and any(getattr(self.args, f"fope_{name}", None) for name in ("start_from_rope", "grow")):
            start = self._start(self.read_arguments({"rank0": True}))
            template = template if start is None else _requested(start, template, names)
            options = {**options, "sharded_state_dict": template}
        keys = _keys(template, names)

        def check_files() -> None:
            # Before any rank starts to read, because afterwards each would fail in its own way. Only rank 0
            # looks; it reads the table of contents once more than Megatron does.
            if self.step is not None and is_rank0():
                _check_files(self.load_dir, self.step, keys, self.args)

        def read() -> Any:
            result = self._call(options, keys)
            if start := self._start(result):
                state, kind = result[0], result[3]
                legacy = getattr(kind, "name", None) == "LEGACY"
                start.begin()
                self._settle(start, state, _names_beside_attention(state, self.args) if legacy else names)
            return result

        self._agree(check_files)
        return self._agree(read)

    def _start(self, result: Any) -> Start | None:
        """How the run starts from what Megatron has read, checked; None without arguments or without FoPE."""
        state, release = result[0], result[2]
        stored = state.get("args") if state else None
        if stored is None:
            return None
        iteration = state.get("iteration", 0)
        start = decide(self.args, stored, self.load_dir, iteration=iteration, release=release)
        if start is not None:
            start.check()
        return start

    def _settle(self, start: Start, state: Any, names: dict[str, list[str]]) -> None:
        """Make sure that every coefficient was in the file; mark those that stay and those that grow."""
        for part, wanted in names.items():
            for name in wanted:
                value = state.get(part, {}).get(name)
                if value is None and not start.fresh:
                    raise UserError(
                        f"the checkpoint in {self.load_dir} has no {name}; load one that is complete"
                    )
                state[part][name] = start.loaded(value)
        announce(*start.notes(self.load_dir))

    def _call(self, options: dict[str, Any], keys: Iterable[str] = ()) -> Any:
        """Call Megatron; an error that damaged files explain becomes one line."""
        try:
            return self.original(self.load_dir, self.args, **options)
        except load_errors() as error:
            if self.step is None:
                raise
            damage = find_damage(self.load_dir, self.step, expected=keys)
            if damage is None and isinstance(error, SystemExit) and not error.code:
                damage = f"Megatron cannot load iteration {self.step} of {self.load_dir} and says why above"
            if damage is None:
                raise
            raise UserError(f"{damage} ({describe_error(error)})") from error

    def _agree(self, action: Callable[[], Any]) -> Any:
        """Do something on every rank; what one rank refuses all refuse, so that none waits for another.

        Megatron itself talks to all ranks while it finds the iteration to load, so all of them are here.
        """
        import torch.distributed as distributed

        if self.step is None or not distributed.is_initialized():
            return action()
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = error
        found: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, None if problem is None else str(problem))
        for text in found:
            if text is not None:
                raise UserError(text) from problem
        return result


def _check_files(load_dir: Any, step: int | str, keys: list[str], args: Any) -> None:
    """Say which saves did not finish; refuse damaged files and a layout that the format cannot change."""
    newer = (
        newer_than(load_dir, step) if isinstance(step, int) and not getattr(args, "ckpt_step", None) else []
    )
    if newer:
        announce(
            f"{', '.join(newer)} in {load_dir} never became the latest checkpoint: a save did not finish; "
            f"loading iteration {step}"
        )
    _refuse_damage(load_dir, step, keys)
    if is_legacy(load_dir, step):
        stored = read_legacy_args(load_dir, step)
        if stored is not None:
            check_legacy_layout(args, stored, load_dir)
        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        missing = find_missing_legacy_file(load_dir, step, *sizes)
        if missing is not None:
            raise UserError(missing)


def _refuse_damage(load_dir: Any, step: int | str, keys: Iterable[str] = ()) -> None:
    damage = find_damage(load_dir, step, expected=keys)
    if damage is not None:
        raise UserError(damage)


def _parts(state: Any) -> list[str]:
    """Where a state dict keeps the model: ``model``, or ``model0``, ``model1``, ... for virtual stages."""
    return [key for key in state or {} if re.fullmatch(r"model\d*", key)]


def _coefficient_names(template: Any) -> dict[str, list[str]]:
    """Names of the coefficients in a state dict, by the part that holds them."""
    return {part: [name for name in template[part] if is_coefficient(name)] for part in _parts(template)}


def _names_beside_attention(state: Any, args: Any) -> dict[str, list[str]]:
    """Names that coefficients must have where nothing but the file's own names is known."""
    leaves = fope_config_from_args(args).coefficient_names
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


def _requested(start: Start, template: Any, names: dict[str, list[str]]) -> dict[str, Any]:
    """A state dict that asks for the coefficients that the file has."""
    parts = {}
    for part, wanted in names.items():
        asked = {name: start.requested(t) if name in wanted else t for name, t in template[part].items()}
        parts[part] = {name: tensor for name, tensor in asked.items() if tensor is not None}
    return {**template, **parts}


def _keys(template: Any, names: dict[str, list[str]]) -> list[str]:
    """The names that a distributed checkpoint uses for tensors of a state dict that has them."""
    tensors = [template[part][name] for part in names for name in names[part] if name in template[part]]
    return sorted({tensor.key for tensor in tensors if hasattr(tensor, "key")})
