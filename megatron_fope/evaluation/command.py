"""``megatron-fope evaluate-perplexity``: the command that starts the evaluation processes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_fope import __version__
from megatron_fope.checkpoint import CheckpointInfo, read_checkpoint
from megatron_fope.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Perplexity of one or more Megatron checkpoints (RoPE or FoPE) over context lengths: the same tokens "
        "are cut into windows of each length. The model, its precision and its TP and PP sizes come from the "
        "checkpoint."
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="[NAME=]FOLDER",
        help="folder made by Megatron's --save; may be repeated. NAME labels it, default: the folder's name",
    )
    parser.add_argument(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="tokens to evaluate on: PREFIX.bin and PREFIX.idx",
    )
    parser.add_argument(
        "--lengths",
        metavar="N,N,...",
        help="context lengths in tokens. Default: 0.5 to 16 times the first checkpoint's train length",
    )
    parser.add_argument("--tokens", type=int, default=65536, metavar="N", help="tokens evaluated per length")
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=4096,
        metavar="N",
        help="tokens in one forward pass, at least a window",
    )
    parser.add_argument("--output", metavar="FILE.json", help="write the results here")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the results here (needs matplotlib)")
    parser.add_argument("--title", default="Perplexity by context length", help="title of the picture")
    parser.add_argument("--cpu", action="store_true", help="evaluate on the CPU with gloo")
    parser.add_argument(
        "megatron",
        nargs="*",
        metavar="-- MEGATRON FLAGS",
        help="further flags for Megatron behind --, e.g. --transformer-impl local",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write what was asked for.

    Raises:
        UserError: bad input, found before any process starts; or an evaluation failed.
    """
    labels = [_label(text)[0] for text in arguments.checkpoint]
    if len(set(labels)) < len(labels):
        raise UserError(
            f"--checkpoint has the labels {', '.join(labels)}; allowed: different ones, NAME=FOLDER"
        )
    results = evaluate_perplexity(
        dict(map(_label, arguments.checkpoint)),
        arguments.data_path,
        lengths=None if arguments.lengths is None else _lengths(arguments.lengths),
        num_tokens=arguments.tokens,
        tokens_per_batch=arguments.tokens_per_batch,
        cpu=arguments.cpu,
        megatron_flags=arguments.megatron,
        output=arguments.output,
        picture=arguments.picture,
        title=arguments.title,
    )
    print(table(results))
    return 0


def evaluate_perplexity(
    checkpoints: dict[str, str | Path],
    data_path: str | Path,
    *,
    lengths: list[int] | None = None,
    num_tokens: int = 65536,
    tokens_per_batch: int = 4096,
    cpu: bool = False,
    megatron_flags: list[str] | None = None,
    output: str | Path | None = None,
    picture: str | Path | None = None,
    title: str = "Perplexity by context length",
) -> dict[str, Any]:
    """Perplexity of checkpoints over context lengths; each runs in processes of its own.

    Args:
        checkpoints: ``{label: folder}``.
        data_path: prefix of a ``.bin``/``.idx`` pair.
        lengths: context lengths in tokens; None: 0.5 to 16 times the first checkpoint's train length.
        num_tokens: tokens evaluated per length, the same for all lengths.
        tokens_per_batch: tokens in one forward pass.
        cpu: run on the CPU with gloo.
        megatron_flags: further flags for Megatron.
        output: JSON file to write.
        picture: PNG file to draw.
        title: the picture's title.

    Returns:
        ``{"data_path", "tokens", "version", "checkpoints": {label: {"folder", "iteration",
        "position_embedding_type", "train_length", "results": [{"length", "tokens", "loss",
        "perplexity"}]}}}``; loss is in nats per token.

    Raises:
        UserError: bad input, or an evaluation failed.
    """
    if lengths is not None and (not lengths or min(lengths) < 2):
        raise UserError(f"--lengths is {lengths}; allowed: whole numbers >= 2, separated by commas")
    for suffix in (".bin", ".idx"):
        if not Path(f"{data_path}{suffix}").is_file():
            raise UserError(f"--data-path is {str(data_path)!r}: {data_path}{suffix} does not exist")
    if picture is not None:
        from megatron_fope.evaluation import plot

        plot.require_matplotlib()
    infos = {label: read_checkpoint(folder) for label, folder in checkpoints.items()}
    if lengths is None:
        trained = next(iter(infos.values())).train_length
        lengths = [trained // 2, *(trained * factor for factor in (1, 2, 4, 8, 16))]
    if num_tokens < max(lengths):
        raise UserError(f"--tokens is {num_tokens}; allowed: at least the longest length, {max(lengths)}")
    report: dict[str, Any] = {
        "data_path": str(data_path),
        "tokens": num_tokens,
        "version": __version__,
        "checkpoints": {},
    }
    for label, info in infos.items():
        request = {
            "checkpoint": str(info.folder),
            "data_path": str(data_path),
            "lengths": lengths,
            "num_tokens": num_tokens,
            "tokens_per_batch": tokens_per_batch,
            "cpu": cpu,
            "megatron_flags": [*_megatron_flags(info, cpu), *(megatron_flags or [])],
        }
        logger.info("evaluating %s at %s tokens", info.folder, ", ".join(map(str, lengths)))
        report["checkpoints"][label] = {
            "folder": str(info.folder),
            "iteration": info.iteration,
            "position_embedding_type": info.position_embedding_type,
            "train_length": info.train_length,
            "results": _launch(request, info),
        }
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(report, indent=2) + "\n")
    if picture is not None:
        plot.draw(report, picture, title)
    return report


