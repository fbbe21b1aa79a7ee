"""What a run makes of a checkpoint: it resumes FoPE, starts FoPE from RoPE, or grows FoPE to a longer length.

:func:`decide` answers once, from the run's arguments and the stored ones. Its answer knows the rest: what to
refuse, which coefficients to ask the file for, what to put into the model, what to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from megatron_fope.arguments.flags import (
    CHANGE_BASE,
    FOPE,
    GROW,
    START_FROM_ROPE,
    STARTS,
    fope_config_from_args,
    fope_config_of_checkpoint,
)
from megatron_fope.arguments.megatron import dashes, head_dim_of, num_kv_heads_of
from megatron_fope.arguments.rope import ROPE_TYPES, Scalable, check_same_rope
from megatron_fope.checkpoint.effect import describe_folding, describe_scaling, start_effect
from megatron_fope.checkpoint.folding import check_folding
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.growth import check_growth
from megatron_fope.formula.schedule import Schedule
from megatron_fope.layers import anneal

_SHAPES = ("kv_channels", "qk_pos_emb_head_dim", "num_attention_heads")
"""Arguments that decide the shapes of attention's weights."""


def check_start(args: Any) -> None:
    """Refuse a start from RoPE without a checkpoint: Megatron would begin with random weights."""
    if args.position_embedding_type != FOPE or not getattr(args, "fope_start_from_rope", None):
        return
    from megatron.training.checkpointing import checkpoint_exists

    folders = [args.load, getattr(args, "pretrained_checkpoint", None)]
    if getattr(args, "non_persistent_ckpt_type", None) is None and not any(map(checkpoint_exists, folders)):
        given = (
            " or ".join(str(folder) for folder in folders if folder) or "--load or --pretrained-checkpoint"
        )
        raise UserError(f"{START_FROM_ROPE} is given, but there is no checkpoint in {given}")


def decide(args: Any, stored: Any, folder: Any, *, iteration: int = 0, release: bool = False) -> Start | None:
    """How a run starts from a checkpoint, or None for a run without FoPE.

    Args:
        args: Megatron's validated arguments.
        stored: the arguments stored in the checkpoint.
        folder: where it is, for messages.
        iteration: its iteration.
        release: it is a "release" checkpoint, of which Megatron takes the weights only.

    Raises:
        UserError: the checkpoint is of RoPE and the run is not, or the other way round.
    """
    asked = args.position_embedding_type
    from_rope = starts_from_rope(args, stored, asked)
    if not from_rope:
        check_position_type(asked, stored, folder)
    if asked != FOPE:
        return None
    grows = getattr(args, "fope_grow", None) and position_type_of(stored) == FOPE
    kind: type[Start] = Resume
    if from_rope:
        kind = FromRope
    elif grows and changed_settings(args, stored):
        kind = Grow
    elif getattr(args, "fope_fold_padding", None):
        unfolded = fope_config_of_checkpoint(stored, args).pad_value != fope_config_from_args(args).pad_value
        kind = FoldPadding if unfolded else Resume
    return kind(args, stored, f"the checkpoint in {folder}", iteration, release)


def starts_from_rope(args: Any, stored: Any, asked: str | None) -> bool:
    """Whether the run, whose position embedding is ``asked``, continues this RoPE checkpoint with FoPE."""
    wanted = asked == FOPE and getattr(args, "fope_start_from_rope", None)
    return bool(wanted) and position_type_of(stored) in ROPE_TYPES


def position_type_of(stored: Any) -> str | None:
    """``--position-embedding-type`` of a checkpoint, where its arguments name one."""
    return getattr(stored, "position_embedding_type", None)


def changed_settings(args: Any, stored: Any) -> dict[str, tuple[Any, Any]]:
    """FoPE's settings that make another model than the checkpoint's: the run's value and the stored one."""
    theirs = fope_config_of_checkpoint(stored, args)
    changed = fope_config_from_args(args).differences(theirs)
    return {
        field: values for field, values in changed.items() if field not in FoPEConfig.START | {"learnable"}
    }


def check_position_type(asked: str | None, stored: Any, folder: Any) -> None:
    """Refuse a RoPE checkpoint in a FoPE run and the other way round."""
    kind = position_type_of(stored)
    if kind is not None and asked is not None and asked != kind and FOPE in (asked, kind):
        hint = f"; {START_FROM_ROPE} continues it with fresh coefficients" if kind in ROPE_TYPES else ""
        refuse_difference("--position-embedding-type", asked, kind, f"the checkpoint in {folder}", hint)


