"""``megatron-fope convert``, ``inspect`` and ``diff``: the flags, and what the commands print."""

from __future__ import annotations

import argparse
import json

from megatron_fope.common.command_line import number, whole
from megatron_fope.common.errors import UserError


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Flags of ``convert``."""
    from megatron_fope.arguments.flags import add_fope_arguments
    from megatron_fope.tools.conversion.writing import LINKS

    parser.description = (
        "Make a checkpoint of another position embedding. Coefficients, arguments and tables are written; "
        "the model's data files are copied as they are. SOURCE is never written; TARGET appears when it is "
        "complete."
    )
    parser.usage = "megatron-fope convert SOURCE TARGET [--fope-...] [flags]"
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder made by Megatron's --save (--ckpt-format torch_dist)")
    add("target", metavar="TARGET", help="new folder, for --load")
    _add_iteration(parser, "--iteration", "SOURCE")
    add(
        "--position-embedding-type",
        default="fope",
        metavar="{fope rope}",
        help="what TARGET becomes (default: fope); rope removes the coefficients",
    )
    add("--rotary-base", type=number(), metavar="X", help="new base of the frequencies (default: SOURCE's)")
    add("--seq-length", type=whole(1), metavar="N", help="new --seq-length in TARGET's arguments, tokens")
    add(
        "--link",
        default="copy",
        metavar="{" + " ".join(LINKS) + "}",
        help="how data files get into TARGET (default: copy, without time and space where the file system "
        "clones files). Links share them: what later writes into TARGET changes SOURCE",
    )
    add_fope_arguments(parser)


def run_convert(args: argparse.Namespace) -> int:
    """``convert``.

    Returns:
        Exit code.

    Raises:
        UserError: bad input.
    """
    from megatron_fope.arguments.flags import given_fope_arguments
    from megatron_fope.formula.config import flag
    from megatron_fope.tools.conversion.converter import convert

    for name in ("grow", "change_rotary_base"):
        if getattr(args, f"fope_{name}", None):
            raise UserError(f"{flag(name)} is given to convert, which needs no permission; leave it out")
    done = convert(
        args.source,
        args.target,
        iteration=args.iteration,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        seq_length=args.seq_length,
        start=args.fope_start_from_rope,
        link=args.link,
        **given_fope_arguments(args),
    )
    for folder in done.leftovers:
        print(f"left by an interrupted conversion to TARGET, unless one is still running: {folder}")
    before, after = done.position_embedding_type
    lengths = done.train_length
    print(
        f"{before} -> {after}, train length {lengths[0]} -> {lengths[1]} tokens, "
        f"iteration {done.iteration} in {done.target}"
    )
    if done.effect:
        print(done.effect)
    for name, shape in done.coefficients.items():
        print(f"{'weights' if name in done.folded else 'coefficients'} {name} {list(shape)}")
    if done.folded:
        print(
            "the padding is folded into these weights, so that padding 1,1 is the function of 0,1; optimizer "
            "states are left out: load with --no-load-optim or --finetune"
        )
    how = {
        "hard": "hard links",
        "symbolic": "symbolic links",
        "clone": "clones, which share their blocks until they are written",
        "copy": "copies",
    }[done.links]
    print(
        f"{done.linked_files} data files ({done.linked_bytes / 1e9:.1f} GB) as {how}, "
        f"{done.written_bytes / 1e6:.1f} MB written, {done.seconds:.1f} s"
    )
    if done.links in ("hard", "symbolic"):
        print(
            "warning: TARGET shares its files with SOURCE; a Megatron without megatron-fope that saves "
            f"iteration {done.iteration} into TARGET would destroy SOURCE. Use another folder for --save"
        )
    return 0


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Flags of ``inspect``."""
    parser.description = "What a checkpoint holds, from its tables, arguments and file sizes."
    parser.add_argument("folder", metavar="FOLDER", help="folder made by Megatron's --save")
    _add_iteration(parser, "--iteration", "FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_inspect(args: argparse.Namespace) -> int:
    """``inspect``; raises as :func:`run_convert`."""
    from megatron_fope.tools.conversion.inspection import inspect

    found = inspect(args.folder, iteration=args.iteration)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Flags of ``diff``."""
    parser.description = (
        "How two torch_dist checkpoints of one model differ: settings, names, shapes and types of tensors, "
        "and the numbers of the coefficients. Other numbers are not read; data in the same file is said to "
        "be so. Exit code 0: no difference found, 1: some, 2: error."
    )
    parser.add_argument("first", metavar="A", help="folder made by Megatron's --save")
    parser.add_argument("second", metavar="B", help="another one, or the same with another iteration")
    _add_iteration(parser, "--iteration-a", "A")
    _add_iteration(parser, "--iteration-b", "B")


def run_diff(args: argparse.Namespace) -> int:
    """``diff``; raises as :func:`run_convert`.

    Returns:
        Exit code: 0, or 1 when something differs.
    """
    from megatron_fope.tools.conversion.comparison import diff

    iterations = args.iteration_a, args.iteration_b
    found = diff(args.first, args.second, iterations=iterations)
    print(found)
    return int(found.different)


def _add_iteration(parser: argparse.ArgumentParser, name: str, folder: str) -> None:
    parser.add_argument(
        name, type=_iteration, metavar="N", help=f"iteration of {folder}, or 'release' (default: the latest)"
    )


def _iteration(text: str) -> int | str:
    if text == "release":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: the number of an iteration or 'release'")
    return int(text)
