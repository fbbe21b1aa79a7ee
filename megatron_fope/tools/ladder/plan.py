"""From a schedule to one Megatron command a stage, checked before anything runs.

A stage is a run of its own in its own folder: it starts from the checkpoint of the stage before with
``--pretrained-checkpoint``, from which Megatron takes the weights only, with iteration 0, a fresh optimizer,
a fresh learning-rate schedule and the data from the beginning. Once it has saved, the same command goes on
from its own folder (``--load``), with everything. So the command of a stage never changes, whether it starts
or resumes.

The checks are those of training itself, on the arguments that Megatron's parser makes of the flags; what a
stage leaves behind is described by its own arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.arguments.checks import check_model, check_numbers
from megatron_fope.arguments.flags import (
    CHANGE_BASE,
    FOPE,
    GROW,
    START_FROM_ROPE,
    STARTS,
    check_start_flags,
    fope_config_from_args,
    resolve_fope_arguments,
)
from megatron_fope.arguments.layout import Layout, check_layout
from megatron_fope.arguments.megatron import head_dim_of, train_length_of
from megatron_fope.arguments.parser import megatron_parser, parse
from megatron_fope.arguments.rope import ROPE_TYPES
from megatron_fope.checkpoint.arguments import check_legacy_layout
from megatron_fope.checkpoint.files import TRACKER
from megatron_fope.checkpoint.start import changed_settings, decide
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import flag
from megatron_fope.tools.ladder.schedule import OWNED, Schedule

_NO_MASK = "no-create-attention-mask-in-dataloader"
"""A mask takes length x length bytes of every sample, and no attention for long sequences reads it."""

_CLIP_ONLY = ("init", "square", "pad_value")
"""Settings that the start clip-only implies; later stages have no such start and must name them."""

_COMPARED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_experts", "swiglu", "normalization")
"""Arguments that decide the shapes of weights and are not compared by FoPE's own checks."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, ready to run."""

    number: int
    """From 1."""
    name: str
    """Of its folder."""
    folder: Path
    """What it loads and saves."""
    launcher: list[str]
    flags: list[str]
    args: Any
    """What Megatron's parser makes of the flags, with FoPE's settings filled in."""
    notes: list[str]
    """What it does, line by line."""
    source_read: bool
    """False where only the schedule says what it starts from."""

    @property
    def argv(self) -> list[str]:
        """The complete command."""
        return [*self.launcher, *self.flags]

    @property
    def iterations(self) -> int:
        return self.args.train_iters


@dataclass(frozen=True)
class Source:
    """What a stage continues."""

    where: str
    """Folder, for messages."""
    args: Any
    """Its stored arguments."""
    iteration: int | str
    format: str = "torch_dist"
    read: bool = True
    """False where only the schedule says what it is."""


def plan(schedule: Schedule, extra: Sequence[str] = ()) -> list[StagePlan]:
    """Every stage's command, checked.

    Args:
        schedule: the schedule.
        extra: further words behind the flags of every stage.

    Raises:
        UserError: naming file, stage and flag.
    """
    parser = _parser(schedule.launcher)
    for word in extra:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in OWNED:
            raise UserError(f"{word} is given, but a ladder sets it: {OWNED[name]}; leave it out")
    source = read_source(schedule)
    plans = []
    for number, stage in enumerate(schedule.stages, 1):
        try:
            planned = _plan_stage(schedule, number, parser, source, list(extra))
        except UserError as error:
            raise UserError(f"{schedule.path}: stage {number}: {error}") from None
        plans.append(planned)
        source = Source(str(schedule.folder(stage)), planned.args, planned.iterations)
    return plans


def read_source(schedule: Schedule) -> Source:
    """What the first stage continues: from the checkpoint, or as ``[start]`` says if there is none here.

    Raises:
        UserError: neither, or both and they differ.
    """
    start = schedule.start
    where, given = start["checkpoint"], {k: v for k, v in start.items() if k in _FACTS}
    if not (Path(where) / TRACKER).is_file():
        missing = [key for key in _FACTS if key not in given]
        if missing:
            raise UserError(
                f"{schedule.path}: [start] checkpoint is {where!r}: no {TRACKER} there; use a folder "
                f"made by --save, or give {', '.join(missing)} beside it to see the commands only"
            )
        return Source(where, argparse.Namespace(**_described(given, schedule.path)), 0, read=False)
    from megatron_fope.checkpoint.reader import open_checkpoint

    found = open_checkpoint(where, name=f"{schedule.path}: [start] checkpoint")
    for key, value in given.items():
        stored = getattr(found.args, key.replace("-", "_"), value)
        if stored != value:
            raise UserError(f"{schedule.path}: [start] {key} is {value!r}, but {where} has {stored!r}")
    return Source(where, found.args, found.iteration, found.format)


