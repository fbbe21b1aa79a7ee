"""Runs an evaluation of several checkpoints, each on ranks of its own, and writes their results."""

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
from collections.abc import Callable
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

    checkpoint: str
    flags: list[str]
    """Megatron's, for this run; what the model is, the ranks take from the checkpoint itself."""
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


def evaluate_all(
    options: EvaluationOptions,
    checkpoints: dict[str, Checkpoint],
    measure: Callable[[Any], list[Any]],
    settings: dict[str, Any],
    *,
    lengths: list[int],
    tokens: int,
    csv_rows: Callable[[Any], list[dict[str, Any]]],
    on_result: Callable[[Any, str], None] | None,
) -> Any:
    """Measure one checkpoint after another.

    Args:
        options: of the evaluation.
        checkpoints: by label.
        measure: what a rank does with the model; it is pickled.
        settings: what the report says about it.
        lengths: of the sequences, in tokens.
        tokens: that go through each model, for the progress bar.
        csv_rows: a report as rows that have the same keys.
        on_result: called with the report so far and the label of the checkpoint that it has got; what it
            writes stays when a later checkpoint fails, and so do the files.

    Returns:
        The settings as a :class:`Report`.

    Raises:
        UserError: an evaluation failed.
    """
    report = settings | {"version": __version__, "checkpoints": {}}
    for info in checkpoints.values():
        options.check_layout(info, lengths)
    for info in checkpoints.values():
        info.check_classes("--checkpoint")
    for label, info in checkpoints.items():
        logger.info("evaluating %s at %s tokens", info.folder, ", ".join(map(str, lengths)))
        sizes = options.parallel_sizes(info)
        flags = [*_megatron_flags(info, sizes, options.cpu), *options.megatron]
        request = Request(str(info.folder), flags, options.cpu, measure)
        with tqdm(
            total=tokens, unit=" tokens", unit_scale=True, desc=label, disable=None, leave=False
        ) as bar:
            results = _launch(request, sizes[0] * sizes[1] * sizes[2], bar)
        report["checkpoints"][label] = {
            "folder": str(info.folder),
            "iteration": info.iteration,
            "position_embedding_type": info.position_embedding_type,
            "train_length": info.train_length,
            "results": results,
        }
        if on_result is not None:
            on_result(report, label)
        if options.output is not None:
            write_text(options.output, json.dumps(report, indent=2) + "\n")
        if options.csv is not None:
            _write_csv(csv_rows(report), options.csv)
    return report


def identity(label: str, checkpoint: CheckpointReport[Any]) -> dict[str, Any]:
    """The columns of a CSV row that say which model it is about."""
    return {
        "checkpoint": label,
        "iteration": checkpoint["iteration"],
        "position_embedding_type": checkpoint["position_embedding_type"],
        "train_length": checkpoint["train_length"],
    }


def _write_csv(rows: list[dict[str, Any]], path: str | Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _megatron_flags(info: Checkpoint, sizes: tuple[int, int, int], cpu: bool) -> list[str]:
    """How to run a checkpoint's model."""
    stored = info.args
    tensor, pipeline, context = sizes
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


def _launch(request: Request, num_ranks: int, bar: Any) -> list[Any]:
    """Run the worker on a number of ranks; they end when this process is interrupted or terminated."""
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
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.update(min(tokens_done(folder / "progress"), bar.total) - bar.n)
            except BaseException:
                _stop(process)
                raise
        if process.returncode == 0 and (folder / "results.json").is_file():
            return json.loads((folder / "results.json").read_text())
        bar.close()
        said, wrong = ((folder / file).read_text(errors="replace") for file in ("output", "errors"))
        refusals = [line for line in wrong.splitlines() if line.startswith("megatron-fope: error: ")]
        if refusals:
            raise UserError(refusals[0].removeprefix("megatron-fope: error: "))
        sys.stderr.write(said[-2000:] + wrong[-6000:])
        raise UserError(f"the evaluation of {request.checkpoint} failed; its last output is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks: they would keep the GPUs otherwise."""
    process.terminate()
    try:
        process.wait(40)  # torchrun gives its ranks 30 s
    finally:
        process.kill()
