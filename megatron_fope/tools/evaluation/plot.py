"""Pictures of evaluations: perplexity over length and position, heat maps of retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fope.common.errors import UserError

if TYPE_CHECKING:
    from megatron_fope.tools.evaluation.perplexity_command import PerplexityReport
    from megatron_fope.tools.evaluation.retrieval_command import RetrievalReport

# Two hues that stay apart for colour-blind readers and in greyscale; further checkpoints continue the list.
_STYLES = {"color": ["#c44e52", "#2a6f97", "#6a994e", "#8d6a9f", "#b08900"], "marker": list("os^Dv")}


def require_matplotlib() -> None:
    """Fail early and clearly where there is nothing to draw with.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--picture needs matplotlib; pip install 'megatron-fope[demo]'") from None


def draw(report: PerplexityReport, path: str | Path, title: str) -> None:
    """Draw perplexity over context length, one line per checkpoint; beside it by position, if measured.

    Positions are those in the longest window.

    Args:
        report: what :func:`megatron_fope.tools.evaluation.perplexity_command.evaluate_perplexity` returns.
        path: PNG file to write.
        title: heading.
    """
    results = {label: checkpoint["results"] for label, checkpoint in report["checkpoints"].items()}
    longest = {label: max(rows, key=lambda row: row["length"]) for label, rows in results.items()}
    trained = {checkpoint["train_length"] for checkpoint in report["checkpoints"].values()}
    lengths = [row["length"] for row in next(iter(results.values()))]
    by_position = all("by_position" in row for row in longest.values())
    figure, grid = _figure(2 if by_position else 1, (14 if by_position else 7, 4.2))
    _draw_lines(
        grid[0],
        {label: [(row["length"], row["perplexity"]) for row in rows] for label, rows in results.items()},
        trained,
        title,
    )
    grid[0].set_xscale("log", base=2)
    grid[0].set_xticks(lengths, [str(length) for length in lengths])
    grid[0].set_xlabel("context length (tokens)")
    if by_position:
        _draw_lines(
            grid[1],
            {
                label: [((p["start"] + p["stop"] - 1) / 2, p["perplexity"]) for p in row["by_position"]]
                for label, row in longest.items()
            },
            trained,
            f"By position, in windows of {max(lengths)} tokens",
        )
        grid[1].set_xlabel("position in the window (tokens)")
    _save(figure, path)


def _draw_lines(
    axes: Any, lines: dict[str, list[tuple[float, float]]], trained: set[int], title: str
) -> None:
    axes.set_prop_cycle(**_STYLES)
    for label, points in lines.items():
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=2, label=label)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{points[-1][1]:.1f}", points[-1], color=line.get_color(), **beside)
    for length in trained:
        axes.axvline(length, color="0.6", linestyle="--", linewidth=1)
        below = {"xycoords": ("data", "axes fraction"), "xytext": (4, -10), "textcoords": "offset points"}
        axes.annotate("trained here", (length, 1), fontsize=8, color="0.4", **below)
    axes.set_title(title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_ylabel("perplexity (log scale)")
    axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_heat_maps(report: RetrievalReport, path: str | Path, title: str) -> None:
    """Draw accuracy over length and depth, one heat map per checkpoint.

    Args:
        report: what :func:`megatron_fope.tools.evaluation.retrieval_command.evaluate_retrieval` returns.
        path: PNG file to write.
        title: heading.
    """
    checkpoints = report["checkpoints"]
    rows = next(iter(checkpoints.values()))["results"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = sorted({row["depth"] for row in rows})
    width = 1.4 + (0.8 + 0.6 * len(lengths)) * len(checkpoints)
    figure, grid = _figure(len(checkpoints), (width, 1.6 + 0.5 * len(depths)), sharey=True)
    for axes, (label, checkpoint) in zip(grid, checkpoints.items(), strict=True):
        by_place = {(row["length"], row["depth"]): 100 * row["accuracy"] for row in checkpoint["results"]}
        values = [[by_place[length, depth] for length in lengths] for depth in depths]
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                color = "white" if value < 60 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
        axes.set_xlabel("prompt length (tokens)")
        axes.set_title(f"{label} (trained at {checkpoint['train_length']})", fontsize=9)
    grid[0].set_ylabel("depth of the answer")
    figure.colorbar(image, ax=list(grid), label="answers found (%)")
    figure.suptitle(title)
    _save(figure, path)


def _figure(panels: int, inches: tuple[float, float], **how: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **how)[0]


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
