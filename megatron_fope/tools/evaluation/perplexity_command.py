"""``megatron-fope evaluate-perplexity``: perplexity of checkpoints over context lengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_fope.common.command_line import whole
from megatron_fope.common.errors import UserError
from megatron_fope.tools.evaluation import launching, plot
from megatron_fope.tools.evaluation.options import EvaluationOptions, add_flags, listed, option, options_from
from megatron_fope.tools.evaluation.perplexity import PerplexityRow, perplexity_by_length
from megatron_fope.tools.evaluation.tokens import check_data, check_vocabulary, read_tokens

_LENGTHS = "whole numbers >= 2, separated by commas"


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(EvaluationOptions):
    """Options of :func:`evaluate_perplexity`, described by their flags' help.

    Raises:
        UserError: lengths that nothing can be predicted in.
    """

    lengths: Sequence[int] | None = option(
        "context lengths in tokens. Default: 0.5 to 16 times the first checkpoint's train length",
        None,
        type=listed(int, _LENGTHS),
        metavar="N,N,...",
    )
    tokens: int = option("tokens evaluated per length (default: 65536)", 65536, type=whole(), metavar="N")
    by_position: int | None = option(
        "also perplexity by position: the window is divided into this many equal ranges",
        None,
        type=whole(),
        metavar="BUCKETS",
    )

    def __post_init__(self) -> None:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise UserError(f"--lengths is {list(self.lengths)}; allowed: {_LENGTHS}")


class PerplexityReport(launching.Report[PerplexityRow]):
    """What :func:`evaluate_perplexity` returns."""

    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Perplexity of one or more Megatron checkpoints (RoPE or FoPE) over context lengths: the same tokens "
        "are cut into windows of each length. The model and its precision come from the checkpoint."
    )
    add_flags(parser, PerplexityOptions)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write what was asked for.

    Raises:
        UserError: bad input, found before any process starts; or an evaluation failed.
    """
    report = evaluate_perplexity(options_from(PerplexityOptions, arguments), on_result=_print_row)
    print(f"\n{table(report)}")
    if arguments.by_position:
        print(f"\n{position_table(report)}")
    return 0


def evaluate_perplexity(
    options: PerplexityOptions, on_result: Callable[[PerplexityReport, str], None] | None = None
) -> PerplexityReport:
    """Perplexity of checkpoints over context lengths, in processes of their own.

    Args:
        options: what to evaluate, and where to write the results.
        on_result: called when a checkpoint is done, with the report so far and the checkpoint's label.

    Raises:
        UserError: bad input, or an evaluation failed.
    """
    check_data(options.data_path)
    if options.picture is not None:
        plot.require_matplotlib()
    infos = launching.read_checkpoints(options)
    trained = next(iter(infos.values())).train_length
    lengths = list(options.lengths or (trained // 2, *(trained * factor for factor in (1, 2, 4, 8, 16))))
    if options.tokens < max(lengths):
        raise UserError(f"--tokens is {options.tokens}; allowed: at least the longest length, {max(lengths)}")
    if options.by_position is not None and not 1 <= options.by_position <= min(lengths):
        raise UserError(
            f"--by-position is {options.by_position}; allowed: 1 to the shortest length, {min(lengths)}"
        )
    options.check_outputs(options.data_path)
    tokens = read_tokens(options.data_path, options.tokens + 1)
    if len(tokens) <= max(lengths):
        raise UserError(
            f"--data-path is {str(options.data_path)!r}: it holds {len(tokens)} tokens; allowed: more "
            f"than the longest length, {max(lengths)}"
        )
    check_vocabulary(options.data_path, tokens, infos.values())
    evaluation = launching.Evaluation(
        measure=partial(
            perplexity_by_length,
            data_path=str(options.data_path),
            tokens=options.tokens,
            lengths=lengths,
            tokens_per_batch=options.tokens_per_batch,
            buckets=options.by_position,
        ),
        settings={"data_path": str(options.data_path), "tokens": options.tokens},
        lengths=lengths,
        tokens=len(lengths) * (len(tokens) - 1),
        columns={"data_path": str(options.data_path)},
        csv_rows=_csv_rows,
        draw=partial(plot.draw, title=options.title or "Perplexity by context length"),
    )
    return launching.evaluate_all(evaluation, options, infos, on_result)


def _print_row(report: PerplexityReport, label: str) -> None:
    """A checkpoint's numbers as soon as they are there: what comes later may fail."""
    results = report["checkpoints"][label]["results"]
    numbers = ", ".join(f"{row['perplexity']:.2f} at {row['length']}" for row in results)
    print(f"{label}: perplexity {numbers} tokens", flush=True)


def table(report: PerplexityReport) -> str:
    """The results as an aligned text table, one row per length."""
    results = {label: checkpoint["results"] for label, checkpoint in report["checkpoints"].items()}
    return _table("length", [str(row["length"]) for row in next(iter(results.values()))], results)


def position_table(report: PerplexityReport) -> str:
    """Perplexity by position in the longest window as an aligned text table, one row per range."""
    results = {
        label: max(checkpoint["results"], key=lambda row: row["length"])["by_position"]
        for label, checkpoint in report["checkpoints"].items()
    }
    rows = [f"{row['start']}-{row['stop'] - 1}" for row in next(iter(results.values()))]
    return _table("position", rows, results)


def _table(head: str, names: list[str], results: dict[str, list[Any]]) -> str:
    rows = zip(names, *results.values(), strict=True)
    cells = [[head, *results], *([name, *(f"{one['perplexity']:.2f}" for one in row)] for name, *row in rows)]
    return launching.aligned(
        cells, first=max(8, *map(len, names)), others=max(10, *(len(label) + 2 for label in results))
    )


def _csv_rows(row: PerplexityRow) -> list[dict[str, Any]]:
    numbers = {"tokens": row["tokens"], "loss": row["loss"], "perplexity": row["perplexity"]}
    window = {"length": row["length"], "start": 0, "stop": row["length"], **numbers}
    return [window, *({"length": row["length"], **part} for part in row.get("by_position", ()))]
