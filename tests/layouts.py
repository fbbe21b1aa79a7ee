"""Real Megatron training with FoPE in many parallel layouts, each against one rank: ``make layouts``.

Every layout starts from the same checkpoint and trains 20 iterations on the CPU. Its losses must be those of
one rank within 1e-5 at every step in float32, and its gradient norms within 1e-4 relative; in bfloat16,
where the order of sums shows, within 0.02 and 0.05. Both are read from TensorBoard's files, which hold
float32 numbers where Megatron's log has three digits of the norm. Writes the table ``tests/layouts.md`` and
exits with 1 if a layout disagrees. Takes about half an hour on 2 cores.

    python tests/layouts.py [PART OF A NAME ...]     only some layouts; the table is then only printed
"""

from __future__ import annotations

import datetime
import math
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().with_name("helpers")))

from forks import Launcher
from launch import ROOT, TINY_MODEL

ITERS = 20
MADE_UP_DATA = (
    f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'scripts')!r}); import made_up_data; "
    "made_up_data.install()"
)
"""Python that every rank executes first where Megatron's mock data does not do."""

MODELS = {
    "learnable": "--fope-learnable",
    "bf16": "--bf16",
    "MoE": "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --disable-bias-linear",
    "MTP": "--mtp-num-layers 1 --untie-embeddings-and-output-weights",
    "no-bias": "--disable-bias-linear",
    "60-tokens": "--seq-length 60 --max-position-embeddings 60 --fope-train-length 64",
    "72-tokens": "--seq-length 72 --max-position-embeddings 72 --fope-train-length 64",
    "documents": "--dataloader-inter-document-masking --micro-batch-size 1",
    "packed": "--sft --no-create-attention-mask-in-dataloader --calculate-per-token-loss "
    "--micro-batch-size 1",
    "reset-position-ids": "--reset-position-ids --reset-attention-mask",
    "changing-lengths": "--moe-token-dispatcher-type alltoall --micro-batch-size 1",
}
"""What is trained: layouts whose names share these words share one single-rank reference.

``documents``: neighbours in ordinary sequences that must not see each other. ``packed``: short documents,
each padded to a multiple of twice the context-parallel ranks, so that one rank sees less padding than four.
``no-bias``: the backward pass of Megatron's recomputed MLP calls itself without end where there is a bias.
"""

STRUCTURES = ("MoE", "MTP", "no-bias")
"""Models whose checkpoint has other tensors."""

WAYS = {
    "TP2": "--tensor-model-parallel-size 2",
    "TP4": "--tensor-model-parallel-size 4",  # on 2 KV heads
    "SP": "--sequence-parallel",
    "CP2": "--context-parallel-size 2",
    "CP4": "--context-parallel-size 4",
    "PP2": "--pipeline-model-parallel-size 2",
    "PP4": "--pipeline-model-parallel-size 4",
    "virtual-stages": "--num-layers-per-virtual-pipeline-stage 1",
    "DP2": "",
    "DP4": "--micro-batch-size 1",
    "EP2": "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    "distributed-optimizer": "--use-distributed-optimizer",
    "overlapped": "--overlap-grad-reduce --overlap-param-gather",
    "micro-batch-1": "--micro-batch-size 1",
    "full-recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective-recompute": "--recompute-granularity selective",
    "fine-grained-recompute": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
}
"""How it is trained; numbers behind TP, CP, PP and DP multiply to the ranks."""

_TABLE = {
    "": "TP2, TP2 SP, TP4, TP4 SP, CP2, CP4, TP2 SP CP2, PP2, PP4, PP2 virtual-stages, TP2 SP PP2, PP2 CP2, "
    "DP2, DP2 distributed-optimizer, DP4 distributed-optimizer, DP2 distributed-optimizer overlapped, "
    "TP2 SP DP2 distributed-optimizer, PP2 DP2, CP2 DP2 distributed-optimizer, micro-batch-1, "
    "full-recompute, TP2 SP full-recompute, TP2 SP selective-recompute, "
    "TP4 SP PP2, PP2 CP4, TP2 SP PP2 CP2, TP2 SP CP2 DP2 distributed-optimizer, "
    "TP2 SP PP2 CP2 DP2 distributed-optimizer",
    "no-bias": "TP2 SP fine-grained-recompute",
    "60-tokens": "CP2, PP2, TP2 SP CP2",
    "72-tokens": "CP4",
    "reset-position-ids": "TP2 SP CP2",
    "changing-lengths": "CP2, PP2",
    "documents": "TP2 SP, PP2, PP4, DP2, full-recompute",
    "packed": "CP2, CP4, TP2 SP CP2, TP2 SP PP2, PP2 CP2, TP2 SP PP2 CP2",
    "MoE": "DP2 EP2, TP2 SP DP2 EP2, PP2 DP2 EP2, CP2 DP2 EP2, TP2 SP PP2 DP2 EP2",
    "MTP": "TP2 SP, PP2",
    "learnable": "TP2 SP, TP4, TP4 SP, CP2, PP2, DP2 distributed-optimizer, TP2 SP CP2, TP2 SP PP2 CP2",
    "learnable packed": "TP2 SP CP2",
    "learnable MoE": "DP2 EP2, TP2 SP DP2 EP2 distributed-optimizer",
    "bf16": "TP2 SP, TP4 SP, CP2, CP4, TP2 SP CP2, PP2, PP4, PP2 virtual-stages, TP2 SP PP2, "
    "DP2 distributed-optimizer, DP2 distributed-optimizer overlapped, TP2 SP DP2 distributed-optimizer, "
    "full-recompute, TP2 SP PP2 CP2, TP2 SP PP2 CP2 DP2 distributed-optimizer",
    "bf16 no-bias": "TP2 SP fine-grained-recompute",
    "bf16 documents": "TP2 SP",
    "bf16 packed": "TP2 SP CP2",
    "bf16 MoE": "DP2 EP2, TP2 SP DP2 EP2",
    "bf16 learnable": "TP4 SP, CP2",
}
LAYOUTS = [f"{model} {ways}".strip() for model, row in _TABLE.items() for ways in row.split(", ")]
"""Names: words of a model, then words of a way."""


