"""RoPE to FoPE, FoPE to a longer FoPE, and FoPE to RoPE, in checkpoints of any size."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.arguments.megatron import train_length_of
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer, open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_new_folder, leftovers
from megatron_fope.tools.conversion import settings, writing
from megatron_fope.tools.conversion.folding import folded_parts, folded_weights
from megatron_fope.tools.conversion.layers import Part, attention_layers, new_parts


@dataclass(kw_only=True)
class Conversion(writing.Written):
    """What :func:`convert` did."""

    target: Path
    iteration: int | str
    position_embedding_type: tuple[str, str]
    """Before and after."""
    train_length: tuple[int, int]
    """Before and after, in tokens; a RoPE model's is its ``seq_length``."""
    learnable: bool
    folded: tuple[str, ...]
    """Names of the weights that the padding's factor went into."""
    effect: str | None
    """What a start from RoPE does to the model's function, in one line."""
    seconds: float
    leftovers: tuple[Path, ...]
    """Hidden folders of other conversions to the same target: interrupted, or still at work."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    iteration: int | str | None = None,
    position_embedding_type: str = "fope",
    rotary_base: float | None = None,
    seq_length: int | None = None,
    start: str | None = None,
    link: str = "copy",
    **fope: Any,
) -> Conversion:
    """Make a checkpoint of another position embedding; only coefficients, arguments and tables are written.

    The model's data files are copied or linked as they are. The target loads in Megatron under every parallel
    layout that the source does, with the optimizer's states. Coefficients for a RoPE model are those that
    ``--fope-start-from-rope`` makes, and training goes on as with that flag; those of a FoPE model grow as
    :mod:`megatron_fope.formula.growth` says.

    By default the target's files are copies: clones, which take neither time nor space, where the file system
    makes them. With links, a Megatron that knows nothing of FoPE and saves the same iteration into the target
    writes into the source's files; while :func:`megatron_fope.register` is in force, no save does.

    Args:
        source: folder made by Megatron's ``--save`` with ``--ckpt-format torch_dist``. Never written.
        target: new folder, for ``--load``. Made at once when it is complete.
        iteration: number or "release"; None: the source's latest.
        position_embedding_type: "fope" or "rope".
        rotary_base: new base of the frequencies; None: the source's.
        seq_length: new ``seq_length`` in tokens in the arguments; None: the source's.
        start: how a RoPE model becomes FoPE, one of :data:`megatron_fope.arguments.flags.STARTS`; None: at
        once.
            "function-preserving" needs ``anneal_iters``.
        link: one of :data:`megatron_fope.tools.conversion.writing.LINKS`.
        **fope: fields of :class:`megatron_fope.FoPEConfig`; others stay the source's or, for a RoPE model,
            the profile's.

    Raises:
        UserError: bad input, a full disk. The source is as it was, and there is no target.
    """
    began = time.monotonic()
    target = Path(target)
    if position_embedding_type not in ("fope", "rope"):
        raise UserError(f"--position-embedding-type is {position_embedding_type!r}; allowed: fope, rope")
    if link not in writing.LINKS:
        raise UserError(f"--link is {link!r}; allowed: {', '.join(writing.LINKS)}")
    _check_target(Path(source), target)
    checkpoint = open_checkpoint(source, iteration, name="SOURCE")
    if checkpoint.format != "torch_dist":
        raise UserError(
            f"SOURCE is {str(source)!r} with the legacy format torch; requires torch_dist, which Megatron "
            "makes of it with --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER"
        )
    before = checkpoint.position_embedding_type, checkpoint.train_length
    given = {name: value for name, value in fope.items() if value is not None}
    plan = settings.plan(
        checkpoint,
        position_embedding_type,
        given,
        rotary_base=rotary_base,
        seq_length=seq_length,
        start=start,
    )
    left = leftovers(target)
    removed = _removed(checkpoint, plan.old)
    parts: Iterable[Part] = [] if plan.new is None else list(new_parts(checkpoint, plan.old, plan.new))
    source_state, weights = checkpoint, {}
    if plan.folds and plan.new is not None:
        weights = folded_weights(checkpoint, plan.new)
        removed += [*weights, *filter(is_optimizer, checkpoint.metadata.state_dict_metadata)]
        parts = itertools.chain(parts, folded_parts(checkpoint, weights))
        common = {name: value for name, value in checkpoint.common.items() if name != "optimizer"}
        source_state = dataclasses.replace(checkpoint, common=common)
    written = writing.write(source_state, target, plan.args, removed, parts, link=link)
    return Conversion(
        **vars(written),
        target=target,
        iteration=checkpoint.iteration,
        position_embedding_type=(before[0], position_embedding_type),
        train_length=(before[1], train_length_of(plan.args)),
        learnable=plan.new is not None and plan.new.learnable,
        folded=tuple(weights),
        effect=plan.effect,
        seconds=time.monotonic() - began,
        leftovers=tuple(left),
    )


def _removed(checkpoint: Checkpoint, old: Any) -> list[str]:
    """The source's coefficients; it must have those of all layers or, as a RoPE model, none."""
    names = list(checkpoint.coefficients)
    if old is None:
        if names:
            raise UserError(f"SOURCE {str(checkpoint.path)!r} says RoPE, but it holds {names[0]}")
        return []
    for layers in attention_layers(checkpoint):
        for leaf in old.coefficient_names:
            if layers.name(leaf) not in names:
                raise UserError(f"SOURCE {str(checkpoint.path)!r} has no {layers.name(leaf)}")
    return names


def _check_target(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"TARGET is {str(target)!r}, which is SOURCE or a part of it; use a new folder")
    check_new_folder("TARGET", target)
    if not target.parent.is_dir():
        raise UserError(f"TARGET is {str(target)!r}: the folder {str(target.parent)!r} does not exist")