def refuse_difference(name: str, value: Any, stored: Any, where: str, hint: str = "") -> None:
    """Raise a :class:`UserError` that names a flag, its value and that of the checkpoint."""
    raise UserError(f"{name} is {value!r}, but {where} was trained with {stored!r}{hint}")


@dataclass(frozen=True)
class Start:
    """How a run with FoPE starts from one checkpoint."""

    args: Any
    """Megatron's arguments of the run, validated."""
    stored: Any
    """The arguments stored in the checkpoint."""
    where: str
    """How messages name it: "the checkpoint in FOLDER"."""
    iteration: int = 0
    release: bool = False

    fresh: ClassVar[bool] = False
    """Whether the checkpoint has no coefficients, and the model keeps those that it made."""

    @cached_property
    def config(self) -> FoPEConfig:
        """The run's settings."""
        return fope_config_from_args(self.args)

    @property
    def geometry(self) -> Geometry:
        """The numbers that follow from them."""
        return Geometry(self.config, head_dim_of(self.args))

    @cached_property
    def stored_config(self) -> FoPEConfig:
        """The settings of a checkpoint of FoPE."""
        return fope_config_of_checkpoint(self.stored, self.args)

    def check(self) -> None:
        """Refuse coefficients that other settings made, or weights of another shape."""
        self.check_settings()
        values = {name: [getattr(of, name, None) for of in (self.args, self.stored)] for name in _SHAPES}
        values["num_query_groups"] = [num_kv_heads_of(self.args), num_kv_heads_of(self.stored)]
        for name, (value, stored) in values.items():
            if None not in (value, stored) and value != stored:
                refuse_difference(f"--{dashes(name)}", value, stored, self.where)
        self._check_positions()

    def check_settings(self) -> None:
        """The part of :meth:`check` that each kind does in its own way."""
        raise NotImplementedError

    def begin(self) -> None:
        """Set where a function-preserving start is, for this process and the checkpoints that it saves."""
        completed = 0 if self.release or self.args.finetune else self.iteration  # as Megatron counts
        if self.fresh:
            done = 0
        elif anneal.is_annealed(self.stored, self.iteration):
            done = getattr(self.args, "fope_anneal_iters", None) or 0
        else:
            done = anneal.annealed_iterations(self.stored, self.iteration)
        self.args.fope_anneal_start = completed - done
        anneal.begin(self.args.fope_anneal_start, completed)

    def requested(self, tensor: Any) -> Any | None:
        """What to ask the file for in place of a ``ShardedTensor`` of coefficients; None: nothing."""
        return tensor

    def loaded(self, value: Any) -> Any:
        """What the model gets for coefficients that the file has."""
        return value

    def notes(self, folder: Any) -> Iterator[str]:
        """What the flags about a start have done, one line each."""
        names = ("start_from_rope", "grow", "anneal_iters", "fold_padding")
        flags = [getattr(self.args, f"fope_{name}", None) for name in names]
        if not any(flags):
            return  # nothing to say, and a program's own arguments may lack what the settings need
        total = self.config.anneal_iters
        weight = anneal.current_weight(total)
        base = getattr(self.stored, "rotary_base", self.config.rotary_base)
        if weight == 1 and flags[0] and not self.fresh:
            yield f"{START_FROM_ROPE} has no effect: {folder} holds coefficients, which are loaded"
        yield from self._notes(folder, base)
        if weight < 1:
            yield (
                f"FoPE's weight against RoPE is {weight:g}, and 1 in {total} iterations from iteration "
                f"{self.args.fope_anneal_start}"
            )
            if not Schedule.of(self.config).is_plain:
                yield f"its parts come in on a schedule of their own: {_schedule(self.config)}"

    def _notes(self, folder: Any, base: float) -> Iterator[str]:
        """Those of one kind; ``base`` is the checkpoint's."""
        raise NotImplementedError

    def _check_positions(self) -> None:
        """Refuse another use of positions by Megatron itself, which the shapes of weights do not show."""
        names = ["rotary_interleaved", "no_rope_freq"]
        if getattr(self.args, "multi_latent_attention", False):
            names += ["rotary_scaling_factor", "mscale_all_dim"]  # factors of the attention scores
        for name in names:
            if not hasattr(self.args, name) or not hasattr(self.stored, name):
                continue
            value, stored = getattr(self.args, name), getattr(self.stored, name)
            if name == "no_rope_freq":
                value, stored = (unrotated(of, self.args.num_layers) for of in (value, stored))
            if value != stored:
                refuse_difference(f"--{dashes(name)}", value, stored, self.where)

    def _refuse_half_annealed(self) -> None:
        if not anneal.is_annealed(self.stored, self.iteration):
            done = anneal.annealed_iterations(self.stored, self.iteration)
            raise UserError(
                f"{self.where} holds a model whose start from RoPE is at {done} of "
                f"{self.stored_config.anneal_iters} iterations; finish it first"
            )

    def _check_base(self) -> None:
        base, stored = self.args.rotary_base, getattr(self.stored, "rotary_base", None)
        accepted = getattr(self.args, "fope_change_rotary_base", None)
        if stored is not None and float(stored) != float(base) and not accepted:
            raise UserError(
                f"--rotary-base is {base}, but {self.where} was trained with {stored}; {CHANGE_BASE} accepts "
                "the change"
            )

    def _check_optimizer_state(self) -> None:
        """Coefficients that learn need an optimizer state, which there is none of for those that are new."""
        args, no_state = self.args, getattr(self.stored, "no_save_optim", False)
        if getattr(args, "fope_learnable", None) and not any(
            (self.release, args.finetune, args.no_load_optim, no_state)
        ):
            raise UserError(
                f"--fope-learnable is given, but {self.where} has no optimizer state for the coefficients; "
                "use --no-load-optim or --finetune"
            )


