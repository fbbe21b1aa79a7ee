"""Measurements in CSV files, keyed by configuration, machine kind, versions and commit."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import megatron_fope
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import write_text

FACTS = ("machine", "torch", "triton", "megatron", "commit", "date")
"""Where, with what and when: the last columns of every file."""

ROTARY_MEASURED = ("ms50", "ms20", "ms80", "gbps", "pct_copy", "peak_mb", "host_us")
ROTARY_COLUMNS = ("op", "provider", "mode", "shape", "dtype", "profile", *ROTARY_MEASURED, *FACTS)
"""Times in milliseconds (median, 20 % and 80 % quantile); ``gbps``: least possible traffic / median, 1e9
bytes per second; ``pct_copy``: the same as a percentage of the copy's in the same run; ``peak_mb``: 2^20
bytes held at once by the call, its result included; ``host_us``: microseconds until the call returns, on a
CPU of a call with one token."""

Row = dict[str, str]


def facts(device: torch.device) -> Row:
    """The columns of :data:`FACTS` for measurements made here and now."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        machine = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "megatron": _version("megatron-core"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit; ``-dirty`` when the package differs from it; a release's version otherwise."""
    package = Path(megatron_fope.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=9", "HEAD")
    if head is None or not git("ls-files", "__init__.py"):
        return f"v{megatron_fope.__version__}"
    # Only the package: results written into the checkout do not make it another program.
    return head + ("-dirty" if git("status", "--porcelain", "--", ".") else "")


def update(path: Path, columns: tuple[str, ...], measured: tuple[str, ...], rows: list[Row]) -> None:
    """Add rows to a CSV file; a row with the same key takes the place of the old one.

    Args:
        path: file to create or change.
        columns: its header.
        measured: columns that are results. All others but the date are the key.
        rows: complete rows.

    Raises:
        UserError: the file has other columns.
    """
    key_columns = [name for name in columns if name not in (*measured, "date")]
    merged = {tuple(row[name] for name in key_columns): row for row in read(path, columns)}
    merged |= {tuple(row[name] for name in key_columns): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    write_text(path, text.getvalue())


def read(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """All rows of a CSV file; none when it does not exist.

    Raises:
        UserError: the file has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise UserError(
                f"--out holds {path} with other columns than this version writes; move it away or give "
                "another folder"
            )
        return list(reader)


def newest(rows: list[Row], measured: tuple[str, ...]) -> list[Row]:
    """Of rows that differ in versions, commit and results only, the one that was written last."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        ignored = (*measured, *FACTS[1:])
        key = tuple(value for name, value in row.items() if name not in ignored)
        if key not in latest or row["date"] >= latest[key]["date"]:
            latest[key] = row
    return list(latest.values())


def number(value: float | None) -> str:
    """Four significant digits; empty for what was not measured."""
    return "" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def compact(values: dict[str, Any]) -> str:
    """A dictionary as one CSV field."""
    return json.dumps(values, separators=(",", ":"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
