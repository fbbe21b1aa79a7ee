"""The picture of the rotary benchmark, made from the CSV alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

from bench import results
from bench.providers import OWN, PROVIDERS
from bench.results import Row
from bench.table import describe_shape
from megatron_fope.common.errors import UserError

_COLORS = {"own": "#2a6f97", "fope": "#8fb8d0", "rope": "#c44e52", "copy": "#8c8c8c"}
_LABELS = {"own": "FoPE, this package", "fope": "FoPE, other", "rope": "RoPE", "copy": "copy"}


def draw(csv: Path) -> list[Path]:
    """Draw one picture per machine kind beside the CSV: forward plus backward, in units of a plain copy.

    Args:
        csv: file of ``bench rotary``; of each configuration the newest rows are drawn.

    Returns:
        The files written, ``rotary-<machine>.png``.

    Raises:
        UserError: matplotlib is missing, or the file holds nothing to draw.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib; pip install 'megatron-fope[demo]'") from None
    matplotlib.use("Agg")

    rows = results.newest(results.read(csv, results.ROTARY_COLUMNS), results.ROTARY_MEASURED)
    rows = [row for row in rows if row["mode"] == "both"]
    if not rows:
        raise UserError(f"--out holds no measurements: {csv} is missing or empty; run 'bench rotary' first")
    return [
        _draw_machine([row for row in rows if row["machine"] == machine], machine, csv.parent)
        for machine in dict.fromkeys(row["machine"] for row in rows)
    ]


def _draw_machine(rows: list[Row], machine: str, folder: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((describe_shape(row), row["dtype"]), []).append(row)
    columns = min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 2.9 * lines + 0.6), dpi=110, layout="constrained", squeeze=False
    )
    for axes, ((shape, dtype), measured) in zip(grid.flat, cases.items(), strict=False):
        _draw_case(axes, f"{shape}, {dtype}", measured)
    for axes in list(grid.flat)[len(cases) :]:
        axes.set_visible(False)
    used = [kind for kind in _COLORS if any(_kind(row["provider"]) == kind for row in rows)]
    figure.legend(
        handles=[Patch(color=_COLORS[kind], label=_LABELS[kind]) for kind in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
    )
    figure.suptitle(f"Rotating q and k, forward + backward, in units of a plain copy\n{machine}", fontsize=11)
    path = folder / f"rotary-{slug(machine)}.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _draw_case(axes, title: str, rows: list[Row]) -> None:
    unit = next((float(row["ms50"]) for row in rows if row["provider"] == "copy"), 1.0)
    rows = sorted(rows, key=lambda row: float(row["ms50"]), reverse=True)
    names = [row["provider"] for row in rows]
    middle = [float(row["ms50"]) / unit for row in rows]
    low = [m - float(row["ms20"]) / unit for m, row in zip(middle, rows, strict=True)]
    high = [float(row["ms80"]) / unit - m for m, row in zip(middle, rows, strict=True)]
    colors = [_COLORS[_kind(name)] for name in names]
    axes.barh(names, middle, color=colors, xerr=(low, high), error_kw={"elinewidth": 1, "ecolor": "0.35"})
    for name, value, above in zip(names, middle, high, strict=True):
        axes.annotate(
            f"{value:.1f}", (value + above, name), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_xlim(0, max(m + h for m, h in zip(middle, high, strict=True)) * 1.15)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _kind(provider: str) -> str:
    return "own" if provider in OWN else PROVIDERS[provider].computes if provider in PROVIDERS else "fope"


def slug(machine: str) -> str:
    """A machine's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower().replace("(r)", "")).strip("-")
