"""FoPE's command-line flags, and how they meet Megatron's arguments and checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

from megatron_fope.attention import check_host_config
from megatron_fope.config import PADDINGS, PROFILES, SCALINGS, FoPEConfig, flag
from megatron_fope.embedding import ROTATION_PATH
from megatron_fope.errors import UserError, exit_on_user_error
from megatron_fope.functional import INITIALIZATIONS

FOPE = "fope"
"""The value of ``--position-embedding-type``."""

_FIELDS = [field for field in dataclasses.fields(FoPEConfig) if field.name != "rotary_base"]
"""Every field of the configuration is a flag ``--fope-<field>``; the base is Megatron's ``--rotary-base``."""

_PROFILE_FIELDS = tuple(next(iter(PROFILES.values())))

_HELP: dict[str, str] = {
    "profile": "Which published variant: 'paper' (the authors' code) or 'intern-s1-pro' (XTuner, vLLM, "
    "SGLang, LMDeploy). Decides the defaults marked (profile).",
    "train_length": "Training length L in tokens; frequencies that complete less than one cycle in L are "
    "clipped. Keep it when you evaluate at another --seq-length. Default: --seq-length.",
    "gain": "Spread of the random coefficients around the identity, > 0 (paper: 0.3, 0.4, 0.6 for 60M, 180M, "
    "1.2B parameters).",
    "seed": "Seed of the coefficients; independent of --seed and of the parallel layout.",
    "init": "Initialisation of the coefficients.",
    "floor_ratio": "Multiplies the clipping floor 2 pi / L: 2 drops everything below two cycles in L.",
    "num_inv_freq": "Keep exactly the first so many frequencies and ignore the floor. Default: by the floor.",
    "clip": "Clip slow frequencies at all.",
    "drop_clipped": "Remove clipped frequencies and pad their channels; otherwise keep them as zeros.",
    "strict_floor": "Keep frequencies > the floor instead of >= it.",
    "square": "Give every kept frequency a series (D_out = D_in) instead of at most a quarter of head_dim.",
    "basis_dim": "Spread the frequencies over more channels than head_dim; 0: head_dim.",
    "separate_heads": "Coefficients per KV head instead of one matrix for all.",
    "separate_basis": "Separate coefficients for sin and cos.",
    "shared_layers": "One pair of coefficient matrices for all layers.",
    "normalize": "Divide every series by the sum of its coefficients.",
    "learnable": "Train the coefficients.",
    "padding": "sin,cos of channel pairs without a series: '1,1' as in every published implementation, '0,1' "
    "leaves them unrotated.",
    "scaling": "Length extension of the frequencies: position interpolation (pi: original/train length; "
    "linear: 1/factor), yarn or llama3.",
    "scaling_factor": "Length ratio for linear, yarn and llama3, >= 1.",
    "original_length": "Length before extension in tokens, for pi, yarn and llama3.",
    "scaling_before_clip": "Scale frequencies before clipping instead of after.",
    "yarn_beta_fast": "Cycles in the original length above which YaRN keeps a frequency.",
    "yarn_beta_slow": "Cycles below which YaRN fully interpolates a frequency.",
    "yarn_extrapolation_factor": "Weight of YaRN's unscaled part.",
    "attention_scaling": "Factor on sin and cos (YaRN's temperature is 0.1 ln(factor) + 1).",
    "exact_angles": "Angles in float64: more exact beyond 8k tokens, but unlike every published engine.",
}
_CHOICES = {
    "profile": tuple(PROFILES),
    "init": INITIALIZATIONS,
    "padding": tuple(PADDINGS),
    "scaling": SCALINGS,
}


def add_fope_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``fope`` to Megatron's position embedding types and the ``--fope-*`` group.

    Every flag's argparse default is None, so that "not given" can be told from a value; the real defaults
    are those of :class:`FoPEConfig` and the profile, named in the help.
    """
    action = parser._option_string_actions.get("--position-embedding-type")
    if action is not None and action.choices is not None and FOPE not in action.choices:
        action.choices = [*action.choices, FOPE]
    if flag("profile") in parser._option_string_actions:
        return parser  # registered again on top of somebody else's wrapper
    group = parser.add_argument_group("FoPE", "Fourier position embedding (--position-embedding-type fope)")
    for field in _FIELDS:
        # argparse formats help with %; our texts contain none.
        options: dict[str, Any] = {"dest": f"fope_{field.name}", "default": None, "help": _help(field)}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in _CHOICES:
            # Checked by FoPEConfig, whose one line names what is allowed.
            options["metavar"] = "{" + " ".join(_CHOICES[field.name]) + "}"
        else:
            kind = float if field.type == "float" else int
            options["type"] = functools.partial(_number, kind, flag(field.name))
            options["metavar"] = "X" if kind is float else "N"
        group.add_argument(flag(field.name), **options)
    return parser


def _number(kind: type, name: str, text: str) -> float | int:
    """Parse a number, or leave with one line: argparse would print Megatron's whole usage first."""
    try:
        return kind(text)
    except ValueError:
        allowed = "a number" if kind is float else "a whole number"
        with exit_on_user_error():
            raise UserError(f"{name} is {text!r}; allowed: {allowed}") from None


