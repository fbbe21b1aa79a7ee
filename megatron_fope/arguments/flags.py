"""FoPE's command-line flags, and how they meet Megatron's arguments."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from megatron_fope.arguments.layout import check_layout
from megatron_fope.arguments.megatron import CHECKPOINT_FORMATS, check_position_ids, dashes, head_dim_of
from megatron_fope.common.command_line import number, one_line_errors, whole
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import announce
from megatron_fope.formula.config import CHOICES, PROFILES, FoPEConfig, flag
from megatron_fope.formula.geometry import Geometry
from megatron_fope.kernels.backend import check_available

FOPE = "fope"
"""The value of ``--position-embedding-type``."""

START_FROM_ROPE = "--fope-start-from-rope"
"""Continues a RoPE model; a choice of one run, not a setting of the model."""

STARTS = ("immediate", "function-preserving", "clip-only")
"""Ways to continue a RoPE model: the paper's, :mod:`megatron_fope.layers.anneal`, RoPE without slow
frequencies."""

GROW = "--fope-grow"
"""Continues a FoPE model with a longer train length; a choice of one run, too."""

CHANGE_BASE = "--fope-change-rotary-base"
"""Goes with both: accepts another base than the checkpoint's."""

_CLIP_ONLY = {"init": "identity", "square": True, "pad_value": "0,1"}
"""Defaults under the start clip-only: every kept frequency in its channels, the others as if it were zero."""

FIELDS = [field for field in dataclasses.fields(FoPEConfig) if field.name != "rotary_base"]
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
    "growth": "How coefficients grow with the train length: 'aligned' gives every output that carries "
    "nothing a frequency, 'upstream' is the authors' rule, 'upstream-zeros' the same without random numbers.",
    "anneal_iters": f"Iterations of {START_FROM_ROPE} function-preserving, >= 1, in which RoPE becomes FoPE; "
    "give both until the end of them.",
    "anneal_order": "How clipped frequencies leave under it: 'together', or one after another, "
    "'slowest-first' or 'slowest-last'.",
    "anneal_clip": "In which of these iterations they leave: FIRST:LAST, counted from the "
    "start. Default: all.",
    "anneal_padding": "In which of them the padding comes in: FIRST:LAST. Default: all.",
    "anneal_series": "In which of them the series come in: FIRST:LAST. Default: all.",
    "fold_padding": "When a RoPE checkpoint, or one of --fope-pad-value 0,1, is loaded, divide the query and "
    "key weights of pairs without a series by the square root of 2: 1,1 is then the function of 0,1. Needs "
    "--no-load-optim or --finetune. Without effect on a checkpoint of 1,1.",
    "floor_ratio": "Multiplies the clipping floor 2 pi / L: 2 drops everything below two cycles in L, 0 "
    "nothing.",
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
    "pad_value": "sin,cos of channel pairs without a series: '1,1' as in every published implementation, "
    "'0,1' leaves them unrotated.",
    "scaling": "Length extension of the frequencies: position interpolation (pi: original/train length; "
    "linear: 1/factor), yarn or llama3.",
    "scaling_factor": "Length ratio for linear, yarn and llama3, >= 1.",
    "original_length": "Length before extension in tokens, for pi, yarn and llama3.",
    "scaling_before_clip": "Scale frequencies before clipping instead of after.",
    "yarn_beta_fast": "Cycles in the original length above which YaRN keeps a frequency.",
    "yarn_beta_slow": "Cycles below which YaRN fully interpolates a frequency.",
    "yarn_extrapolation_factor": "Weight of YaRN's unscaled part.",
    "attention_scaling": "Factor on sin and cos (YaRN's temperature is 0.1 ln(factor) + 1).",
    "backend": "What rotates queries and keys: 'torch', 'triton' (NVIDIA GPUs), or 'auto', which is "
    "Triton on a GPU where a first comparison with PyTorch agrees.",
    "exact_angles": "Angles in float64: more exact beyond 8k tokens, but unlike every published engine.",
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
    one_line_errors(parser)
    group = parser.add_argument_group("FoPE", "Fourier position embedding (--position-embedding-type fope)")
    for field in FIELDS:
        # argparse formats help with %; our texts contain none.
        options: dict[str, Any] = {"dest": f"fope_{field.name}", "default": None, "help": _help(field)}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in CHOICES:
            # Checked by FoPEConfig, whose one line names what is allowed.
            options["metavar"] = "{" + " ".join(CHOICES[field.name]) + "}"
        elif field.type == "str":
            options["metavar"] = "FIRST:LAST"  # of a schedule, which checks it
        else:
            is_float = field.type == "float"
            options["type"], options["metavar"] = (number(), "X") if is_float else (whole(), "N")
        group.add_argument(flag(field.name), **options)
    group.add_argument(
        START_FROM_ROPE,
        dest="fope_start_from_rope",
        nargs="?",
        const="immediate",
        default=None,
        metavar="{" + " ".join(STARTS) + "}",
        help="Accept a checkpoint of a RoPE model in --load or --pretrained-checkpoint: the coefficients are "
        "fresh, everything else comes from it. 'immediate' (also without a word): FoPE at once, as the paper "
        "does. 'function-preserving': the first forward pass is the RoPE model's, and FoPE comes in over "
        "--fope-anneal-iters. 'clip-only': RoPE without the frequencies below the floor, no mixing (defaults "
        "--fope-init identity, --fope-square, --fope-pad-value 0,1). Without effect on FoPE checkpoints, so "
        "a job that restarts may keep it. Learnable coefficients need --no-load-optim or --finetune too.",
    )
    group.add_argument(
        GROW,
        dest="fope_grow",
        action="store_true",
        default=None,
        help="Accept a FoPE checkpoint of a smaller --fope-train-length, or of other --fope-scaling flags: "
        "its coefficients grow as --fope-growth says. Without effect on a checkpoint of this length, so a "
        "job that restarts may keep it. Learnable coefficients need --no-load-optim or --finetune too.",
    )
    group.add_argument(
        CHANGE_BASE,
        dest="fope_change_rotary_base",
        action="store_true",
        default=None,
        help=f"Accept another --rotary-base than that of the checkpoint under {START_FROM_ROPE} or {GROW}.",
    )
    return parser


