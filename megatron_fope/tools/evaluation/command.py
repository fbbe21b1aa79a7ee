"""``megatron-fope evaluate-perplexity``: the command that starts the evaluation processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fope.common.command_line import whole
from megatron_fope.common.errors import UserError
from megatron_fope.tools.evaluation import launching
from megatron_fope.tools.evaluation.launching import Layout
from megatron_fope.tools.evaluation.tokens import DATA_FILES, check_data, check_vocabulary, read_tokens

_LENGTHS = "whole numbers >= 2, separated by commas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Perplexity of one or more Megatron checkpoints (RoPE or FoPE) over context lengths: the same tokens "
        "are cut into windows of each length. The model and its precision come from the checkpoint."
    )
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="tokens to evaluate on: PREFIX.bin and PREFIX.idx",
    )
    add(
        "--lengths",
        metavar="N,N,...",
        help="context lengths in tokens. Default: 0.5 to 16 times the first checkpoint's train length",
    )
    add(
        "--tokens",
        type=whole(),
        default=65536,
        metavar="N",
        help="tokens evaluated per length (default: 65536)",
    )
    add(
        "--by-position",
        type=whole(),
        metavar="BUCKETS",
        help="also perplexity by position: the window is divided into this many equal ranges",
    )
    launching.add_arguments(parser, title="Perplexity by context length")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write what was asked for.

    Raises:
        UserError: bad input, found before any process starts; or an evaluation failed.
    """
    options = launching.common_options(arguments)
    lengths = arguments.lengths
    results = evaluate_perplexity(
        options.pop("checkpoints"),
        arguments.data_path,
        lengths=None if lengths is None else launching.parse_list("--lengths", lengths, int, _LENGTHS),
        num_tokens=arguments.tokens,
        by_position=arguments.by_position,
        on_result=_print_row,
        **options,
    )
    print(f"\n{table(results)}")
    if arguments.by_position:
        print(f"\n{position_table(results)}")
    return 0


