"""Tables and picture of ``make real-model``: ``python examples/real_model/tables.py FOLDER``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_MOMENTS = {"before": "before", "half": "half-way", "after": "after"}


def write(report: dict[str, Any], out: Path) -> str:
    """Write ``results.md`` and ``real_model.png``.

    Args:
        report: what ``run.py`` collected.
        out: folder of the files.

    Returns:
        The tables.
    """
    settings, compared = report["settings"], report["compared"]
    lines = [
        f"`{report['command']}`: {report['machine']}, torch {report['torch']}, Megatron-Core "
        f"{report['megatron']}, commit {report['commit']}, {report['date']}, "
        f"{sum(report['seconds'].values()) / 60:.0f} minutes. {report['model']}. Trained "
        f"with {settings['iterations']} iterations of one window of "
        f"{settings['window']} tokens; {settings['tokens']} held-out tokens of Python source per length.",
        "",
        f"Perplexity in windows of {compared['window']}: Megatron {compared['megatron']:.6f}, transformers "
        f"{compared['transformers']:.6f}.",
    ]
    for moment, name in _MOMENTS.items():
        rows = report[moment]["perplexity"]
        lines += ["", f"Perplexity {name}, by length:", ""]
        lines += _table(report, rows, lambda row: row["length"], lambda row: row["perplexity"])
        parts = {way: _by_position(found, settings["window"]) for way, found in rows.items()}
        lines += ["", f"Loss {name}, by position in windows of {settings['window']}:", ""]
        lines += _table(
            report, parts, lambda row: f"{row['start']}-{row['stop'] - 1}", lambda row: row["loss"]
        )
        needles = report[moment]["needles"]
        lines += [
            "",
            f"Needles found {name}, % of {settings['samples']}, by depth in {settings['window']} tokens:",
            "",
        ]
        lines += _table(report, needles, lambda row: row["depth"], lambda row: 100 * row["accuracy"])
    lines += ["", "Loss of training:", ""]
    lines += [
        f"- {report['labels'][name]}: {values[0]:.3f} -> {values[-1]:.3f}"
        for name, values in report["losses"].items()
    ]
    if report["written"]:
        lines += [
            "",
            f"`{report['labels'][report['written']['way']]}` in transformers, behind "
            f"`{report['written']['prompt']!r}`: `{report['written']['text']!r}`",
        ]
    text = "\n".join([*lines, ""])
    (out / "results.md").write_text(text)
    _draw(report, out / "real_model.png")
    return text


def _by_position(rows: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    fitting = [row for row in rows if row["length"] == window] or rows[-1:]
    return fitting[0]["by_position"]


def _table(
    report: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    head: Callable[[dict[str, Any]], Any],
    cell: Callable[[dict[str, Any]], float],
) -> list[str]:
    columns = [head(row) for row in next(iter(rows.values()))]
    lines = [f"| | {' | '.join(map(str, columns))} |", "| --- |" + " ---: |" * len(columns)]
    for name, found in rows.items():
        lines.append(f"| {report['labels'][name]} | {_cells(map(cell, found))} |")
    return lines


def _cells(values: Iterable[float]) -> str:
    return " | ".join(f"{value:.2f}" if math.isfinite(value) else "-" for value in values)


def _draw(report: dict[str, Any], file: Path) -> None:
    """Loss by position before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, moment in zip(axes, ("before", "after"), strict=True):
        for name, rows in report[moment]["perplexity"].items():
            parts = _by_position(rows, report["settings"]["window"])
            middles = [(part["start"] + part["stop"]) / 2 for part in parts]
            axis.plot(middles, [part["loss"] for part in parts], marker="o", label=report["labels"][name])
        axis.set_title(f"{moment} {report['settings']['iterations']} iterations")
        axis.set_xlabel("position in the window")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per token")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(write(json.loads((folder / "report.json").read_text()), folder))