def _help(field: dataclasses.Field) -> str:
    text = _HELP[field.name]
    if field.name in _PROFILE_FIELDS:
        values = ", ".join(f"{name}: {settings[field.name]}" for name, settings in PROFILES.items())
        return f"{text} Default (profile): {values}."
    if field.name == "profile":
        return f"{text} Default: paper."
    if field.name in ("train_length", "num_inv_freq") or field.default == "":
        return text
    return f"{text} Default: {field.default}."


def given_fope_arguments(args: Any) -> dict[str, Any]:
    """The ``--fope-*`` values that were given, by field; from YAML namespaces too, where none exist."""
    values = {field.name: getattr(args, f"fope_{field.name}", None) for field in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def fope_config_from_args(args: Any) -> FoPEConfig:
    """FoPE's settings from Megatron's arguments, defaults filled in.

    Raises:
        UserError: a value outside what is allowed.
    """
    given = given_fope_arguments(args)
    profile = given.pop("profile", "paper")
    train_length = given.pop("train_length", args.seq_length)
    if getattr(args, "fope_start_from_rope", None) == "clip-only":
        folded = {"pad_value": "1,1"} if given.get("fold_padding") else {}
        given = _CLIP_ONLY | folded | given
    if "scaling" not in given and _scales_rope(args):
        from megatron_fope.arguments.rope import scaling_of  # imports Megatron

        given = scaling_of(args) | given
    return FoPEConfig.from_profile(
        profile, train_length=train_length, rotary_base=float(args.rotary_base), **given
    )


def _scales_rope(args: Any) -> bool:
    """Whether Megatron's own flags ask for other frequencies than those of the base."""
    interpolated = getattr(args, "rotary_seq_len_interpolation_factor", None) is not None
    return interpolated or bool(getattr(args, "use_rope_scaling", False))


def check_names(stored: Any) -> None:
    """Refuse a checkpoint's arguments that have names from before 0.1.0: their values would be ignored."""
    for name in ("fope_padding", "fope_implementation"):
        if getattr(stored, name, None) is not None:
            raise UserError(
                f"the checkpoint stores {name}: it was written by an earlier development version of "
                "megatron-fope, and only that version can read it"
            )


def fope_config_of_checkpoint(stored: Any, args: Any) -> FoPEConfig:
    """FoPE's settings of a checkpoint from its arguments, the run's where an older one lacks a name.

    Raises:
        UserError: a value outside what is allowed, or a name from before 0.1.0.
    """
    check_names(stored)
    common = {"rotary_base": args.rotary_base, "seq_length": None}
    return fope_config_from_args(argparse.Namespace(**common | vars(stored)))


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
    head_dim = head_dim_of(args)
    if args.position_embedding_type != FOPE or not head_dim or not args.seq_length:
        return
    if config is None and args.fope_scaling is None and _scales_rope(args):
        from megatron_fope.arguments.rope import ignored_flags

        announce(*ignored_flags(args))
    config = config or fope_config_from_args(args)
    geometry = Geometry(config, head_dim)
    for field in FIELDS:
        setattr(args, f"fope_{field.name}", getattr(config, field.name))
    args.fope_kept_frequencies = geometry.d_in
    args.fope_clipped_frequencies = geometry.num_clipped
    args.fope_series = geometry.d_out
    check_available(config.backend)


def given_flags(argv: list[str] | None = None) -> set[str]:
    """The flags on a command line, whatever their values; Megatron's parser knows no abbreviations.

    Args:
        argv: the words; None: those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


_WITHOUT_USE = {
    "--apply-rope-fusion": "FoPE cannot use RoPE's fused kernels; leave it out",
    "--fused-single-qkv-rope": "FoPE cannot use RoPE's fused kernels; leave it out",
    "--use-rotary-position-embeddings": f"--position-embedding-type is {FOPE}; leave it out",
    "--yarn-original-max-position-embeddings": "FoPE has a flag of its own; use --fope-original-length",
    "--yarn-beta-fast": "FoPE has a flag of its own; use --fope-yarn-beta-fast",
    "--yarn-beta-slow": "FoPE has a flag of its own; use --fope-yarn-beta-slow",
    "--yarn-correction-range-round-to-int": "FoPE's YaRN always rounds; leave it out",
    "--no-yarn-correction-range-round-to-int": "FoPE's YaRN always rounds; leave it out",
    "--yaml-cfg": "Megatron then ignores all other flags; use flags instead of the file",
}
"""Flags that would silently be ignored with FoPE, and what to do."""


def check_command_line(argv: list[str]) -> None:
    """Refuse by name the flags that FoPE would ignore.

    Parsed values do not tell whether a flag was given: one of them is on by default, and releases without
    these flags would answer with hundreds of lines of usage.

    Raises:
        UserError: one of them is given together with FoPE.
    """
    if FOPE not in argv and f"--position-embedding-type={FOPE}" not in argv:
        return
    given = given_flags(argv)
    required = set()
    if any(name.startswith("--heterogeneous-layers-config") for name in given):
        required.add("--use-rotary-position-embeddings")  # Megatron insists on it there
    for name, advice in _WITHOUT_USE.items():
        if name in given - required:
            raise UserError(f"{name} is given, but {advice}")
    if "--multi-latent-attention" not in given:
        for name in ("--rotary-scaling-factor", "--mscale", "--mscale-all-dim"):
            if name in given:
                raise UserError(
                    f"{name} is given, which has an effect on YaRN and latent attention only; use "
                    "--fope-scaling-factor or --fope-attention-scaling with --fope-scaling yarn"
                )


def check_before_megatron(args: Any) -> None:
    """Refuse what Megatron's own validation would turn into a stack trace or silently change."""
    if args.position_embedding_type != FOPE:
        given = given_fope_arguments(args)
        for name in ("start_from_rope", "grow", "change_rotary_base"):
            if getattr(args, f"fope_{name}", None):
                given[name] = getattr(args, f"fope_{name}")
        if given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"{flag(name)} is {value!r}, but --position-embedding-type is "
                f"{args.position_embedding_type!r}; requires --position-embedding-type {FOPE}"
            )
        return
    from megatron_fope.layers.attention import (
        check_megatron_config,  # imports Megatron, which other commands need not
    )

    check_start_flags(args)
    check_scaling_flags(args)
    rope_fusion, args.apply_rope_fusion = getattr(args, "apply_rope_fusion", False), False
    check_megatron_config(args)
    args.apply_rope_fusion = rope_fusion
    if getattr(args, "rotary_percent", 1.0) != 1.0:
        raise UserError(
            f"--rotary-percent is {args.rotary_percent}, but FoPE rotates the whole head; allowed: 1.0"
        )
    if getattr(args, "transformer_impl", "local") == "transformer_engine":
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--transformer-impl is transformer_engine (Megatron's default), which cannot be imported "
                f"({error}); pip install 'megatron-fope[te]' or give --transformer-impl local"
            ) from None
    _check_attention(args)
    _check_fsdp(args)
    if (
        getattr(args, "dataloader_inter_document_masking", False)
        and getattr(args, "context_parallel_size", 1) > 1
        and not getattr(args, "sft", False)
    ):
        raise UserError(
            "--dataloader-inter-document-masking is given with --context-parallel-size "
            f"{args.context_parallel_size}: Megatron then cuts inside documents, where positions are not "
            "defined; use --context-parallel-size 1"
        )
    check_position_ids(args)
    check_layout(args)


