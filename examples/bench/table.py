"""Text tables of measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.providers import OWN
from bench.results import Row

BASELINES = ("megatron-rope", "published", "te-rope", "flash-rope", "copy")
"""What this package's times are divided by."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """An aligned Markdown table.

    Args:
        header: column titles.
        rows: cells.
        left: so many first columns are aligned to the left, the others to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def rotary_table(rows: list[Row]) -> str:
    """All providers of one case: median times in ms with their 20 % to 80 % range, and the rest."""
    header = ["provider"]
    header += ["forward ms", "backward ms", "both ms", "20-80 %", "GB/s", "% of copy", "peak MB", "host us"]
    lines = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        by_mode = {row["mode"]: row for row in rows if row["provider"] == provider}
        both = by_mode["both"]
        lines.append(
            [
                provider,
                *(by_mode[mode]["ms50"] for mode in ("forward", "backward", "both")),
                f"{both['ms20']}-{both['ms80']}",
                *(both[name] or "-" for name in ("gbps", "pct_copy", "peak_mb", "host_us")),
            ]
        )
    return markdown(header, lines)


def ratios(rows: list[Row]) -> str:
    """Forward and backward of this package's providers, divided by what they are compared with."""
    both = [row for row in rows if row["mode"] == "both"]
    times = {(_case(row), row["provider"]): float(row["ms50"]) for row in both}
    present = [b for b in BASELINES if any(provider == b for _, provider in times)]
    lines = [
        [
            case,
            provider,
            *(
                f"{times[case, provider] / times[case, baseline]:.2f}" if (case, baseline) in times else "-"
                for baseline in present
            ),
        ]
        for case, provider in times
        if provider in OWN
    ]
    return markdown(["forward + backward", "provider", *(f"/ {b}" for b in present)], lines, left=2)


def _case(row: Row) -> str:
    return describe_shape(row) + f", {row['dtype']}"


def describe_shape(row: Row) -> str:
    """The shape column in words, without what is the same everywhere."""
    shape = json.loads(row["shape"])
    words = [f"S {shape['s']}", f"{shape['hq']}/{shape['hkv']} heads x {shape['d']}"]
    if shape["b"] != 1:
        words.append(f"batch {shape['b']}")
    if shape["layout"] != "split":
        words.append(shape["layout"])
    if row["profile"] != "paper":
        words.append(row["profile"])
    if shape["learnable"]:
        words.append("learnable")
    return ", ".join(words)
