"""``register()`` and ``unregister()``: the flag in a Megatron that knows nothing of FoPE.

Ten symbols of Megatron are wrapped, each by one function below. Importing this module changes nothing,
every wrapper calls the original, and ``unregister()`` puts the originals back.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import linecache
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope import compat
from megatron_fope.arguments.checks import check_training_numbers
from megatron_fope.arguments.flags import (
    FOPE,
    add_fope_arguments,
    check_before_megatron,
    check_command_line,
    fope_config_from_args,
    resolve_fope_arguments,
)
from megatron_fope.arguments.megatron import head_dim_of
from megatron_fope.arguments.rope import note_construction
from megatron_fope.checkpoint.arguments import adopt_checkpoint_arguments, position_type_if_given
from megatron_fope.checkpoint.loading import load_base_checkpoint
from megatron_fope.checkpoint.saving import wrap_save_checkpoint
from megatron_fope.checkpoint.start import check_start
from megatron_fope.common.errors import UserError, exit_on_user_error
from megatron_fope.common.log import announce, is_rank0
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.layers import anneal
from megatron_fope.layers.position_ids import expect_plain_position_ids
from megatron_fope.layers.report import assert_fope_active, describe, layer_list

logger = logging.getLogger(__name__)


@dataclass
class _Patch:
    owner: Any
    name: str
    original: Callable
    wrapper: Callable
    active: bool = True
    """False once it was taken back: another plugin may still hold the wrapper and call it."""


_patches: list[_Patch] = []
_config: FoPEConfig | None = None
_settled = False
"""Whether the settings of validated arguments are in force, which a configuration can no longer replace."""
_announced = False
_validating: Any = None
"""The arguments that Megatron is shown as ``rope`` right now."""
_building: Any = None
"""The model with FoPE whose constructor runs right now."""


def register(config: FoPEConfig | None = None) -> None:
    """Make Megatron understand ``--position-embedding-type fope``; once is enough.

    Call it before Megatron parses its arguments and before any model is built. Models that exist already
    are not touched (:func:`megatron_fope.assert_fope_active` tells).

    Args:
        config: settings for models built with ``position_embedding_type="fope"``; None takes them from
            Megatron's parsed arguments. A later call may add a configuration where there was none; None keeps
            the one that is there.

    Raises:
        UserError: Megatron-Core is missing or outside the supported range, it was registered with another
            configuration, or Megatron has validated arguments with other settings.
        ImportError: a symbol of Megatron has moved; the message names it.
    """
    global _config
    if _patches:
        if config is None or config == _config:
            return
        if _config is not None:
            raise UserError("register() was called before with another configuration; unregister() first")
        if _settled:
            raise UserError(
                "register(config) comes after Megatron validated its arguments, whose settings are in force; "
                "call it earlier, or give the settings as flags"
            )
        _config = config
        return
    version = compat.require_supported_megatron()
    _config = config
    try:
        for owner, name, wrap in _targets():
            original = inspect.getattr_static(owner, name, None)
            if original is None:
                raise ImportError(
                    f"Megatron-Core {version} has no {owner.__name__}.{name}, which megatron-fope extends; "
                    "please report this version"
                )
            patch = _Patch(owner, name, original, wrap(original))
            patch.wrapper = _while_active(patch)
            setattr(owner, name, patch.wrapper)
            _patches.append(patch)
    except Exception:
        unregister()
        raise


def _while_active(patch: _Patch) -> Callable:
    extended = patch.wrapper

    @functools.wraps(patch.original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (extended if patch.active else patch.original)(*args, **kwargs)

    return call


def unregister() -> None:
    """Put Megatron's own functions back; harmless when nothing is registered."""
    global _config, _announced, _settled
    for patch in reversed(_patches):
        patch.active = False
        if inspect.getattr_static(patch.owner, patch.name) is patch.wrapper:
            setattr(patch.owner, patch.name, patch.original)
        else:
            logger.warning(
                "%s.%s was patched again after megatron-fope, whose wrapper stays there and only calls the "
                "original",
                patch.owner.__name__,
                patch.name,
            )
    _patches.clear()
    _config, _announced, _settled = None, False, False


def is_registered() -> bool:
    """Whether :func:`register` is in force."""
    return bool(_patches)