_READ_BY = {
    "scaling_factor": ("linear", "yarn", "llama3"),
    "original_length": ("pi", "yarn", "llama3"),
    **dict.fromkeys(("yarn_beta_fast", "yarn_beta_slow", "yarn_extrapolation_factor"), ("yarn",)),
}
"""Settings that only some of ``--fope-scaling`` look at."""


def check_scaling_flags(args: Any) -> None:
    """Refuse settings of a length extension that was not asked for: they would silently do nothing."""
    given = given_fope_arguments(args)
    scaling = given.get("scaling", "llama3" if getattr(args, "use_rope_scaling", False) else "none")
    for field in FIELDS:
        readers = _READ_BY.get(field.name, (scaling,))
        if (
            scaling in CHOICES["scaling"]
            and scaling not in readers
            and given.get(field.name, field.default) != field.default
        ):
            raise UserError(
                f"{flag(field.name)} is {given[field.name]}, which {flag('scaling')} {scaling} does not "
                f"read; use it with {' or '.join(readers)}"
            )


def check_start_flags(args: Any) -> None:
    """Refuse a start from RoPE that does not exist or that other flags contradict."""
    start, given = getattr(args, "fope_start_from_rope", None), given_fope_arguments(args)
    if start is not None and start not in STARTS:
        raise UserError(f"{START_FROM_ROPE} is {start!r}; allowed: {', '.join(STARTS)}")
    kind = getattr(args, "ckpt_format", None) or CHECKPOINT_FORMATS[0]
    if (start or getattr(args, "fope_grow", False)) and kind not in CHECKPOINT_FORMATS:
        raise UserError(
            f"--ckpt-format is {kind}, with which {START_FROM_ROPE} and {flag('grow')} were never tried; "
            f"allowed: {', '.join(CHECKPOINT_FORMATS)}"
        )
    iterations = given.get("anneal_iters", 0)
    if start == "function-preserving" and iterations < 1:
        raise UserError(f"{flag('anneal_iters')} is {iterations}; {START_FROM_ROPE} {start} needs at least 1")
    for name in FoPEConfig.START - {"fold_padding"} if start != "function-preserving" else ():
        default = FoPEConfig.__dataclass_fields__[name].default
        if given.get(name, default) != default:
            raise UserError(f"{flag(name)} is {given[name]}; requires {START_FROM_ROPE} function-preserving")
    if start == "clip-only":
        for name, allowed in (("init", "identity"), ("clip", True), ("drop_clipped", True)):
            if given.get(name, allowed) != allowed:
                raise UserError(
                    f"{flag(name)} is {given[name]!r}; {START_FROM_ROPE} {start} needs {allowed!r}"
                )


