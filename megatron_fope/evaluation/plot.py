"""The picture of perplexity over context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fope.errors import UserError

# Two hues that stay apart for colour-blind readers and in greyscale; further checkpoints continue the list.
_COLORS = ("#c44e52", "#2a6f97", "#6a994e", "#8d6a9f", "#b08900")
_MARKERS = ("o", "s", "^", "D", "v")


def require_matplotlib() -> None:
    """Fail early and clearly where there is nothing to draw with.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--picture needs matplotlib; pip install 'megatron-fope[demo]'") from None


def draw(report: dict[str, Any], path: str | Path, title: str) -> None:
    """Draw perplexity over context length, one line per checkpoint.

    Args:
        report: what :func:`megatron_fope.evaluation.command.evaluate_perplexity` returns.
        path: PNG file to write.
        title: heading.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    trained = set()
    for i, (label, checkpoint) in enumerate(report["checkpoints"].items()):
        lengths = [row["length"] for row in checkpoint["results"]]
        values = [row["perplexity"] for row in checkpoint["results"]]
        color = _COLORS[i % len(_COLORS)]
        axes.plot(lengths, values, marker=_MARKERS[i % len(_MARKERS)], color=color, linewidth=2, label=label)
        axes.annotate(
            f"{values[-1]:.1f}",
            (lengths[-1], values[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )
        trained.add(checkpoint["train_length"])
    for length in trained:
        axes.axvline(length, color="0.6", linestyle="--", linewidth=1)
        axes.annotate(
            "trained here",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title(title)
    axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
