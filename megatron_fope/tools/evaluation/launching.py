"""What the evaluation commands share: checkpoints and layouts on the command line, and starting the ranks."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_fope import __version__
from megatron_fope.checkpoint.files import find_missing_legacy_file
from megatron_fope.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_fope.common.command_line import whole
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_output_file, write_text
from megatron_fope.tools.evaluation.progress import tokens_done

logger = logging.getLogger(__name__)

_WORKER = "megatron_fope.tools.evaluation.worker"


@dataclass(frozen=True, slots=True)
class Layout:
    """On how many ranks an evaluation runs.

    Attributes:
        tensor: tensor-parallel size; None: the checkpoint's.
        pipeline: pipeline-parallel size; None: the checkpoint's.
        context: context-parallel size.
    """

    tensor: int | None = None
    pipeline: int | None = None
    context: int = 1

    def sizes(self, info: Checkpoint) -> tuple[int, int, int]:
        """Tensor-, pipeline- and context-parallel size for one checkpoint.

        Raises:
            UserError: not a positive number, or the checkpoint's format is bound to another layout.
        """
        stored = info.args
        flags = {
            "--tensor-model-parallel-size": (self.tensor, getattr(stored, "tensor_model_parallel_size", 1)),
            "--pipeline-model-parallel-size": (
                self.pipeline,
                getattr(stored, "pipeline_model_parallel_size", 1),
            ),
            "--context-parallel-size": (self.context, 1),
        }
        for flag, (given, saved) in flags.items():
            if given is not None and given < 1:
                raise UserError(f"{flag} is {given}; allowed: 1 or more")
            in_files = info.format == "torch" and flag != "--context-parallel-size"
            if in_files and given not in (None, saved):
                raise UserError(
                    f"{flag} is {given}, but {info.folder} was saved with {saved} in the 'torch' "
                    f"format, which is bound to it; allowed: {saved}"
                )
        tensor, pipeline, context = (saved if given is None else given for given, saved in flags.values())
        vocab_size = getattr(stored, "padded_vocab_size", None)
        if vocab_size and vocab_size % tensor:
            raise UserError(
                f"--tensor-model-parallel-size is {tensor}; allowed: divisors of {vocab_size}, the "
                f"vocabulary of {info.folder}"
            )
        return tensor, pipeline, context

    def check_files(self, info: Checkpoint) -> None:
        """Refuse a checkpoint in a format of files by rank from which one is missing.

        Raises:
            UserError: naming the file.
        """
        if info.metadata is None:
            tensor, pipeline, _ = self.sizes(info)
            missing = find_missing_legacy_file(info.folder, info.iteration, tensor, pipeline)
            if missing is not None:
                raise UserError(f"--checkpoint is {str(info.folder)!r}: {missing}")

    def check_lengths(self, lengths: Iterable[int], info: Checkpoint) -> None:
        """Refuse lengths that context or sequence parallelism cannot cut.

        Raises:
            UserError: there is one.
        """
        tensor, _, context = self.sizes(info)
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


def add_arguments(parser: argparse.ArgumentParser, *, title: str) -> None:
    """The flags of every evaluation command."""
    add = parser.add_argument
    add(
        "--checkpoint",
        action="append",
        required=True,
        metavar="[NAME=]FOLDER",
        help="folder made by Megatron's --save; may be repeated. NAME labels it, default: the folder's name",
    )
    add(
        "--tokens-per-batch",
        type=whole(),
        default=4096,
        metavar="N",
        help="tokens in one forward pass, at least one sequence (default: 4096)",
    )
    add("--output", metavar="FILE.json", help="write the results here")
    add("--csv", metavar="FILE.csv", help="write the results here, a row for each number")
    add("--picture", metavar="FILE.png", help="draw the results here (needs matplotlib)")
    add("--title", default=title, help="title of the picture")
    for word, letters in (("tensor", "TP"), ("pipeline", "PP")):
        own = f"{letters} of this run (default: the checkpoint's)"
        add(f"--{word}-model-parallel-size", type=whole(), metavar="N", help=own)
    add("--context-parallel-size", type=whole(), default=1, metavar="N", help="CP of this run (default: 1)")
    add("--cpu", action="store_true", help="evaluate on the CPU with gloo")
    add(
        "megatron",
        nargs="*",
        metavar="-- MEGATRON FLAGS",
        help="further flags for Megatron behind --, e.g. --transformer-impl local",
    )


def common_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of :func:`add_arguments` as keyword arguments of the evaluations.

    Raises:
        UserError: two checkpoints have one label.
    """
    pairs = [_label(text) for text in arguments.checkpoint]
    labels = [label for label, _ in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(f"--checkpoint has the labels {', '.join(labels)}; use different ones, NAME=FOLDER")
    return {
        "checkpoints": dict(pairs),
        "tokens_per_batch": arguments.tokens_per_batch,
        "layout": Layout(
            arguments.tensor_model_parallel_size,
            arguments.pipeline_model_parallel_size,
            arguments.context_parallel_size,
        ),
        "cpu": arguments.cpu,
        "megatron_flags": arguments.megatron,
        "output": arguments.output,
        "csv_file": arguments.csv,
        "picture": arguments.picture,
        "title": arguments.title,
    }


def parse_list(flag: str, text: str, number: Callable[[str], Any], allowed: str) -> list[Any]:
    """Numbers separated by commas.

    Raises:
        UserError: something else.
    """
    try:
        return [number(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} is {text!r}; allowed: {allowed}") from None


def check_outputs(outputs: dict[str, str | Path | None], inputs: Iterable[str | Path]) -> None:
    """Refuse files that cannot be written, before the evaluation whose results they shall hold.

    Args:
        outputs: by flag; None: not asked for.
        inputs: files and folders that are read, which no result may replace.

    Raises:
        UserError: naming the flag.
    """
    seen: dict[Path, str] = {}
    read = [Path(path).resolve() for path in inputs]
    for flag, path in outputs.items():
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


def evaluate_all(
    request: dict[str, Any],
    settings: dict[str, Any],
    checkpoints: dict[str, Checkpoint],
    layout: Layout,
    cpu: bool,
    megatron_flags: list[str],
    *,
    tokens: int,
    finished: Callable[[dict[str, Any], str], None],
) -> dict[str, Any]:
    """Run the worker for one checkpoint after another.

    Args:
        request: what the worker does, as plain JSON values.
        settings: what the report says about it.
        checkpoints: by label.
        layout: the ranks of each.
        cpu: run on the CPU with gloo.
        megatron_flags: further flags for Megatron.
        tokens: that go through each model, for the progress bar.
        finished: called with the report so far and the label of the checkpoint that it has got; what it
            writes stays when a later checkpoint fails.

    Returns:
        The settings with ``version`` and ``checkpoints``: for every label ``folder``, ``iteration``,
        ``position_embedding_type``, ``train_length`` and ``results``.

    Raises:
        UserError: an evaluation failed.
    """
    report = settings | {"version": __version__, "checkpoints": {}}
    for info in checkpoints.values():
        layout.check_lengths(request["lengths"], info)
        layout.check_files(info)
    for info in checkpoints.values():
        info.check_classes("--checkpoint")
    for label, info in checkpoints.items():
        logger.info("evaluating %s at %s tokens", info.folder, ", ".join(map(str, request["lengths"])))
        flags = [*_megatron_flags(info, layout, cpu), *megatron_flags]
        own = {"checkpoint": str(info.folder), "cpu": cpu, "megatron_flags": flags}
        tensor, pipeline, context = layout.sizes(info)
        with tqdm(
            total=tokens, unit=" tokens", unit_scale=True, desc=label, disable=None, leave=False
        ) as bar:
            results = _launch(request | own, tensor * pipeline * context, bar)
        report["checkpoints"][label] = {
            "folder": str(info.folder),
            "iteration": info.iteration,
            "position_embedding_type": info.position_embedding_type,
            "train_length": info.train_length,
            "results": results,
        }
        finished(report, label)
    return report


def read_checkpoints(checkpoints: dict[str, str | Path]) -> dict[str, Checkpoint]:
    """What every checkpoint says about itself, by label.

    Raises:
        UserError: one of them is none.
    """
    return {label: open_checkpoint(folder, name="--checkpoint") for label, folder in checkpoints.items()}


def write_json(report: dict[str, Any], path: str | Path) -> None:
    """Write a report.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_csv(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Write rows that have the same keys.

    Raises:
        OSError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def identity(label: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The columns of a CSV row that say which model it is about."""
    keys = ("iteration", "position_embedding_type", "train_length")
    return {"checkpoint": label} | {key: checkpoint[key] for key in keys}


def _megatron_flags(info: Checkpoint, layout: Layout, cpu: bool) -> list[str]:
    """How to run a checkpoint's model; what the model is, the worker takes from the checkpoint itself."""
    stored = info.args
    tensor, pipeline, context = layout.sizes(info)
    flags = ["--load", str(info.folder), "--no-load-optim", "--no-load-rng", "--micro-batch-size", "1"]
    flags += ["--tensor-model-parallel-size", str(tensor)]
    flags += ["--pipeline-model-parallel-size", str(pipeline)]
    flags += ["--context-parallel-size", str(context)]
    if getattr(stored, "padded_vocab_size", None):
        # Another tensor-parallel size would pad the vocabulary otherwise, with rows that nobody trained.
        flags += ["--make-vocab-size-divisible-by", str(stored.padded_vocab_size // tensor)]
    flags += ["--exit-on-missing-checkpoint", "--ckpt-format", info.format]
    if getattr(stored, "sequence_parallel", False) and tensor > 1:
        flags.append("--sequence-parallel")
    if getattr(stored, "transformer_impl", None) == "local" or cpu:
        flags += ["--transformer-impl", "local"]
    return flags


def _launch(request: dict[str, Any], num_ranks: int, bar: Any) -> list[dict[str, Any]]:
    """Run the worker on a number of ranks; they end when this process is interrupted or terminated."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_ranks), "-m", _WORKER),
            *(str(folder / "request.json"), str(folder / "result.json")),
        ]
        # Whatever Megatron loads, PyTorch unpickles only what check_classes has let through.
        own = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | os.environ | own
        with open(folder / "output", "wb") as output, open(folder / "errors", "wb") as errors:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.update(min(tokens_done(folder / "progress"), bar.total) - bar.n)
            except BaseException:
                _stop(process)
                raise
        if process.returncode == 0 and (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text())
        bar.close()
        said, wrong = ((folder / file).read_text(errors="replace") for file in ("output", "errors"))
        refusals = [line for line in wrong.splitlines() if line.startswith("megatron-fope: error: ")]
        if refusals:
            raise UserError(refusals[0].removeprefix("megatron-fope: error: "))
        sys.stderr.write(said[-2000:] + wrong[-6000:])
        raise UserError(f"the evaluation of {request['checkpoint']} failed; its last output is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks: they would keep the GPUs otherwise."""
    process.terminate()
    try:
        process.wait(40)  # torchrun gives its ranks 30 s
    finally:
        process.kill()


def _label(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    return (name, folder) if separator else (Path(text).name, text)