def _check_attention(args: Any) -> None:
    """Refuse context parallelism with Megatron's own attention, unless the CPU runtime has taught it."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    size = getattr(args, "context_parallel_size", 1)
    if size == 1 or getattr(DotProductAttention, "supports_context_parallelism", False):
        return
    backend = getattr(getattr(args, "attention_backend", None), "name", None)
    for name, value in (("--transformer-impl", args.transformer_impl), ("--attention-backend", backend)):
        if value == "local":
            raise UserError(
                f"--context-parallel-size is {size}, which the attention of {name} local does not support; "
                "use 1, or --transformer-impl transformer_engine with another --attention-backend"
            )


def _check_fsdp(args: Any) -> None:
    """Refuse FSDP of learnable coefficients, which stay float32, among parameters of 16 bits.

    FSDP2 asserts one dtype per module; Megatron FSDP trains with wrong values and says nothing.
    """
    if not (getattr(args, "fope_learnable", False) and (args.bf16 or args.fp16)):
        return
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name, False):
            raise UserError(
                f"{flag('learnable')} and --{'bf16' if args.bf16 else 'fp16'} are given with "
                f"--{dashes(name)}, which cannot shard float32 among 16-bit parameters; "
                "use frozen coefficients, or --use-distributed-optimizer"
            )