def evaluate_perplexity(
    checkpoints: dict[str, str | Path],
    data_path: str | Path,
    *,
    lengths: list[int] | None = None,
    num_tokens: int = 65536,
    by_position: int | None = None,
    tokens_per_batch: int = 4096,
    layout: Layout | None = None,
    cpu: bool = False,
    megatron_flags: list[str] | None = None,
    output: str | Path | None = None,
    csv_file: str | Path | None = None,
    picture: str | Path | None = None,
    title: str = "Perplexity by context length",
    on_result: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of checkpoints over context lengths; each runs in processes of its own.

    Args:
        checkpoints: ``{label: folder}``.
        data_path: prefix of a ``.bin``/``.idx`` pair.
        lengths: context lengths in tokens; None: 0.5 to 16 times the first checkpoint's train length.
        num_tokens: tokens evaluated per length, the same for all lengths.
        by_position: also report the loss in this many equal ranges of positions in the window.
        tokens_per_batch: tokens in one forward pass.
        layout: parallel sizes; None: the checkpoint's TP and PP.
        cpu: run on the CPU with gloo.
        megatron_flags: further flags for Megatron.
        output: JSON file to write, after every checkpoint with those that are done.
        csv_file: CSV file to write, likewise: a row per checkpoint, length and range of positions.
        picture: PNG file to draw.
        title: the picture's title.
        on_result: called when a checkpoint is done, with the report so far and the checkpoint's label.

    Returns:
        ``{"data_path", "tokens", "version", "checkpoints": {label: {"folder", "iteration",
        "position_embedding_type", "train_length", "results": [{"length", "tokens", "loss",
        "perplexity"}]}}}``; loss is in nats per token. With ``by_position``, every result also has
        ``"by_position": [{"start", "stop", "tokens", "loss", "perplexity"}]``.

    Raises:
        UserError: bad input, or an evaluation failed.
    """
    if lengths is not None and (not lengths or min(lengths) < 2):
        raise UserError(f"--lengths is {lengths}; allowed: {_LENGTHS}")
    check_data(data_path)
    if picture is not None:
        from megatron_fope.tools.evaluation import plot

        plot.require_matplotlib()
    infos = launching.read_checkpoints(checkpoints)
    if lengths is None:
        trained = next(iter(infos.values())).train_length
        lengths = [trained // 2, *(trained * factor for factor in (1, 2, 4, 8, 16))]
    if num_tokens < max(lengths):
        raise UserError(f"--tokens is {num_tokens}; allowed: at least the longest length, {max(lengths)}")
    if by_position is not None and not 1 <= by_position <= min(lengths):
        raise UserError(f"--by-position is {by_position}; allowed: 1 to the shortest length, {min(lengths)}")
    outputs = {"--output": output, "--csv": csv_file, "--picture": picture}
    launching.check_outputs(outputs, [*(f"{data_path}.{end}" for end in DATA_FILES), *checkpoints.values()])
    tokens = read_tokens(data_path, num_tokens + 1)
    if len(tokens) <= max(lengths):
        raise UserError(
            f"--data-path is {str(data_path)!r}: it holds {len(tokens)} tokens; allowed: more than the "
            f"longest length, {max(lengths)}"
        )
    check_vocabulary(data_path, tokens, infos.values())

    def finished(report: dict[str, Any], label: str) -> None:
        if on_result is not None:
            on_result(report, label)
        if output is not None:
            launching.write_json(report, output)
        if csv_file is not None:
            launching.write_csv(_csv_rows(report), csv_file)

    request = {
        "kind": "perplexity",
        "data_path": str(data_path),
        "lengths": lengths,
        "num_tokens": num_tokens,
        "by_position": by_position,
        "tokens_per_batch": tokens_per_batch,
    }
    report = launching.evaluate_all(
        request,
        {"data_path": str(data_path), "tokens": num_tokens},
        infos,
        layout or Layout(),
        cpu,
        megatron_flags or [],
        tokens=len(lengths) * (len(tokens) - 1),
        finished=finished,
    )
    if picture is not None:
        plot.draw(report, picture, title)
    return report


def _print_row(report: dict[str, Any], label: str) -> None:
    """A checkpoint's numbers as soon as they are there: what comes later may fail."""
    results = report["checkpoints"][label]["results"]
    numbers = ", ".join(f"{row['perplexity']:.2f} at {row['length']}" for row in results)
    print(f"{label}: perplexity {numbers} tokens", flush=True)


def table(report: dict[str, Any]) -> str:
    """The results as an aligned text table, one row per length."""
    results = {label: checkpoint["results"] for label, checkpoint in report["checkpoints"].items()}
    return _table("length", [str(row["length"]) for row in next(iter(results.values()))], results)


def position_table(report: dict[str, Any]) -> str:
    """Perplexity by position in the longest window as an aligned text table, one row per range."""
    results = {
        label: max(checkpoint["results"], key=lambda row: row["length"])["by_position"]
        for label, checkpoint in report["checkpoints"].items()
    }
    rows = [f"{row['start']}-{row['stop'] - 1}" for row in next(iter(results.values()))]
    return _table("position", rows, results)


def _table(head: str, rows: list[str], results: dict[str, list[dict[str, Any]]]) -> str:
    first = max(8, *map(len, rows))
    width = max(10, *(len(label) + 2 for label in results))
    lines = [head.rjust(first) + "".join(label.rjust(width) for label in results)]
    for i, row in enumerate(rows):
        values = (f"{result[i]['perplexity']:.2f}".rjust(width) for result in results.values())
        lines.append(row.rjust(first) + "".join(values))
    return "\n".join(lines)


def _csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for label, checkpoint in report["checkpoints"].items():
        about = launching.identity(label, checkpoint) | {"data_path": report["data_path"]}
        for result in checkpoint["results"]:
            numbers = {key: result[key] for key in ("tokens", "loss", "perplexity")}
            whole = {"length": result["length"], "start": 0, "stop": result["length"]}
            rows.append(about | whole | numbers)
            rows += [about | {"length": result["length"]} | part for part in result.get("by_position", ())]
    return rows
