"""Runs an evaluation of checkpoints, those of one layout in one launch, and writes their results."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tqdm import tqdm

from megatron_fope import __version__
from megatron_fope.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import write_text
from megatron_fope.tools.evaluation.options import EvaluationOptions
from megatron_fope.tools.evaluation.progress import tokens_done

logger = logging.getLogger(__name__)

_WORKER = "megatron_fope.tools.evaluation.worker"

_FIXED_IN_A_PROCESS = ("attention_backend", "batch_invariant_mode")
"""Stored arguments whose value Megatron, once a model was built, cannot change in the same process."""


class CheckpointReport[Row](TypedDict):
    """What is known of one checkpoint."""

    folder: str
    iteration: int | str
    position_embedding_type: str
    train_length: int
    results: list[Row]


class Report[Row](TypedDict):
    """What an evaluation returns and writes as JSON; the checkpoints by label."""

    data_path: str
    version: str
    checkpoints: dict[str, CheckpointReport[Row]]


@dataclass(frozen=True)
class Request:
    """What the ranks are told."""

    checkpoints: list[tuple[str, list[str]]]
    """Each folder with Megatron's flags; what the model is, the ranks take from the checkpoint itself."""
    cpu: bool
    measure: Callable[[Any], list[Any]]
    """From the model's chunks on a rank to the results; every rank calls it."""


def read_checkpoints(options: EvaluationOptions) -> dict[str, Checkpoint]:
    """What every checkpoint says about itself, by label.

    Raises:
        UserError: one of them is none.
    """
    return {
        label: open_checkpoint(folder, name="--checkpoint") for label, folder in options.checkpoints.items()
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """In what the two evaluations differ."""

    measure: Callable[[Any], list[Any]]
    """What a rank does with the model; it is pickled."""
    settings: dict[str, Any]
    """What the report says about it."""
    lengths: list[int]
    """Of the sequences, in tokens."""
    tokens: int
    """That go through each model, for the progress bar."""
    columns: dict[str, Any]
    """Of every row of a CSV file, after those that say which model it is about."""
    csv_rows: Callable[[Any], list[dict[str, Any]]]
    """A result as rows of such a file, all with the same keys."""
    draw: Callable[[Any, str | Path], None]
    """Writes a report as a picture."""


def evaluate_all(
    evaluation: Evaluation,
    options: EvaluationOptions,
    checkpoints: dict[str, Checkpoint],
    on_result: Callable[[Any, str], None] | None,
) -> Any:
    """Measure one checkpoint after another; those of the same layout share one launch.

    Args:
        evaluation: what to measure.
        options: of the command.
        checkpoints: by label.
        on_result: called with the report so far and the label of the checkpoint that it has got; what it
            writes stays when a later checkpoint fails, and so do the files.

    Returns:
        The settings as a :class:`Report`.

    Raises:
        UserError: an evaluation failed.
    """
    report: dict[str, Any] = evaluation.settings | {"version": __version__, "checkpoints": {}}
    for info in checkpoints.values():
        options.check_layout(info, evaluation.lengths)
    for info in checkpoints.values():
        info.check_classes("--checkpoint")
    launches: dict[tuple[Any, ...], list[str]] = {}
    for label, info in checkpoints.items():
        fixed = (repr(getattr(info.args, name, None)) for name in _FIXED_IN_A_PROCESS)
        launches.setdefault((*options.parallel_sizes(info), *fixed), []).append(label)
    done: dict[str, CheckpointReport[Any]] = {}
    for (tensor, pipeline, context, *_), labels in launches.items():
        folders = ", ".join(str(checkpoints[label].folder) for label in labels)
        logger.info("evaluating %s at %s tokens", folders, ", ".join(map(str, evaluation.lengths)))
        request = Request(
            [
                (str(checkpoints[label].folder), _megatron_flags(checkpoints[label], options))
                for label in labels
            ],
            options.cpu,
            evaluation.measure,
        )
        bar = tqdm(
            total=evaluation.tokens * len(labels),
            unit=" tokens",
            unit_scale=True,
            desc=", ".join(labels),
            disable=None,
            leave=False,
        )
        with bar, closing(_launch(request, tensor * pipeline * context, bar)) as all_results:
            for results, label in zip(all_results, labels, strict=True):
                bar.clear()
                info = checkpoints[label]
                done[label] = {
                    "folder": str(info.folder),
                    "iteration": info.iteration,
                    "position_embedding_type": info.position_embedding_type,
                    "train_length": info.train_length,
                    "results": results,
                }
                report["checkpoints"] = {each: done[each] for each in checkpoints if each in done}
                if on_result is not None:
                    on_result(report, label)
                if options.output is not None:
                    write_text(options.output, json.dumps(report, indent=2) + "\n")
                if options.csv is not None:
                    _write_csv(report, evaluation, options.csv)
    if options.picture is not None:
        evaluation.draw(report, options.picture)
    return report


def aligned(rows: list[list[str]], *, first: int, others: int) -> str:
    """A text table with the widths of its first and its other columns."""
    return "\n".join(row[0].rjust(first) + "".join(cell.rjust(others) for cell in row[1:]) for row in rows)


def _write_csv(report: dict[str, Any], evaluation: Evaluation, path: str | Path) -> None:
    rows = []
    for label, checkpoint in report["checkpoints"].items():
        model = {key: checkpoint[key] for key in ("iteration", "position_embedding_type", "train_length")}
        for result in checkpoint["results"]:
            about = {"checkpoint": label} | model | evaluation.columns
            rows += [about | row for row in evaluation.csv_rows(result)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _megatron_flags(info: Checkpoint, options: EvaluationOptions) -> list[str]:
    """How to run a checkpoint's model."""
    stored = info.args
    tensor, pipeline, context = options.parallel_sizes(info)
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
    if getattr(stored, "transformer_impl", None) == "local" or options.cpu:
        flags += ["--transformer-impl", "local"]
    return [*flags, *options.megatron]


def _launch(request: Request, num_ranks: int, bar: Any) -> Generator[list[Any], None, None]:
    """Run the worker on a number of ranks; they end when this process is interrupted or terminated.

    Yields:
        The results of each checkpoint, when they are there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request").write_bytes(pickle.dumps(request))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_ranks), "-m", _WORKER, str(folder)),
        ]
        # Whatever Megatron loads, PyTorch unpickles only what check_classes has let through.
        own = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | os.environ | own
        with open(folder / "output", "wb") as output, open(folder / "errors", "wb") as errors:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
            done, running = 0, True
            try:
                while running:
                    time.sleep(0.1)
                    running = process.poll() is None
                    bar.update(min(tokens_done(folder / "progress"), bar.total) - bar.n)
                    while (folder / f"{done}.json").is_file():
                        yield json.loads((folder / f"{done}.json").read_text())
                        done += 1
            finally:
                if running:
                    _stop(process)
        if process.returncode == 0 and done == len(request.checkpoints):
            return
        bar.close()
        said, wrong = ((folder / file).read_text(errors="replace") for file in ("output", "errors"))
        refusals = [line for line in wrong.splitlines() if line.startswith("megatron-fope: error: ")]
        if refusals:
            raise UserError(refusals[0].removeprefix("megatron-fope: error: "))
        sys.stderr.write(said[-2000:] + wrong[-6000:])
        failed, _ = request.checkpoints[min(done, len(request.checkpoints) - 1)]
        raise UserError(f"the evaluation of {failed} failed; its last output is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks: they would keep the GPUs otherwise."""
    process.terminate()
    try:
        process.wait(40)  # torchrun gives its ranks 30 s
    finally:
        process.kill()
