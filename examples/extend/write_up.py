"""Table and pictures of ``make extend`` from its report: ``python examples/extend/write_up.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

_GROUPS = {
    "from the RoPE model": ("rope", "yarn", "immediate", "function-preserving", "clip-only"),
    "from the FoPE model": ("aligned", "upstream", "upstream-zeros", "not-grown"),
}
_COLORS = ("#c44e52", "#2a6f97", "#6a994e", "#8d6a9f", "#b08900")
_MARKERS = ("o", "s", "^", "D", "v")
_LAST = 20
"""Iterations that the last loss is the mean of."""


def write(report: dict[str, Any], out: Path) -> str:
    """Write ``results.md`` and the pictures.

    Args:
        report: what ``run.py`` collected.
        out: folder of the files.

    Returns:
        The table.
    """
    lengths = [int(length) for length in report["models"][0]["perplexity"]]
    text = "\n".join(
        [
            f"`{report['command']}`: {report['machine']} ({report['jobs']} runs at a time), torch "
            f"{report['torch']}, Megatron-Core {report['megatron']}, commit {report['commit']}, "
            f"{report['date']}, {report['minutes']} minutes. Trained on "
            f"{report['tokens']['first'] / 1e6:.1f} million tokens at {report['train_length']}, continued on "
            f"{report['tokens']['continued'] / 1e6:.1f} million at {report['continued_length']}. Mean of "
            f"{len(report['seeds'])} seeds, ± half the distance of the extremes.",
            "",
            "Loss in training, and perplexity per byte on held-out source by context length:",
            "",
            *_table(report, ["first loss", "last loss", *map(str, lengths)], _loss_and_perplexity(lengths)),
            "",
            f"Recall, % of {report['prompts']} answers found by context length (the mean of five depths):",
            "",
            *_table(report, [str(length) for length in lengths], _recall(lengths)),
            "",
        ]
    )
    (out / "results.md").write_text(text)
    _draw(report, lengths, out)
    return text


def _table(report: dict[str, Any], columns: list[str], cells: Any) -> list[str]:
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, label in report["labels"].items():
        models = [model for model in report["models"] if model["name"] == name]
        row = [_spread(values) for values in zip(*(cells(model) for model in models), strict=True)]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return lines


def _spread(values: tuple[float, ...]) -> str:
    half = (max(values) - min(values)) / 2
    digits = 1 if mean(values) >= 20 else 2
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _loss_and_perplexity(lengths: list[int]) -> Any:
    return lambda model: [
        model["loss"][0],
        mean(model["loss"][-_LAST:]),
        *(model["perplexity"][str(length)] for length in lengths),
    ]


def _recall(lengths: list[int]) -> Any:
    return lambda model: [accuracy(model, length) for length in lengths]


def accuracy(model: dict[str, Any], length: int) -> float:
    """Percent of the answers found at a length, over all depths."""
    return 100 * mean(row["accuracy"] for row in model["recall"] if row["length"] == length)


def _draw(report: dict[str, Any], lengths: list[int], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quantities = {
        "perplexity": ("perplexity per byte", lambda m: [m["perplexity"][str(n)] for n in lengths]),
        "recall": ("answers found, %", lambda m: [accuracy(m, n) for n in lengths]),
        "loss": ("training loss, mean of 10 iterations", _smoothed),
    }
    for quantity, (label, values) in quantities.items():
        groups = {title: names for title, names in _GROUPS.items() if names[0] in report["labels"]}
        size = {"figsize": (6 * len(groups), 4.2), "dpi": 120, "layout": "constrained"}
        figure, grid = pyplot.subplots(1, len(groups), sharey=True, squeeze=False, **size)
        panels = grid[0]
        for axes, (title, names) in zip(panels, groups.items(), strict=True):
            for name, color, marker in zip(names, _COLORS, _MARKERS, strict=False):
                ys = [
                    mean(v)
                    for v in zip(*(values(m) for m in report["models"] if m["name"] == name), strict=True)
                ]
                xs = lengths if quantity != "loss" else [10 * i + 5 for i in range(len(ys))]
                style = {"marker": marker} if quantity != "loss" else {}
                axes.plot(xs, ys, color=color, label=report["labels"][name], linewidth=1.8, **style)
            if quantity == "loss":
                axes.set_xlabel("iteration of the continuation")
            else:
                axes.set_xscale("log", base=2)
                axes.set_xticks(lengths, [str(n) for n in lengths])
                axes.set_xlabel("context length (tokens)")
                axes.axvline(report["continued_length"], color="0.6", linestyle="--", linewidth=1)
            if quantity == "perplexity":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            axes.set_title(f"Continued {title}")
            axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        panels[0].set_ylabel(label)
        figure.savefig(out / f"{quantity}.png")
        pyplot.close(figure)


def _smoothed(model: dict[str, Any]) -> list[float]:
    losses = model["loss"]
    return [mean(losses[i : i + 10]) for i in range(0, len(losses) - 9, 10)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(write(json.loads((folder / "report.json").read_text()), folder))