def _targets() -> list[tuple[Any, str, Callable[[Callable], Callable]]]:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.training import arguments, checkpointing, training

    targets: list[tuple[Any, str, Callable[[Callable], Callable]]] = [
        (arguments, "add_megatron_arguments", _wrap_add_arguments),
        (arguments, "_print_args", _wrap_print_args),
        (checkpointing, "_load_base_checkpoint", _wrap_load_base_checkpoint),
        (LanguageModelEmbedding, "__init__", _wrap_embedding),
        (training, "train_step", _wrap_train_step),
        (training, "save_checkpoint", wrap_save_checkpoint),
        (checkpointing, "save_checkpoint", wrap_save_checkpoint),
    ]
    with contextlib.suppress(ImportError):  # the library for YAML need not be there
        from megatron.training import yaml_arguments

        targets.append((yaml_arguments, "validate_yaml", _wrap_validate_yaml))
    for module in compat.modules_that_import("validate_args", arguments):
        targets.append((module, "validate_args", _wrap_validate_args))
    for module in compat.modules_that_import("load_args_from_checkpoint", checkpointing):
        targets.append((module, "load_args_from_checkpoint", _wrap_load_args))
    for model_class, spec_arguments in compat.model_classes():
        targets.append((model_class, "__init__", functools.partial(_wrap_model, spec_arguments)))
    return targets


def _wrap_add_arguments(original: Callable) -> Callable:
    def add_megatron_arguments(parser: Any) -> Any:
        with exit_on_user_error():
            check_command_line(sys.argv[1:])
        return add_fope_arguments(compat.repair_help_texts(original(parser)))

    return add_megatron_arguments


def _wrap_validate_args(original: Callable) -> Callable:
    """Megatron sees ``rope`` while it validates, because it ties several checks to that word."""

    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        with exit_on_user_error():
            check_training_numbers(args)
            check_before_megatron(args)
            check_start(args)
            resolve_fope_arguments(args, _config)  # early, so that Megatron prints what is in force
        if args.position_embedding_type != FOPE:
            with _megatrons_refusals():
                return original(args, *rest, **kwargs)
        global _validating, _settled
        _settled = _config is None
        args.position_embedding_type = "rope"
        _validating = args
        try:
            with _megatrons_refusals():
                result = original(args, *rest, **kwargs)
        finally:
            _validating = None
            args.position_embedding_type = FOPE
            args.apply_rope_fusion = False
        # True of FoPE. A checkpoint stores it, and a Megatron without this package, where it is always True,
        # compares it and refuses to go on from the checkpoint, which it would train without positions.
        args.add_position_embedding = False
        with exit_on_user_error():
            resolve_fope_arguments(args, _config)  # heterogeneous models get their sizes only now
        return result

    return validate_args


@contextmanager
def _megatrons_refusals() -> Iterator[None]:
    """Megatron validates with assertions: what it refuses becomes one line, as what FoPE refuses."""
    try:
        yield
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        source = linecache.getlines(frame.filename)[(frame.lineno or 1) - 1 : frame.end_lineno]
        text = "" if isinstance(error, ZeroDivisionError) else str(error)
        said = text or " ".join(line.strip() for line in source)
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        with exit_on_user_error():
            raise UserError(f"Megatron refuses the arguments ({place}): {said}") from None


def _wrap_validate_yaml(original: Callable) -> Callable:
    """``--yaml-cfg`` replaces all flags and has its own validation, which knows nothing of FoPE's checks."""

    def validate_yaml(args: Any, *rest: Any, **kwargs: Any) -> Any:
        parts = (args, getattr(args, "language_model", None))
        if FOPE in [getattr(part, "position_embedding_type", None) for part in parts]:
            with exit_on_user_error():
                raise UserError(
                    f"--yaml-cfg is {args.yaml_cfg!r} with position_embedding_type {FOPE}, whose settings "
                    "are checked as flags only; use flags instead of the file"
                )
        return original(args, *rest, **kwargs)

    return validate_yaml


def _wrap_print_args(original: Callable) -> Callable:
    """Validation ends with printing the arguments; print the type that is really in force."""

    def _print_args(title: str, args: Any) -> None:
        if args is _validating:
            args = argparse.Namespace(**vars(args) | {"position_embedding_type": FOPE})
        original(title, args)

    return _print_args


