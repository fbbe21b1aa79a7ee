"""The flags of all benchmarks. Heavy imports happen when one runs."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fope.common.command_line import OneLineParser, separated, whole
from megatron_fope.common.command_line import command as framed
from megatron_fope.common.errors import UserError
from megatron_fope.compat import require_supported_megatron

if TYPE_CHECKING:
    import torch

_PROGRAM = "python examples/bench"
DEVICES = ("auto", "cpu", "cuda")


def main(argv: list[str] | None = None) -> int:
    """Entry point; see :func:`run` for the exit code."""
    with framed(_PROGRAM):
        parser = OneLineParser(
            prog=_PROGRAM,
            description="Speed, memory and communication of FoPE's rotation beside RoPE and the published "
            "implementation. Results go to files in --out, keyed by configuration, machine kind and commit.",
        )
        add_arguments(parser)
        return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands and their flags."""
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)

    def add(name: str, text: str, *, device: str = "auto") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--out", default="out/bench", metavar="FOLDER", help="results (out/bench)")
        if device:
            command.add_argument(
                "--device", default=device, choices=DEVICES, help=f"where it runs (default: {device})"
            )
            command.add_argument(
                "--threads", type=whole(1), default=1, metavar="N", help="threads on a CPU (1)"
            )
        return command

    rotary = add("rotary", "time of the rotation of q and k, every implementation in one run, checked first")
    rotary.add_argument("--provider", metavar="NAME,...", help="implementations; 'copy' always runs")
    rotary.add_argument("--sequence", metavar="N,...", help="tokens S of a rank")
    rotary.add_argument("--heads", metavar="Q/KV,...", help="query and KV heads, e.g. 32/8")
    rotary.add_argument("--head-dim", metavar="N,...", help="channels per head")
    rotary.add_argument("--batch", metavar="N,...", help="micro-batch size")
    rotary.add_argument("--dtype", metavar="NAME,...", help="fp32, bf16, fp16")
    rotary.add_argument(
        "--layout", metavar="NAME,...", help="split (views of the fused projection), contiguous"
    )
    rotary.add_argument("--profile", metavar="NAME,...", help="paper, intern-s1-pro")
    rotary.add_argument("--rotary-base", metavar="X", help="base of the frequencies")
    rotary.add_argument("--learnable", action="store_const", const=True, help="coefficients get a gradient")
    rotary.add_argument("--seconds", type=whole(1), default=5, metavar="N", help="time per configuration (5)")
    rotary.add_argument(
        "--picture", action=argparse.BooleanOptionalAction, default=True, help="draw the CSV afterwards"
    )

    memory = add("memory", "bytes of tables, of what the backward pass keeps, and of temporaries")
    memory.add_argument(
        "--sequence", type=separated(whole(16)), metavar="N,...", help="tokens S (8192,131072,1048576)"
    )

    step = add("step", "time of a training step of a small GPT with RoPE and with FoPE, in turns")
    step.add_argument("--steps", type=whole(2), default=20, metavar="N", help="timed steps of each (20)")
    step.add_argument("megatron", nargs="*", metavar="-- MEGATRON FLAGS", help="other sizes or precision")

    communication = add("communication", "collectives and bytes of a training step, counted", device="cpu")
    communication.add_argument("--layout", metavar="NAME,...", help="parallel layouts, e.g. 'TP2 SP,CP2'")

    add("plot", "draw the pictures again from the CSV", device="")
    add("all", "rotary, memory and step, one after another: what a GPU is measured with")


def run(arguments: argparse.Namespace) -> int:
    """Run one benchmark.

    Returns:
        0, or 1 when a result was wrong: a failed check, or communication that differs.

    Raises:
        UserError: bad input, or something is not installed.
    """
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"megatron\."
    )  # libraries it does not find
    out = Path(arguments.out)
    if arguments.benchmark == "plot":
        return _plot(out)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    device = _device(arguments.device, arguments.threads)
    if arguments.benchmark in ("memory", "step", "communication"):
        require_supported_megatron()
    return _BENCHMARKS[arguments.benchmark](arguments, device, out)


def _rotary(arguments: argparse.Namespace, device: torch.device, out: Path) -> int:
    from bench import cases, providers, rotary

    names = (
        "sequence",
        "heads",
        "head_dim",
        "batch",
        "dtype",
        "layout",
        "profile",
        "rotary_base",
        "learnable",
    )
    given = {name: getattr(arguments, name, None) for name in names}
    seconds = getattr(arguments, "seconds", 5)
    selected = providers.select(getattr(arguments, "provider", None))
    failures = rotary.run(cases.parse_cases(device, given), selected, device, out, seconds=seconds)
    if getattr(arguments, "picture", True):
        try:
            _plot(out)
        except UserError as error:
            print(f"no picture: {error}")
    return 1 if failures else 0


def _memory(arguments: argparse.Namespace, device: torch.device, out: Path) -> int:
    from bench import memory

    memory.run(device, out, lengths=getattr(arguments, "sequence", None) or memory.LENGTHS)
    return 0


def _step(arguments: argparse.Namespace, device: torch.device, out: Path) -> int:
    from bench import end_to_end

    end_to_end.run(out, cpu=device.type == "cpu", steps=arguments.steps, flags=arguments.megatron)
    return 0


def _communication(arguments: argparse.Namespace, device: torch.device, out: Path) -> int:
    import torch

    from bench import communication
    from bench.cases import words

    layouts = list(communication.LAYOUTS)
    if arguments.layout is not None:
        layouts = words("--layout", arguments.layout, communication.LAYOUTS)
    num_ranks = max(communication.LAYOUTS[name][0] for name in layouts)
    if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
        raise UserError(
            f"--device is 'cuda', and --layout needs {num_ranks} GPUs where there are "
            f"{torch.cuda.device_count()}; use --device cpu"
        )
    return 1 if communication.run(layouts, out, cpu=device.type == "cpu") else 0


def _plot(out: Path) -> int:
    from bench import plot
    from bench.rotary import CSV

    print(*plot.draw(out / CSV), sep="\n")
    return 0


def _all(arguments: argparse.Namespace, device: torch.device, out: Path) -> int:
    failed = _rotary(arguments, device, out)
    try:
        require_supported_megatron()
    except UserError as error:
        print(f"no memory and no step: {error}")
        return failed
    _memory(arguments, device, out)
    # A process of its own: Megatron is initialised once, and the CPU runtime changes torch.
    command = [sys.executable, str(Path(__file__).parent), "step", "--device", device.type]
    command += ["--out", str(out), "--threads", str(arguments.threads)]
    step = subprocess.run(command).returncode
    return failed or step


_BENCHMARKS = {
    "rotary": _rotary,
    "memory": _memory,
    "step": _step,
    "communication": _communication,
    "all": _all,
}


def _device(name: str, threads: int) -> torch.device:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA compiler
    import torch

    torch.set_num_threads(threads)
    visible = torch.cuda.is_available()
    if name == "cuda" and not visible:
        raise UserError("--device is 'cuda', but no CUDA device is visible; use auto or cpu")
    return torch.device("cuda" if visible and name != "cpu" else "cpu")
