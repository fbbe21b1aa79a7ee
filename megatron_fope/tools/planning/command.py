"""``megatron-fope plan``: its flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from megatron_fope.common.command_line import number, whole
from megatron_fope.common.errors import UserError
from megatron_fope.tools.planning.cluster import GPUS, Cluster, memory_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.usage = (
        "megatron-fope plan --gpus N (--gpu NAME | --gpu-memory GIB) [--gpus-per-node N] [--margin SHARE]\n"
        "                          [--show N] [--json] -- MEGATRON FLAGS"
    )
    parser.description = (
        "Memory and communication of a training run, calculated from its own Megatron flags, without a GPU: "
        "bytes of one rank for parameters, gradients, optimizer, activations and FoPE, whether that fits, "
        "what a rank sends in a step, and the parallel layouts that fit with the least communication. Needs "
        "the flags of the model, --vocab-size and the batch sizes; layout flags are optional. What is "
        "calculated and how: python -m pydoc megatron_fope.tools.planning.activations, .states and "
        ".communication"
    )
    add = parser.add_argument
    add("--gpus", type=whole(), metavar="N", help="GPUs in all")
    add("--gpu", metavar="NAME", help=f"one of {', '.join(f'{n} ({m} GiB)' for n, m in GPUS.items())}")
    add("--gpu-memory", type=number(), metavar="GIB", help="memory of a GPU in GiB, instead of --gpu")
    add("--gpus-per-node", type=whole(), default=8, metavar="N", help="default: %(default)s")
    add(
        "--margin",
        type=number(),
        default=0.1,
        metavar="SHARE",
        help="share of the memory to leave free for what is not counted (default: %(default)s)",
    )
    add("--show", type=whole(), default=5, metavar="N", help="layouts to list (default: %(default)s)")
    add("--json", action="store_true", help="machine-readable, sizes in bytes")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Print the plan.

    Args:
        arguments: the command's.
        words: Megatron's flags behind ``--``.

    Returns:
        0; 1 if nothing fits.

    Raises:
        UserError: bad input; that of the command itself before Megatron is imported.
    """
    cluster = read_cluster(arguments)
    if arguments.show < 1:
        raise UserError(f"--show is {arguments.show}; allowed: 1 or more")
    if not words:
        raise UserError("no Megatron flags are given; requires -- and the flags of the run behind it")
    from megatron_fope.arguments.parser import megatron_parser, parse

    parser = megatron_parser("megatron-fope plan")
    from megatron_fope.arguments.checks import check_numbers
    from megatron_fope.tools.planning import report
    from megatron_fope.tools.planning.search import plan

    args = parse(parser, words)
    check_numbers(parser, args)
    result = plan(args, cluster)
    if arguments.json:
        shown = dataclasses.replace(result, best=result.best[: arguments.show])
        print(json.dumps(dataclasses.asdict(shown), indent=2, default=sorted))
    else:
        print(report.render(result, arguments.show))
    return 0 if result.best else 1


def read_cluster(arguments: argparse.Namespace) -> Cluster:
    """The machines that the command's flags describe.

    Raises:
        UserError: naming the flag.
    """
    if arguments.gpus is None:
        raise UserError("--gpus is missing; requires the number of GPUs in all")
    if (arguments.gpu is None) == (arguments.gpu_memory is None):
        both = "are both given" if arguments.gpu else "are both missing"
        raise UserError(f"--gpu and --gpu-memory {both}; use one of them")
    memory = arguments.gpu_memory if arguments.gpu is None else memory_of(arguments.gpu)
    return Cluster(arguments.gpus, memory, arguments.gpus_per_node, arguments.margin)
