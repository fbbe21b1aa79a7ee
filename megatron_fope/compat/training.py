"""How Megatron is started."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any


def run_pretraining(
    pretrain: Callable,
    *,
    datasets_provider: Callable,
    model_provider: Callable,
    forward_step: Callable,
    check_args: Callable[[Any], None],
    builder_config: Callable[[Any], Any | None],
    args_defaults: dict[str, Any],
    **options: Any,
) -> None:
    """Parse Megatron's arguments and train.

    0.17: ``pretrain`` parses. 0.18: the caller parses and passes a container of configs along with the
    model provider. 0.19: the container also describes the model.

    Args:
        pretrain: ``megatron.training.pretrain``, perhaps wrapped for in-process restart.
        datasets_provider: builds the datasets of the three splits.
        model_provider: builds one model chunk.
        forward_step: runs one micro-batch.
        check_args: called with the parsed arguments, before a model is built.
        builder_config: Megatron's own description of the model for the parsed arguments, or None.
        args_defaults: defaults for arguments that have none.
        options: further keyword arguments of ``pretrain``.
    """
    from megatron.core.enums import ModelType
    from megatron.training import arguments, get_args

    model_type = ModelType.encoder_or_decoder
    parse = getattr(arguments, "parse_and_validate_args", None)
    if parse is None:

        def checked_model_provider(*given: Any, **named: Any) -> Any:
            check_args(get_args())
            return model_provider(*given, **named)

        pretrain(
            datasets_provider,
            checked_model_provider,
            model_type,
            forward_step,
            args_defaults=args_defaults,
            **options,
        )
        return

    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = parse(args_defaults=args_defaults)
    check_args(args)
    model_config = builder_config(args)
    if model_config is None:
        options["model_provider"] = model_provider
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        model_type=model_type,
        forward_step_func=forward_step,
        **options,
    )


def initialize_megatron(adjust: Callable[[Any, Any], None], **options: Any) -> Any:
    """Parse ``sys.argv`` and initialise Megatron for a command that does not train.

    0.17 parses inside ``initialize_megatron``; 0.18 and later want it done before.

    Args:
        adjust: called with the parser and the parsed arguments before Megatron validates them.
        options: keyword arguments of Megatron's ``initialize_megatron``.

    Returns:
        Megatron's arguments.
    """
    from megatron.training import arguments, get_args, training

    parsers: list[Any] = []

    def remember(parser: Any) -> Any:
        parsers.append(parser)
        return parser

    args = arguments.parse_args(remember)
    adjust(parsers[0], args)
    # The training module's name for it: the CPU runtime replaces that one.
    initialize = training.initialize_megatron
    if "parsed_args" in inspect.signature(initialize).parameters:
        initialize(parsed_args=args, **options)
        return get_args()
    from megatron.training.global_vars import set_global_variables

    arguments.validate_args(args, {})
    set_global_variables(args)
    initialize(**options)
    return args


def reset_megatron() -> None:
    """Undo :func:`initialize_megatron`, so that another model can follow; the default process group stays.

    In every release, ``destroy_global_state`` drops most process groups without closing them, and the
    version of the checkpoint that was loaded last stays.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.training import checkpointing, training

    groups = parallel_state._global_process_group_list or []
    training.destroy_global_state()
    for group in groups:
        if group is not None:  # None is the default group
            with contextlib.suppress(ValueError):  # Megatron has closed those of gloo
                torch.distributed.destroy_process_group(group)
    checkpointing._CHECKPOINT_VERSION = None