def table(report: dict[str, Any]) -> str:
    """The results as an aligned text table, one row per length."""
    checkpoints = report["checkpoints"]
    width = max(10, *(len(label) + 2 for label in checkpoints))
    lines = ["length".rjust(8) + "".join(label.rjust(width) for label in checkpoints)]
    for i, row in enumerate(next(iter(checkpoints.values()))["results"]):
        values = (f"{c['results'][i]['perplexity']:.2f}".rjust(width) for c in checkpoints.values())
        lines.append(str(row["length"]).rjust(8) + "".join(values))
    return "\n".join(lines)


def _megatron_flags(info: CheckpointInfo, cpu: bool) -> list[str]:
    """How to run a checkpoint's model; what the model is, the worker takes from the checkpoint itself."""
    stored = info.args
    flags = ["--load", str(info.folder), "--no-load-optim", "--no-load-rng", "--micro-batch-size", "1"]
    flags += ["--tensor-model-parallel-size", str(stored.tensor_model_parallel_size)]
    flags += ["--pipeline-model-parallel-size", str(stored.pipeline_model_parallel_size)]
    flags += ["--exit-on-missing-checkpoint", "--ckpt-format", stored.ckpt_format]
    if getattr(stored, "sequence_parallel", False):
        flags.append("--sequence-parallel")
    if stored.transformer_impl == "local" or cpu:
        flags += ["--transformer-impl", "local"]
    return flags


def _launch(request: dict[str, Any], info: CheckpointInfo) -> list[dict[str, Any]]:
    """Run the worker with as many processes as the checkpoint's tensor and pipeline parallelism need."""
    num_ranks = info.args.tensor_model_parallel_size * info.args.pipeline_model_parallel_size
    with tempfile.TemporaryDirectory() as folder:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.json"
        request_file.write_text(json.dumps(request))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_ranks)),
            *("-m", "megatron_fope.evaluation.worker", str(request_file), str(result_file)),
        ]
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not result_file.is_file():
            own = [line for line in done.stderr.splitlines() if line.startswith("megatron-fope: error: ")]
            if own:
                raise UserError(own[0].removeprefix("megatron-fope: error: "))
            sys.stderr.write(done.stdout[-2000:] + done.stderr[-6000:])
            raise UserError(f"the evaluation of {info.folder} failed; its last output is above")
        return json.loads(result_file.read_text())


def _label(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    return (name, folder) if separator else (Path(text).name, text)


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--lengths is {text!r}; allowed: whole numbers >= 2, separated by commas") from None
