"""Reading what a Megatron checkpoint says about itself, without building a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.errors import UserError

_TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class CheckpointInfo:
    """One iteration of a checkpoint folder."""

    folder: Path
    """What ``--load`` takes."""
    iteration: int | str
    """Number, or "release"."""
    args: Any
    """Megatron's arguments as stored (``argparse.Namespace``)."""

    @property
    def position_embedding_type(self) -> str:
        """``rope``, ``fope`` or another of Megatron's types."""
        return getattr(self.args, "position_embedding_type", "learned_absolute")

    @property
    def train_length(self) -> int:
        """Sequence length of the training, in tokens; FoPE's own train length where there is one."""
        return getattr(self.args, "fope_train_length", None) or self.args.seq_length


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Read the arguments stored with a checkpoint (``torch_dist`` and legacy ``torch`` format).

    Unpickling is restricted to the classes that Megatron itself allows.

    Args:
        folder: the folder given to Megatron's ``--save``.

    Raises:
        UserError: no checkpoint there, or one without arguments.
    """
    folder = Path(folder)
    tracker = folder / _TRACKER
    if not tracker.is_file():
        raise UserError(
            f"--checkpoint is {str(folder)!r}: no {_TRACKER} there; allowed: a folder made by --save"
        )
    word = tracker.read_text().strip()
    if word != "release" and not word.isdecimal():
        raise UserError(
            f"--checkpoint is {str(folder)!r}: {_TRACKER} says {word[:40]!r}; allowed: a number or 'release'"
        )
    name = word if word == "release" else f"iter_{int(word):07d}"
    args = _stored_state(folder / name).get("args")
    if args is None:
        raise UserError(f"--checkpoint is {str(folder)!r}: it stores no arguments; allowed: one that does")
    return CheckpointInfo(folder, word if word == "release" else int(word), args)


def _stored_state(iteration: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    if dist_checkpointing.check_is_distributed_checkpoint(str(iteration)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            return dist_checkpointing.load_common_state_dict(str(iteration))
    import torch
    from megatron.core.safe_globals import register_safe_globals

    files = sorted(iteration.glob("mp_rank_00*/model_optim_rng.pt"))
    if not files:
        raise UserError(f"--checkpoint: {iteration} holds neither a torch_dist nor a legacy torch checkpoint")
    register_safe_globals()
    return torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