class Resume(Start):
    """A FoPE model goes on with the settings that it has; the coefficients come from the file."""

    accepted: ClassVar[frozenset[str]] = frozenset()
    """Settings that may differ."""

    def check_settings(self) -> None:
        config, stored = self.config, self.stored_config
        differences = config.differences(stored)
        differences = {name: both for name, both in differences.items() if name not in self.accepted}
        if self.args.finetune:
            differences.pop(
                "learnable", None
            )  # a new run may start or stop learning; the numbers are the same
        if anneal.is_annealed(self.stored, self.iteration):
            differences = {name: both for name, both in differences.items() if name not in FoPEConfig.START}
        if differences and config.profile != stored.profile:
            refuse_difference("--fope-profile", config.profile, stored.profile, self.where)
        for field, (value, old) in differences.items():
            hint = ""
            if field in FoPEConfig.START:
                hint = (
                    f" and is in the middle; give {START_FROM_ROPE} function-preserving {_schedule(stored)}"
                )
            elif field == "train_length" and value > old:
                hint = f"; {GROW} grows the coefficients"
            refuse_difference(flag(field), value, old, self.where, hint)

    def _notes(self, folder: Any, base: float) -> Iterator[str]:
        if getattr(self.args, "fope_grow", None):
            yield f"{GROW} has no effect: {folder} has train length {self.config.train_length} already"


class FoldPadding(Resume):
    """A FoPE model with padding 0,1 becomes the same function with padding 1,1, while it is loaded."""

    accepted = frozenset({"pad_value", "fold_padding"})

    def check_settings(self) -> None:
        self._refuse_half_annealed()
        super().check_settings()
        check_folding(self.args, self.stored, self.geometry, self.where, release=self.release)

    def loaded(self, value: Any) -> Any:
        from megatron_fope.layers.embedding import ToFold

        return ToFold(value)

    def _notes(self, folder: Any, base: float) -> Iterator[str]:
        yield describe_folding(self.geometry)