def _help(field: dataclasses.Field) -> str:
    text = _HELP[field.name]
    if field.name in _PROFILE_FIELDS:
        values = ", ".join(f"{name}: {settings[field.name]}" for name, settings in PROFILES.items())
        return f"{text} Default (profile): {values}."
    if field.name == "profile":
        return f"{text} Default: paper."
    if field.name in ("train_length", "num_inv_freq"):
        return text
    return f"{text} Default: {field.default}."


def given_fope_arguments(args: Any) -> dict[str, Any]:
    """The ``--fope-*`` values that were given, by field; from YAML namespaces too, where none exist."""
    values = {field.name: getattr(args, f"fope_{field.name}", None) for field in _FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def position_type_if_given(args: Any) -> str | None:
    """``--position-embedding-type``, or None when it has Megatron's default and may not have been given."""
    value = getattr(args, "position_embedding_type", None)
    return None if value == "learned_absolute" else value


def fope_config_from_args(args: Any) -> FoPEConfig:
    """FoPE's settings from Megatron's arguments, defaults filled in.

    Raises:
        UserError: a value outside what is allowed.
    """
    given = given_fope_arguments(args)
    profile = given.pop("profile", "paper")
    train_length = given.pop("train_length", args.seq_length)
    if getattr(args, "use_rope_scaling", False) and "scaling" not in given:
        # What RoPE would do under the same flag (megatron.core RotaryEmbedding, 8192 is built in there).
        given |= {"scaling": "llama3", "scaling_factor": args.rope_scaling_factor, "original_length": 8192}
    return FoPEConfig.from_profile(
        profile, train_length=train_length, rotary_base=float(args.rotary_base), **given
    )


def resolve_fope_arguments(args: Any, config: FoPEConfig | None = None) -> None:
    """Write the settings in force into Megatron's arguments, defaults filled in.

    Megatron prints them, sends them to TensorBoard and saves them with every checkpoint, whose reader
    accepts plain scalars and strings only. Nothing happens for other position embeddings, or while the
    model's size is not known yet.

    Args:
        args: Megatron's arguments, changed in place.
        config: settings that replace the flags, or None.

    Raises:
        UserError: a value outside what is allowed, or one that does not fit the model.
    """
    head_dim = _head_dim(args)
    if args.position_embedding_type != FOPE or head_dim is None or not args.seq_length:
        return
    config = config or fope_config_from_args(args)
    config.check_model(head_dim)
    for field in _FIELDS:
        setattr(args, f"fope_{field.name}", getattr(config, field.name))
    args.fope_kept_frequencies = config.d_in(head_dim)
    args.fope_clipped_frequencies = config.num_clipped(head_dim)
    args.fope_series = config.d_out(head_dim)
    args.fope_implementation = ROTATION_PATH


def _head_dim(args: Any) -> int | None:
    if getattr(args, "kv_channels", None) is not None:
        return args.kv_channels
    if args.hidden_size and args.num_attention_heads:
        return args.hidden_size // args.num_attention_heads
    return None


def check_command_line(argv: list[str]) -> None:
    """Refuse RoPE's fused kernels by name.

    Their values tell nothing, because Megatron's default is on for one of them, and the releases that have no
    such flags would answer with hundreds of lines of usage.

    Raises:
        UserError: one of them is given together with FoPE.
    """
    if FOPE not in argv and f"--position-embedding-type={FOPE}" not in argv:
        return
    for word in argv:
        name = word.partition("=")[0]
        if name in ("--apply-rope-fusion", "--fused-single-qkv-rope"):
            raise UserError(f"{name} is given, but FoPE cannot use RoPE's fused kernels; leave it out")


def check_before_megatron(args: Any) -> None:
    """Refuse what Megatron's own validation would turn into a stack trace or silently change.

    Raises:
        UserError: naming the flag.
    """
    if args.position_embedding_type != FOPE:
        given = given_fope_arguments(args)
        if given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"{flag(name)} is {value!r}, but --position-embedding-type is "
                f"{args.position_embedding_type!r}; allowed with: {FOPE}"
            )
        return
    rope_fusion, args.apply_rope_fusion = getattr(args, "apply_rope_fusion", False), False
    check_host_config(args)
    args.apply_rope_fusion = rope_fusion
    if getattr(args, "rotary_percent", 1.0) != 1.0:
        raise UserError(
            f"--rotary-percent is {args.rotary_percent}; FoPE rotates the whole head, allowed: 1.0"
        )
    if getattr(args, "transformer_impl", "local") == "transformer_engine":
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--transformer-impl is transformer_engine (Megatron's default), which cannot be imported "
                f"({error}); pip install 'megatron-fope[te]' or give --transformer-impl local"
            ) from None
    if (
        getattr(args, "dataloader_inter_document_masking", False)
        and getattr(args, "context_parallel_size", 1) > 1
        and not getattr(args, "sft", False)
    ):
        raise UserError(
            "--dataloader-inter-document-masking is given with --context-parallel-size "
            f"{args.context_parallel_size}: Megatron then cuts inside documents, where positions are not "
            "defined; allowed: --context-parallel-size 1"
        )