def _wrap_load_args(original: Callable) -> Callable:
    def load_args_from_checkpoint(args: Any, load_arg: str = "load", **kwargs: Any) -> Any:
        asked, before = position_type_if_given(args), copy.copy(args)
        result = original(args, load_arg, **kwargs)
        if isinstance(result, tuple):
            with exit_on_user_error():
                adopt_checkpoint_arguments(args, result[1], getattr(args, load_arg), asked, before)
        return result

    return load_args_from_checkpoint


def _wrap_load_base_checkpoint(original: Callable) -> Callable:
    """The one function through which every checkpoint's arguments and tensors come."""
    signature = inspect.signature(original)

    def _load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        given = signature.bind(load_dir, args, *rest, **kwargs).arguments
        options = dict(list(given.items())[2:])
        with exit_on_user_error():
            result = load_base_checkpoint(original, load_dir, args, options)
        stored = result[0].get("args") if result[0] else None
        if stored is not None and getattr(args, "position_embedding_type", None) == FOPE:
            # Megatron compares it, and a RoPE model's is another.
            stored.add_position_embedding = args.add_position_embedding
        return result

    return _load_base_checkpoint


def _wrap_train_step(original: Callable) -> Callable:
    """Where an annealed start moves on; nothing happens in other runs."""
    signature = inspect.signature(original)

    def train_step(*given: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        if args.position_embedding_type != FOPE or not args.fope_anneal_iters:
            return original(*given, **kwargs)
        call = signature.bind(*given, **kwargs).arguments
        iteration = call.get("iteration")
        iteration = args.curr_iteration if iteration is None else iteration

        def geometry() -> Geometry:
            return Geometry(fope_config_from_args(args), head_dim_of(args))

        with anneal.training_step(call["model"], iteration, args, geometry):
            return original(*given, **kwargs)

    return train_step


def _wrap_model(spec_arguments: tuple[str, ...], original: Callable) -> Callable:
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("position_embedding_type")
        # Megatron lets a field of this name, which configurations of other libraries have, win.
        kind = getattr(bound.arguments["config"], "position_embedding_type", given)
        if FOPE not in (given, kind):
            original(self, *args, **kwargs)
            return
        from megatron_fope.layers.spec import with_fope

        note_construction(bound.arguments)
        global _building
        config = _config or _config_from_global_args()
        with exit_on_user_error():
            if kind != FOPE:
                raise UserError(
                    f"a model is built with position_embedding_type='fope', but its config says {kind!r}, "
                    "which wins; use 'fope' there too"
                )
            bound.arguments["position_embedding_type"] = FOPE
            for name in spec_arguments:
                if bound.arguments.get(name) is not None:
                    bound.arguments[name] = with_fope(bound.arguments[name], config)
            outer, _building = _building, self
            try:
                original(*bound.args, **bound.kwargs)
            finally:
                _building = outer
        if describe(self):  # a pipeline stage may hold no attention layer
            with exit_on_user_error():
                try:
                    assert_fope_active(self)
                except RuntimeError as error:
                    raise UserError(f"--position-embedding-type is 'fope', but {error}") from None
            if _data_has_plain_positions():
                expect_plain_position_ids(self)
            _announce(self)

    return __init__


def _wrap_embedding(original: Callable) -> Callable:
    """All of Megatron's language models look tokens up here; those without FoPE must not take the type."""
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments.get("position_embedding_type")
        if given == FOPE and _building is None:
            with exit_on_user_error():
                raise UserError(
                    "--position-embedding-type is 'fope', but this model is neither GPTModel nor HybridModel "
                    "and would train without positions; use one of those two"
                )
        original(self, *args, **kwargs)

    return __init__


def _config_from_global_args() -> FoPEConfig:
    from megatron.training import get_args

    try:
        return fope_config_from_args(get_args())
    except AssertionError:
        raise UserError(
            'a model is built with position_embedding_type="fope" outside Megatron\'s training loop; pass '
            "the settings: register(FoPEConfig.from_profile(...))"
        ) from None


def _data_has_plain_positions() -> bool:
    """Whether Megatron trains, on data whose position ids are 0, 1, 2, ..."""
    from megatron.training import get_args

    try:
        return not get_args().reset_position_ids
    except AssertionError:
        return False


def _announce(model: Any) -> None:
    """Say once, on rank 0, what was built and which backend runs."""
    global _announced
    if _announced or not is_rank0():
        return
    _announced = True
    report = describe(model)[0]
    announce(report.summary(), f"queries and keys are rotated by: {report.path}", layer_list(model))
