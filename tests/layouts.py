"""Real Megatron training with FoPE in many parallel layouts, each against one rank: ``make layouts``.

Every layout starts from the same checkpoint and trains 20 iterations on the CPU. Its losses must be those of
one rank within 1e-5 at every step in float32, and its gradient norms within 1e-3 relative (Megatron prints
three digits). Learnable coefficients, mixture of experts and bfloat16 have single-rank references of their
own. Writes the table ``tests/layouts.md`` and exits with 1 if a layout disagrees. Takes about 15 minutes on 2
cores.

    python tests/layouts.py [PART OF A NAME ...]     only some layouts; the table is then only printed
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from launch import ROOT, TINY_MODEL, losses, torchrun

ITERS = 20
TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
SP, DIST = "--sequence-parallel", "--use-distributed-optimizer"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --disable-bias-linear"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

FAMILIES = {"": "", "learnable": "--fope-learnable", "MoE": MOE, "bf16": "--bf16"}
"""Flags of a family of runs that share one single-rank reference."""

LAYOUTS: dict[str, tuple[int, str]] = {
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} {SP}"),
    "TP4 (2 KV heads)": (4, TP4),
    "TP4 SP (2 KV heads)": (4, f"{TP4} {SP}"),
    "CP2": (2, CP2),
    "CP4": (4, CP4),
    "TP2 SP CP2": (4, f"{TP2} {SP} {CP2}"),
    "PP2": (2, PP2),
    "PP4": (4, PP4),
    "PP2, 2 virtual stages": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "TP2 SP PP2": (4, f"{TP2} {SP} {PP2}"),
    "PP2 CP2": (4, f"{PP2} {CP2}"),
    "DP2": (2, ""),
    "DP2 distributed optimizer": (2, DIST),
    "DP4 distributed optimizer": (4, f"{DIST} --micro-batch-size 1"),
    "DP2 distributed optimizer, overlapped": (2, f"{DIST} --overlap-grad-reduce --overlap-param-gather"),
    "TP2 SP DP2 distributed optimizer": (4, f"{TP2} {SP} {DIST}"),
    "PP2 DP2": (4, f"{PP2} --micro-batch-size 1"),
    "CP2 DP2 distributed optimizer": (4, f"{CP2} {DIST}"),
    "micro-batch 1": (1, "--micro-batch-size 1"),
    "full recompute": (1, FULL),
    "full recompute TP2 SP": (2, f"{TP2} {SP} {FULL}"),
    "selective recompute TP2 SP": (2, f"{TP2} {SP} --recompute-granularity selective"),
    "learnable TP2 SP": (2, f"{TP2} {SP}"),
    "learnable TP4 (2 KV heads)": (4, TP4),
    "learnable CP2": (2, CP2),
    "learnable PP2": (2, PP2),
    "learnable DP2 distributed optimizer": (2, DIST),
    "learnable TP2 SP CP2": (4, f"{TP2} {SP} {CP2}"),
    "MoE EP2": (2, "--expert-model-parallel-size 2"),
    "MoE EP2 TP2 SP": (4, f"--expert-model-parallel-size 2 {TP2} {SP} --expert-tensor-parallel-size 1"),
    "bf16 TP2 SP": (2, f"{TP2} {SP}"),
    "bf16 TP4 SP (2 KV heads)": (4, f"{TP4} {SP}"),
    "bf16 CP2": (2, CP2),
    "bf16 PP2": (2, PP2),
    "bf16 TP2 SP PP2": (4, f"{TP2} {SP} {PP2}"),
    "bf16 DP2 distributed optimizer": (2, DIST),
    "bf16 TP2 SP CP2": (4, f"{TP2} {SP} {CP2}"),
    "bf16 full recompute": (1, FULL),
}
"""Name to ranks and flags; a name that starts with a family's belongs to it."""


@dataclass
class Curve:
    """What a run logged: one value per iteration."""

    losses: list[float]
    grad_norms: list[float]


def family(name: str) -> str:
    """The family a layout belongs to."""
    return next((f for f in FAMILIES if f and name.startswith(f)), "")


def train(folder: Path, ranks: int, flags: str, *, iters: int = ITERS) -> Curve:
    """Train the tiny model and read its log."""
    command = ["-m", "megatron_fope", "--cpu", "pretrain", *TINY_MODEL, "--position-embedding-type", "fope"]
    command += ["--train-iters", str(iters), "--log-interval", "1", *flags.split()]
    run = torchrun(ranks, command, timeout=600)
    if run.returncode:
        (folder / "failed.log").write_text(run.stdout)
        raise RuntimeError(run.stdout[-1500:])
    return Curve(losses(run.stdout), [float(x) for x in re.findall(r"\| grad norm: ([\d.]+)", run.stdout)])


def main(wanted: list[str]) -> int:
    """Run the references and the layouts; returns the exit code."""
    names = [n for n in LAYOUTS if not wanted or any(part in n for part in wanted)]
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references: dict[str, Curve] = {}
        for name in names:
            kind = family(name)
            base = FAMILIES[kind]
            start = folder / ("experts" if kind == "MoE" else "dense")
            load = f"--load {start} --finetune --no-load-optim --no-load-rng"
            if not start.exists():
                train(folder, 1, f"{MOE if kind == 'MoE' else ''} --save {start} --save-interval 2", iters=2)
            if kind not in references:
                references[kind] = train(folder, 1, f"{base} {load}")
            ranks, flags = LAYOUTS[name]
            try:
                curve = train(folder, ranks, f"{base} {load} {flags}")
                row, ok = compare(name, ranks, curve, references[kind])
            except RuntimeError as error:
                row, ok = f"| {name} | {ranks} | failed | | **no** |", False
                print(error, file=sys.stderr)
            failed += not ok
            rows.append(row)
            print(row, flush=True)
    if not wanted:
        (ROOT / "tests" / "layouts.md").write_text(document(rows, failed))
    print(f"{len(rows) - failed} of {len(rows)} layouts agree with one rank")
    return 1 if failed else 0


def compare(name: str, ranks: int, curve: Curve, reference: Curve) -> tuple[str, bool]:
    """A row of the table, and whether the layout agrees."""
    assert len(reference.losses) == len(reference.grad_norms) == ITERS
    if len(curve.losses) != ITERS:
        return f"| {name} | {ranks} | only {len(curve.losses)} iterations | | **no** |", False
    loss = max(abs(a - b) for a, b in zip(curve.losses, reference.losses, strict=True))
    norm = max(abs(a - b) / b for a, b in zip(curve.grad_norms, reference.grad_norms, strict=True))
    loss_limit, norm_limit = (0.02, 0.05) if family(name) == "bf16" else (1e-5, 1e-3)
    ok = loss <= loss_limit and norm <= norm_limit
    return f"| {name} | {ranks} | {loss:.1e} | {norm:.1e} | {'yes' if ok else '**no**'} |", ok


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
            "difference of the logged loss and, relative, of the logged gradient norm over all iterations.",
            "Limits: 1e-5 and 1e-3 (Megatron prints three digits of the norm); for bf16, where the order of",
            "sums shows, 0.02 and 0.05.",
            "",
            "| layout | ranks | loss | gradient norm | agrees |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