@dataclass
class Curve:
    """What a run wrote: one value per iteration."""

    losses: list[float]
    grad_norms: list[float]


@dataclass
class Difference:
    """The largest over all iterations: of the loss, and of the gradient norm relative to it."""

    loss: float
    grad_norm: float
    agrees: bool


class Comparison:
    """Trains layouts and one-rank references, these once each."""

    def __init__(self, folder: Path, launcher: Launcher, *, iters: int = ITERS) -> None:
        self.folder = folder
        self.launcher = launcher
        self.iters = iters
        self._references: dict[tuple[str, ...], Curve] = {}

    def difference(self, name: str) -> Difference:
        """Train a layout and compare it.

        Raises:
            RuntimeError: a run failed; the message is the end of its log.
        """
        words = name.split()
        model = tuple(word for word in words if word in MODELS)
        if model not in self._references:
            self._references[model] = self._train(model, 1)
        reference = self._references[model]
        curve = self._train(tuple(words), num_ranks(name))
        loss = max(abs(a - b) for a, b in zip(curve.losses, reference.losses, strict=True))
        norms = zip(curve.grad_norms, reference.grad_norms, strict=True)
        norm = max(abs(a - b) / b for a, b in norms)
        loss_limit, norm_limit = (0.02, 0.05) if "bf16" in model else (1e-5, 1e-4)
        return Difference(loss, norm, loss <= loss_limit and norm <= norm_limit)

    def _train(self, words: tuple[str, ...], ranks: int) -> Curve:
        structure = [word for word in words if word in STRUCTURES]
        start = self.folder / "-".join(["start", *structure])
        if not start.exists():
            self._run(structure, 1, ["--save", str(start), "--save-interval", "2", "--train-iters", "2"])
        load = ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng"]
        events = self.folder / "-".join(["events", *words])
        self._run(words, ranks, [*load, "--train-iters", str(self.iters), "--tensorboard-dir", str(events)])
        curve = read_curve(events)
        if len(curve.losses) != self.iters:
            raise RuntimeError(f"{' '.join(words)}: only {len(curve.losses)} iterations")
        return curve

    def _run(self, words: list[str] | tuple[str, ...], ranks: int, flags: list[str]) -> None:
        made_up = {"packed", "changing-lengths"} & set(words)
        flags = [*" ".join((MODELS | WAYS)[word] for word in words).split(), *flags]
        argv = ["--cpu", "pretrain", *TINY_MODEL, "--position-embedding-type", "fope", *flags]
        hook = MADE_UP_DATA if made_up else ""
        code, log = self.launcher.run(ranks, argv, self.folder / "log", hook=hook, timeout=600)
        if code:
            raise RuntimeError(log[-4000:])


def num_ranks(name: str) -> int:
    """How many processes a layout needs."""
    return math.prod(int(size) for size in re.findall(r"\b[TCPD]P(\d+)", name))


def read_curve(events: Path) -> Curve:
    """Losses and gradient norms from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    losses, norms = ([s.value for s in accumulator.Scalars(tag)] for tag in ("lm loss", "grad-norm"))
    return Curve(losses, norms)


def main(wanted: list[str]) -> int:
    """Compare the layouts; returns the exit code."""
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder, Launcher() as launcher:
        comparison = Comparison(Path(folder), launcher)
        for name in LAYOUTS:
            if wanted and not any(part in name for part in wanted):
                continue
            try:
                d = comparison.difference(name)
                result = f"{d.loss:.1e} | {d.grad_norm:.1e} | {'yes' if d.agrees else '**no**'}"
                failed += not d.agrees
            except RuntimeError as error:
                print(error, file=sys.stderr)
                result = "failed | | **no**"
                failed += 1
            rows.append(f"| {name} | {num_ranks(name)} | {result} |")
            print(rows[-1], flush=True)
    if not wanted:
        (ROOT / "tests" / "layouts.md").write_text(document(rows, failed))
    print(f"{len(rows) - failed} of {len(rows)} layouts agree with one rank")
    return 1 if failed else 0


def document(rows: list[str], failed: int) -> str:
    """The committed table."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT)
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    return "\n".join(
        [
            "# Parallel layouts against one rank",
            "",
            f"`make layouts`, {datetime.date.today()}, commit {commit.stdout.strip()},",
            f"{platform.machine()} CPU, gloo, {versions}.",
            f"{len(rows) - failed} of {len(rows)} agree.",
            "",
            f"{ITERS} iterations from a common checkpoint; 4 layers, 4 query and 2 KV heads. The largest",
            "difference of the loss and, relative, of the gradient norm over all iterations, both read from",
            "TensorBoard's files. Limits: 1e-5 and 1e-4; for bf16, where the order of sums shows, 0.02 and",
            "0.05. `tests/layouts.py` explains the words.",
            "",
            "| layout | ranks | loss | gradient norm | agrees |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