def adopt_checkpoint_arguments(args: Any, checkpoint_args: Any, where: str, asked: str | None) -> None:
    """``--use-checkpoint-args``: take FoPE's settings from a checkpoint.

    Args:
        args: Megatron's arguments, changed in place.
        checkpoint_args: the arguments stored in the checkpoint.
        where: its folder, for messages.
        asked: ``--position-embedding-type`` before Megatron overwrote it from the checkpoint.

    Raises:
        UserError: a flag that was given and says something else.
    """
    check_position_type(asked, checkpoint_args, where)
    if getattr(checkpoint_args, "position_embedding_type", None) != FOPE:
        return
    given = given_fope_arguments(args)
    for field in _FIELDS:
        stored = getattr(checkpoint_args, f"fope_{field.name}", None)
        if stored is None:
            continue
        value = given.get(field.name, stored)
        if value != stored and field.name == "learnable" and args.finetune:
            continue  # keep what was asked for: a new run may start or stop learning
        if value != stored and field.name not in FoPEConfig.FRESH_ONLY:
            _refuse_difference(flag(field.name), value, stored, where)
        setattr(args, f"fope_{field.name}", stored)


def check_against_checkpoint(args: Any, checkpoint_args: Any, where: str) -> None:
    """Refuse to load coefficients that other settings made.

    Args:
        args: Megatron's validated arguments.
        checkpoint_args: the arguments stored in the checkpoint.
        where: its folder, for messages.

    Raises:
        UserError: naming the flag and both values.
    """
    check_position_type(args.position_embedding_type, checkpoint_args, where)
    if args.position_embedding_type != FOPE:
        return
    config = fope_config_from_args(args)
    stored_config = fope_config_from_args(_with_defaults(checkpoint_args, args))
    differences = config.differences(stored_config)
    if args.finetune:
        differences.pop("learnable", None)  # a new run may start or stop learning; the numbers are the same
    if differences and config.profile != stored_config.profile:
        _refuse_difference("--fope-profile", config.profile, stored_config.profile, where)
    for field, (value, stored) in differences.items():
        _refuse_difference("--rotary-base" if field == "rotary_base" else flag(field), value, stored, where)
    shapes = {
        "kv_channels": "--kv-channels",
        "fope_kept_frequencies": "number of kept frequencies",
        "fope_series": "number of Fourier series",
    }
    values = [
        (text, getattr(args, name, None), getattr(checkpoint_args, name, None))
        for name, text in shapes.items()
    ]
    values.append(("--num-query-groups", _num_kv_heads(args), _num_kv_heads(checkpoint_args)))
    for text, value, stored in values:
        if value is not None and stored is not None and value != stored:
            _refuse_difference(text, value, stored, where)


def check_position_type(asked: str | None, checkpoint_args: Any, where: str) -> None:
    """Refuse a RoPE checkpoint in a FoPE run and the other way round.

    Raises:
        UserError: naming both types.
    """
    stored = getattr(checkpoint_args, "position_embedding_type", None)
    if stored is not None and asked is not None and asked != stored and FOPE in (asked, stored):
        _refuse_difference("--position-embedding-type", asked, stored, where)


def _num_kv_heads(args: Any) -> int | None:
    """Megatron leaves ``num_query_groups`` at 1 without ``--group-query-attention`` and ignores it."""
    grouped = getattr(args, "group_query_attention", False)
    return getattr(args, "num_query_groups" if grouped else "num_attention_heads", None)


def _with_defaults(checkpoint_args: Any, args: Any) -> argparse.Namespace:
    """A checkpoint's arguments, completed by the run's where an older one lacks a name."""
    return argparse.Namespace(
        **{"rotary_base": args.rotary_base, "seq_length": None, **vars(checkpoint_args)}
    )


def _refuse_difference(name: str, value: Any, stored: Any, where: str) -> None:
    raise UserError(f"{name} is {value!r}, but the checkpoint in {where} was trained with {stored!r}")
