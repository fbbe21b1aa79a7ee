"""Saving never writes into another checkpoint: files that an iteration shares with it are let go first.

``megatron-fope convert --link hard`` makes such files, and so do ``cp -al`` and ``ln -s``. Megatron opens
files that are there and writes into them, which would change every checkpoint that has them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_fope.checkpoint.files import TRACKER, iteration_folder
from megatron_fope.common.errors import UserError, exit_on_user_error
from megatron_fope.common.log import announce
from megatron_fope.common.staging import write_text


def wrap_save_checkpoint(original: Callable) -> Callable:
    """Megatron's ``save_checkpoint``, called by every rank for every format of checkpoints."""
    signature = inspect.signature(original)

    def save_checkpoint(*given: Any, **kwargs: Any) -> Any:
        import torch
        from megatron.training import get_args

        call = signature.bind(*given, **kwargs).arguments
        args = get_args()
        save = args.save
        if call.get("non_persistent_ckpt"):
            own = getattr(args, "non_persistent_global_ckpt_dir", None)
            save = own or (save and os.path.join(save, "non_persistent"))
        # One rank of every node: the folder may be on a disk of its own.
        if save and "://" not in str(save) and os.environ.get("LOCAL_RANK", "0") == "0":
            with exit_on_user_error():
                release_shared_files(save, "release" if call.get("release") else call["iteration"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return original(*given, **kwargs)

    return save_checkpoint


def release_shared_files(save: str | Path, step: int | str) -> None:
    """Before an iteration is saved again, remove its links to files that other folders have too.

    Only names in this folder go; the files stay where else they are. The folder's tracker, which is written
    at the end of a save, becomes a file of its own.

    Raises:
        UserError: a link cannot be removed.
    """
    tracker, iteration = Path(save) / TRACKER, Path(save) / iteration_folder(step)
    try:
        if tracker.is_file() and _is_shared(tracker):
            text = tracker.read_text()
            if tracker.is_symlink():
                tracker.unlink()
            write_text(tracker, text)
        shared = list(_shared(iteration))
        for path in shared:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--save is {save}, where {iteration.name} shares files with another folder that saving would "
            f"change, and the links cannot be removed ({error.strerror or error}); use another folder"
        ) from None
    if shared:
        announce(
            f"{iteration} shared {len(shared)} files or folders with another checkpoint, which keeps them; "
            "this one is saved anew"
        )


def _shared(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            yield from _shared(inner)
    elif os.path.lexists(path) and _is_shared(path):
        yield path


def _is_shared(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1
