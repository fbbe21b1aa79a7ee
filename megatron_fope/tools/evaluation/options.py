"""What both evaluations are told: which checkpoints, on which ranks, and where the results go."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.checkpoint.files import find_missing_legacy_file
from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.common.command_line import whole
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_output_file


def option(help: str, default: Any = dataclasses.MISSING, **words: Any) -> Any:
    """A field of options that is a flag, too: ``words`` are further ones for ``add_argument``."""
    return dataclasses.field(default=default, metadata={"help": help, **words})


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of both evaluations; every field is the flag of its name, and explained by the flag's help.

    The checkpoints, ``{label: folder}``, are ``--checkpoint label=folder``, once for each; numbers of a
    sequence are separated by commas on a command line.
    """

    checkpoints: dict[str, str | Path] = option(
        "folder made by Megatron's --save; may be repeated. NAME labels it, default: the folder's name",
        flag="--checkpoint",
        action="append",
        metavar="[NAME=]FOLDER",
    )
    data_path: str | Path = option("tokens to evaluate on: PREFIX.bin and PREFIX.idx", metavar="PREFIX")
    tokens_per_batch: int = option(
        "tokens in one forward pass, at least one sequence (default: 4096)", 4096, type=whole(), metavar="N"
    )
    output: str | Path | None = option("write the results here", None, metavar="FILE.json")
    csv: str | Path | None = option("write the results here, a row for each number", None, metavar="FILE.csv")
    picture: str | Path | None = option("draw the results here (needs matplotlib)", None, metavar="FILE.png")
    title: str | None = option("title of the picture", None)
    tensor_model_parallel_size: int | None = option(
        "TP of this run (default: the checkpoint's)", None, type=whole(), metavar="N"
    )
    pipeline_model_parallel_size: int | None = option(
        "PP of this run (default: the checkpoint's)", None, type=whole(), metavar="N"
    )
    context_parallel_size: int = option("CP of this run (default: 1)", 1, type=whole(), metavar="N")
    cpu: bool = option("evaluate on the CPU with gloo", False, action="store_true")
    megatron: Sequence[str] = option(
        "further flags for Megatron behind --, e.g. --transformer-impl local",
        (),
        flag="megatron",
        nargs="*",
        metavar="-- MEGATRON FLAGS",
    )

    def parallel_sizes(self, info: Checkpoint) -> tuple[int, int, int]:
        """Tensor-, pipeline- and context-parallel size for one checkpoint.

        Raises:
            UserError: not a positive number, or the checkpoint's format is bound to another layout.
        """
        stored, sizes = info.args, []
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            flag, given = f"--{name.replace('_', '-')}", getattr(self, name)
            saved = 1 if name == "context_parallel_size" else getattr(stored, name, 1)
            if given is not None and given < 1:
                raise UserError(f"{flag} is {given}; allowed: 1 or more")
            in_files = info.format == "torch" and name != "context_parallel_size"
            if in_files and given not in (None, saved):
                raise UserError(
                    f"{flag} is {given}, but {info.folder} was saved with {saved} in the 'torch' "
                    f"format, which is bound to it; allowed: {saved}"
                )
            sizes.append(saved if given is None else given)
        tensor, pipeline, context = sizes
        vocab_size = getattr(stored, "padded_vocab_size", None)
        if vocab_size and vocab_size % tensor:
            raise UserError(
                f"--tensor-model-parallel-size is {tensor}; allowed: divisors of {vocab_size}, the "
                f"vocabulary of {info.folder}"
            )
        return tensor, pipeline, context

    def check_layout(self, info: Checkpoint, lengths: Iterable[int]) -> None:
        """Refuse lengths that context or sequence parallelism cannot cut, and missing files of ranks.

        Raises:
            UserError: naming the flag.
        """
        tensor, pipeline, context = self.parallel_sizes(info)
        parts, reasons = 1, []
        if context > 1:
            parts *= 2 * context
            reasons.append(f"--context-parallel-size {context}")
        if tensor > 1 and getattr(info.args, "sequence_parallel", False):
            parts *= tensor
            reasons.append(f"sequence parallelism over {tensor} ranks")
        for length in lengths:
            if length % parts:
                raise UserError(
                    f"--lengths is {length}; allowed: multiples of {parts} with {' and '.join(reasons)}"
                )
        if info.format == "torch":
            missing = find_missing_legacy_file(info.folder, info.iteration, tensor, pipeline)
            if missing is not None:
                raise UserError(f"--checkpoint is {str(info.folder)!r}: {missing}")

    def check_outputs(self, *prefixes: str | Path) -> None:
        """Refuse files that cannot be written, before the evaluation whose results they shall hold.

        Args:
            prefixes: of the data, which no result may replace.

        Raises:
            UserError: naming the flag.
        """
        seen: dict[Path, str] = {}
        data = (f"{prefix}.{end}" for prefix in prefixes for end in ("bin", "idx", "json"))
        read = [Path(path).resolve() for path in (*data, *self.checkpoints.values())]
        for flag, path in (("--output", self.output), ("--csv", self.csv), ("--picture", self.picture)):
            if path is None:
                continue
            place = Path(path).resolve()
            for one in read:
                if one == place or (one.is_dir() and one in place.parents):
                    raise UserError(f"{flag} is {str(path)!r}, which this evaluation reads; use another file")
            if place in seen and place.is_file() | (not place.exists()):
                raise UserError(f"{flag} and {seen[place]} are both {str(path)!r}; use different files")
            seen[place] = flag
            check_output_file(flag, path)


def add_flags(parser: argparse.ArgumentParser, options: type[EvaluationOptions]) -> None:
    """Add a flag for every field."""
    for each in dataclasses.fields(options):
        words = dict(each.metadata)
        flag = words.pop("flag", f"--{each.name.replace('_', '-')}")
        if flag.startswith("--"):
            required = each.default is dataclasses.MISSING
            words |= {"dest": each.name} | ({"required": True} if required else {"default": each.default})
        parser.add_argument(flag, **words)


def options_from[Options: EvaluationOptions](
    options: type[Options], arguments: argparse.Namespace
) -> Options:
    """The values of :func:`add_flags`.

    Raises:
        UserError: two checkpoints have one label, or values that the options refuse.
    """
    values = {each.name: getattr(arguments, each.name) for each in dataclasses.fields(options)}
    pairs = [
        (text.partition("=")[0], text.partition("=")[2]) if "=" in text else (Path(text).name, text)
        for text in arguments.checkpoints
    ]
    labels = [label for label, _ in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(f"--checkpoint has the labels {', '.join(labels)}; use different ones, NAME=FOLDER")
    return options(**values | {"checkpoints": dict(pairs)})


def listed[Number: (int, float)](
    kind: Callable[[str], Number], allowed: str
) -> Callable[[str], list[Number]]:
    """A flag's ``type``: numbers separated by commas; the options check which."""

    def parse(text: str) -> list[Number]:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; allowed: {allowed}") from None

    return parse