_FACTS = ("position-embedding-type", "seq-length", "rotary-base")


def _described(given: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = given["position-embedding-type"]
    allowed = (*ROPE_TYPES, FOPE)
    if kind not in allowed:
        raise UserError(f"{path}: [start] position-embedding-type is {kind!r}; allowed: {', '.join(allowed)}")
    return {key.replace("-", "_"): value for key, value in given.items()}


def _plan_stage(
    schedule: Schedule, number: int, parser: argparse.ArgumentParser, source: Source, extra: list[str]
) -> StagePlan:
    stage = schedule.stages[number - 1]
    words = _words(stage.flags)
    asked = parse(parser, [*words, *extra])
    check_numbers(parser, asked)
    folder = str(schedule.folder(stage))
    _check_folder(schedule, number)
    start = _start_words(schedule, number, source, asked)
    if _NO_MASK not in stage.flags:
        start.append(f"--{_NO_MASK}")
    length = str(asked.seq_length)
    own = ["--position-embedding-type", FOPE, flag("train_length"), length, *start]
    own += ["--max-position-embeddings", length]
    own += ["--pretrained-checkpoint", source.where, "--load", folder, "--save", folder]
    args = parse(parser, [*words, *own, *extra])
    args.world_size, args.finetune = stage.gpus, True  # as Megatron sets it where it takes weights only
    _check(args, source)
    return StagePlan(
        number=number,
        name=stage.name,
        folder=schedule.folder(stage),
        launcher=schedule.launcher,
        flags=[*words, *own, *extra],
        args=args,
        notes=_notes(args, source),
        source_read=source.read,
    )


def _check_folder(schedule: Schedule, number: int) -> None:
    """Refuse a stage whose folder, however it is spelled, is another one's: it would be taken for finished.

    Raises:
        UserError: naming the folder.
    """
    stage = schedule.stages[number - 1]
    folder = schedule.folder(stage)
    if _same(folder, Path(schedule.start["checkpoint"])):
        raise UserError(f"name is {stage.name!r}: its folder {folder} is what the ladder starts from")
    for other in schedule.stages[: number - 1]:
        if _same(folder, schedule.folder(other)):
            raise UserError(f"name is {stage.name!r}: its folder {folder} is that of stage {other.name!r}")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one place; of what exists the file system says it."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _start_words(schedule: Schedule, number: int, source: Source, args: Any) -> list[str]:
    """FoPE's flags for what this stage starts from."""
    way = schedule.start.get("from-rope")
    gradual = {name: value for name, value in schedule.start.items() if name.startswith("anneal-")}
    from_rope = source.args.position_embedding_type in ROPE_TYPES
    if number == 1 and from_rope and way is None:
        raise UserError(
            f"{source.where} is a RoPE model; requires [start] from-rope = one of {', '.join(STARTS)}"
        )
    if number == 1 and not from_rope and way is not None:
        raise UserError(f"[start] from-rope is {way!r}, but {source.where} is no RoPE model; leave it out")
    if gradual and way != "function-preserving":
        raise UserError(f"[start] {next(iter(gradual))} is given; requires from-rope = 'function-preserving'")
    words = [START_FROM_ROPE, way] if from_rope and way is not None else [GROW]
    if from_rope:
        words += [word for name, value in gradual.items() for word in (f"--fope-{name}", str(value))]
    if way == "clip-only" and not from_rope:
        implied = argparse.Namespace(**{**vars(args), "fope_start_from_rope": way})
        settings = fope_config_from_args(implied)
        for field in _CLIP_ONLY:
            if getattr(args, f"fope_{field}") is None:
                value = getattr(settings, field)
                words += [flag(field)] if value is True else [flag(field), str(value)]
    if float(getattr(source.args, "rotary_base", args.rotary_base)) != float(args.rotary_base):
        words.append(CHANGE_BASE)
    return words


def _check(args: Any, source: Source) -> None:
    """Whether a stage can start from its source and be cut among its ranks.

    Raises:
        UserError: naming the flag.
    """
    before = train_length_of(source.args)
    if args.seq_length < before:
        raise UserError(
            f"--seq-length is {args.seq_length}, but {source.where} was trained with {before}; "
            f"allowed: at least {before}"
        )
    for name in ("hidden_size", "num_attention_heads", "num_layers"):
        if not getattr(args, name) and getattr(args, "hybrid_layer_pattern", None) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing")
    check_model(args)
    check_layout(args, world_name="gpus", complete=True)
    if args.save_interval < 1:
        raise UserError(f"--save-interval is {args.save_interval}; allowed: 1 or more")
    for name in ("min_lr", "lr_warmup_init"):
        if (getattr(args, name, None) or 0) > args.lr:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name):g}; allowed: up to --lr {args.lr:g}"
            )
    if getattr(args, "train_samples", None):
        raise UserError("--train-samples is given; a ladder counts iterations, use train-iters")
    warm_up = getattr(args, "lr_warmup_iters", 0) or 0
    if warm_up >= (args.lr_decay_iters or args.train_iters):
        raise UserError(
            f"--lr-warmup-iters is {warm_up}; allowed: less than --lr-decay-iters or --train-iters"
        )
    if args.kv_channels is None and not getattr(args, "multi_latent_attention", False):
        args.kv_channels = head_dim_of(args) or None
    if args.fope_anneal_iters and args.fope_anneal_iters > args.train_iters:
        raise UserError(
            f"--train-iters is {args.train_iters}; allowed: at least the {args.fope_anneal_iters} of [start] "
            "anneal-iters"
        )
    check_start_flags(args)
    _check_source(args, source)
    resolve_fope_arguments(args, dataclasses.replace(fope_config_from_args(args), backend="auto"))


