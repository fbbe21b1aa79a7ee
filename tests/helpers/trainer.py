"""Real training runs of a tiny model for tests that look at checkpoints and at every bit of a loss."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from forks import Launcher
from launch import ROOT, TINY_MODEL, losses, torchrun

from megatron_fope.tools.data import prepare_data

FOPE = ("--position-embedding-type", "fope")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
SHARP = ("--init-method-std", "0.15")
"""Attention that looks at positions from the first iteration on."""
DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")


@dataclass
class Run:
    """A finished run."""

    code: int
    log: str
    folder: Path
    """What ``--save`` got."""
    events: Path

    @property
    def losses(self) -> list[float]:
        """Of the log."""
        return losses(self.log)

    @property
    def grad_norms(self) -> list[float]:
        """Of the log, with three digits."""
        return [float(x) for x in re.findall(r"\| grad norm: ([\d.]+)", self.log)]

    def curve(self, tag: str = "lm loss") -> dict[int, float]:
        """What TensorBoard got of this run and those before it with the same name, every bit of it."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.events))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    @property
    def error(self) -> str:
        """The one line of a refused run."""
        assert self.code == 2, (self.code, self.log[-4000:])
        (line,) = [line for line in self.log.splitlines() if line.startswith("megatron-fope: error: ")]
        assert "Traceback" not in self.log, self.log[-6000:]
        return line.removeprefix("megatron-fope: error: ")

    def says(self, text: str) -> bool:
        """Whether FoPE logged it, exactly once."""
        return (
            len([line for line in self.log.splitlines() if line.startswith("> FoPE:") and text in line]) == 1
        )

    def coefficients(self, iteration: int = 4) -> dict[str, torch.Tensor]:
        """The coefficients of all layers as a ``torch_dist`` checkpoint holds them, by their last name."""
        from torch.distributed import checkpoint

        folder = self.folder / f"iter_{iteration:07d}"
        entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
        names = [name for name in entries if ".fope." in name and "optimizer" not in name]
        state = {n: torch.empty(entries[n].size, dtype=entries[n].properties.dtype) for n in names}
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
        return {name.rpartition(".")[2]: value for name, value in state.items()}


class Trainer:
    """Trains the tiny model of :mod:`launch`; the learning rate always falls over 8 iterations."""

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        self.folder = folder
        self._launcher = launcher
        self._bases: dict[str, Run] = {}
        # A text that never changes: the losses stay the same when the project does.
        data = prepare_data(ROOT, folder / "text", include=["LICENSE"], show_progress=False)
        self.data = data.train.prefix
        self._flags = [flag for flag in TINY_MODEL if flag != "--mock-data"] + list(data.train_flags)
        self._flags += ["--make-vocab-size-divisible-by", "256", "--split", "1,0,0"]
        self._flags += ["--data-path", data.train.prefix, "--data-cache-path", str(folder / "cache")]
        self._flags += ["--lr-decay-iters", "8", "--train-iters", "4", "--save-interval", "2"]

    def without(self, flag: str) -> Trainer:
        """One that leaves out a flag that has no value."""
        changed = copy.copy(self)
        changed._flags = [word for word in self._flags if word != flag]
        return changed

    def base(self, *flags: str) -> Run:
        """A run on one rank that any test may load and none may change, trained once for all of them."""
        name = "base " + " ".join(flags)
        if name not in self._bases:
            self._bases[name] = self.run(name, *flags)
        return self._bases[name]

    def run(
        self,
        name: str,
        *flags: str,
        nproc: int = 1,
        hook: str = "",
        entry: tuple[str, ...] = (),
        save: bool = True,
        check: bool = True,
    ) -> Run:
        """Train; another run with the same name goes on in the same folders.

        Args:
            name: of the folder for checkpoints, events and log.
            flags: Megatron's; later ones win.
            nproc: number of ranks.
            hook: see :meth:`forks.Launcher.run`.
            entry: what torchrun starts, instead of the built-in pre-training in a fork.
            save: write checkpoints, which takes longer than the training.
            check: fail if the run does.
        """
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        events = folder / "events"
        argv = [*self._flags, *(("--save", str(folder / "checkpoints")) if save else ())]
        argv += ["--tensorboard-dir", str(events), "--tensorboard-log-interval", "1", *flags]
        if entry:
            done = torchrun(nproc, [*entry, *argv])
            code, log = done.returncode, done.stdout
        else:
            code, log = self._launcher.run(nproc, ["--cpu", "pretrain", *argv], folder / "log", hook=hook)
        assert code == 0 or not check, log[-6000:]
        return Run(code, log, folder / "checkpoints", events)