class FromRope(Start):
    """A RoPE model becomes FoPE: everything but the coefficients, which are fresh, comes from the file."""

    fresh = True

    def check_settings(self) -> None:
        self._check_base()
        self.check_model()
        self._check_optimizer_state()
        args = self.args
        if getattr(args, "fope_learnable", None) and getattr(args, "load_main_params_from_ckpt", False):
            raise UserError(
                f"--load-main-params-from-ckpt is given, but {self.where} has no learnable coefficients; "
                "leave it out"
            )
        if self.config.fold_padding:
            check_folding(args, self.stored, self.geometry, self.where, release=self.release)

    @property
    def way(self) -> str:
        """One of :data:`megatron_fope.arguments.flags.STARTS`."""
        return self.args.fope_start_from_rope or STARTS[0]

    @cached_property
    def same_rope(self) -> bool:
        """Whether the frequencies, before the clip, are the checkpoint's; False: they are scaled anew.

        Raises:
            UserError: another scaling than the checkpoint's, where the start cannot change it.
        """
        scalable: dict[str, Scalable] = {"immediate": "any", "function-preserving": "unscaled"}
        may_scale = scalable.get(self.way, "never")
        return check_same_rope(self.args, self.stored, self.config, self.where, may_scale=may_scale)

    def check_model(self) -> None:
        """Refuse a RoPE model that rotates by other frequencies than this run starts with."""
        start = self.way
        base = getattr(self.stored, "rotary_base", self.args.rotary_base)
        if start == "function-preserving" and float(base) != self.config.rotary_base:
            raise UserError(
                f"--rotary-base is {self.args.rotary_base}, but {self.where} was trained with {base}; "
                f"{START_FROM_ROPE} function-preserving keeps it, change it with immediate or later "
                f"with {GROW}"
            )
        self.same_rope  # noqa: B018

    def requested(self, tensor: Any) -> None:
        return None

    def loaded(self, value: Any) -> Any:
        # Imports Megatron, which other commands need not.
        from megatron_fope.layers.embedding import KEEP_INITIAL, ToFold

        return ToFold(KEEP_INITIAL) if self.config.fold_padding else KEEP_INITIAL

    def _notes(self, folder: Any, base: float) -> Iterator[str]:
        changed = "" if base == self.config.rotary_base else f" with --rotary-base {base}"
        yield (
            f"the coefficients are fresh (seed {self.config.seed}): {folder} is a RoPE model{changed}; "
            "everything else is loaded from it"
        )
        yield self.effect()
        if self.config.fold_padding:
            yield describe_folding(self.geometry)
        if getattr(self.args, "fope_grow", None):
            yield f"{GROW} has no effect: {folder} is a RoPE model"

    def effect(self) -> str:
        """What the start does to the function of a trained model, in one line."""
        config = self.config
        if self.way != "function-preserving":
            scaled = "" if self.same_rope else f"; its frequencies are scaled by {describe_scaling(config)}"
            return start_effect(self.way, self.geometry) + scaled
        if self.same_rope:
            return "the start preserves the function: the first loss is the checkpoint's own"
        return (
            f"the start preserves the function of the checkpoint scaled by {describe_scaling(config)}: the "
            "first loss is that model's, not the checkpoint's own"
        )


class Grow(Start):
    """A FoPE model goes on with a longer train length: its coefficients grow while they are loaded."""

    def check_settings(self) -> None:
        self.check_model()
        self._check_base()
        learnable, stored = self.config.learnable, self.stored_config.learnable
        if learnable != stored and not self.args.finetune:
            refuse_difference(
                flag("learnable"), learnable, stored, self.where, "; use --finetune to accept that"
            )
        self._check_optimizer_state()

    def check_model(self) -> None:
        """Refuse growth that is not possible."""
        check_growth(self.stored_config, self.config, self.where)
        self._refuse_half_annealed()

    def requested(self, tensor: Any) -> Any:
        matrix = Geometry(self.stored_config, head_dim_of(self.args)).coefficient_shape[1:]
        local, whole = ((*shape[:-2], *matrix) for shape in (tensor.local_shape, tensor.global_shape))
        data = tensor.data.new_empty(local)
        return dataclasses.replace(tensor, data=data, local_shape=local, global_shape=whole)

    def loaded(self, value: Any) -> Any:
        from megatron_fope.layers.embedding import ToGrow

        return ToGrow(value, self.stored_config)

    def _notes(self, folder: Any, base: float) -> Iterator[str]:
        sizes = [
            f"{getattr(of, 'fope_kept_frequencies', '?')} x {getattr(of, 'fope_series', '?')}"
            for of in (self.stored, self.args)
        ]
        yield (
            f"the coefficients grow ({self.config.growth}) from train length "
            f"{self.stored_config.train_length} to {self.config.train_length}, {sizes[0]} to {sizes[1]}; "
            f"everything else is loaded from {folder}"
        )
        if base != self.config.rotary_base:
            yield f"the rotary base changes from {base:g} to {self.config.rotary_base:g}"


def _schedule(config: FoPEConfig) -> str:
    """The flags of a gradual start that are not at their defaults."""
    given = {flag(name): value for name, (value, _) in config.differences(config.arrived).items()}
    return " ".join(name if value is True else f"{name} {value}" for name, value in given.items())


def unrotated(no_rope_freq: int | list[int] | None, num_layers: int | None) -> int | list[int] | None:
    """1 for every layer without positions, as Megatron expands ``--no-rope-freq``."""
    if isinstance(no_rope_freq, int) and num_layers:
        return [int((layer + 1) % no_rope_freq == 0) for layer in range(num_layers)]
    return no_rope_freq