def _check_source(args: Any, source: Source) -> None:
    stored = source.args
    if not source.read and stored.position_embedding_type == FOPE:
        # All that is known of it; the other settings are taken to be those of the schedule.
        known = {**vars(args), "seq_length": stored.seq_length, "fope_train_length": stored.seq_length}
        stored = argparse.Namespace(**{**known, "rotary_base": stored.rotary_base})
    release = source.iteration == "release"
    iteration = 0 if release else int(source.iteration)
    start = decide(args, stored, source.where, iteration=iteration, release=release)
    if start is not None:
        start.check()
    for name in _COMPARED:
        value, before = getattr(args, name, None), getattr(stored, name, None)
        if None not in (value, before) and value != before:
            raise UserError(
                f"--{name.replace('_', '-')} is {value!r}, but the checkpoint in {source.where} was trained "
                f"with {before!r}"
            )
    if source.format == "torch":
        check_legacy_layout(args, stored, source.where)


def _notes(args: Any, source: Source) -> list[str]:
    """What a stage does, for the one who reads the plan."""
    length, batch = args.seq_length, args.global_batch_size * args.seq_length
    layout = Layout.of(args)
    sizes = {"TP": layout.tp, "PP": layout.pp, "CP": layout.cp, "DP": layout.dp}
    if layout.ep > 1:
        sizes["EP"] = layout.ep
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    kind = "RoPE" if source.args.position_embedding_type in ROPE_TYPES else "FoPE"
    known = "" if source.read else "; not here, [start] says so"
    base, before = f"{args.rotary_base:g}", getattr(source.args, "rotary_base", args.rotary_base)
    kept, pairs = args.fope_kept_frequencies, head_dim_of(args) // 2
    return [
        f"{length} tokens, {args.train_iters} iterations of {args.global_batch_size} sequences "
        f"({batch:,} tokens), {args.train_iters * batch:,} tokens in all, lr {args.lr:g}",
        f"{args.world_size} ranks: {shown}; {length // layout.cp} tokens of a sequence on a rank",
        f"from {source.where} ({kind}, {train_length_of(source.args)} tokens{known})",
        f"rotary base {base if float(before) == float(args.rotary_base) else f'{before:g} -> {base}'}, "
        f"{kept} of {kept + args.fope_clipped_frequencies} frequencies kept, {args.fope_series} of {pairs} "
        "channel pairs with a series",
    ]


def check_saved(stage: StagePlan, stored: Any) -> None:
    """Refuse to go on in a folder that holds something else than the stage.

    Raises:
        UserError: naming the folder and the first difference.
    """
    where = f"stage {stage.number}: {stage.folder}"
    if getattr(stored, "position_embedding_type", None) != FOPE:
        raise UserError(f"{where} holds no FoPE model; give the stage another name")
    for field, (value, other) in changed_settings(stage.args, stored).items():
        raise UserError(
            f"{where} was trained with {flag(field)} {other}, the schedule says {value}; give the stage "
            "another name"
        )


def _words(flags: dict[str, list[str]]) -> list[str]:
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def _parser(launcher: list[str]) -> argparse.ArgumentParser:
    """The parser of the Megatron that the launcher starts: its script's folder comes first, as there."""
    for word in launcher:
        if word.endswith(".py") and Path(word).is_file():
            sys.path.insert(0, str(Path(word).resolve().parent))
    return megatron_parser("megatron-fope ladder")
