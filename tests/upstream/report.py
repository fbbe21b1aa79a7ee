"""The table of outcomes, for the terminal and as the committed markdown report."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from outcomes import FAILED, FAILED_WITH_ROPE_TOO, NOT_EXERCISED, PASSED, SKIPPED, STORED, Outcome

COLUMNS = (PASSED, STORED, NOT_EXERCISED, SKIPPED, FAILED_WITH_ROPE_TOO, FAILED)


@dataclass
class Result:
    """One launch."""

    name: str
    ranks: int
    outcomes: list[Outcome] = field(default_factory=list)
    selected: str = ""
    """Files and pytest's ``-k``."""
    not_launched: str = ""
    """Why the launch did not happen."""


def totals(results: list[Result]) -> Counter[str]:
    """Number of tests per status."""
    return Counter(outcome.status for result in results for outcome in result.outcomes)


def markdown(results: list[Result], files_not_run: dict[str, str], facts: dict[str, str]) -> str:
    """The report.

    Args:
        results: every launch.
        files_not_run: test file to reason.
        facts: lines for the head: what was run, with which versions.
    """
    lines = ["# Megatron-LM's own tests with FoPE in RoPE's place", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *_LEGEND, "", *_table(results), ""]
    lines += [f"- {result.name}: {result.selected}" for result in results if result.selected]
    lines += [""] if any(result.selected for result in results) else []
    lines += _list_tests(results, FAILED, "Failed with FoPE, passed with RoPE")
    lines += _by_reason(results, FAILED_WITH_ROPE_TOO, "Failed with RoPE as well: what a CPU lacks")
    lines += _by_reason(results, SKIPPED, "Skipped")
    lines += _by_reason(results, NOT_EXERCISED, "Not exercised")
    lines += _list_tests(results, STORED, "Coefficients only stored")
    lines += _list_tests(results, PASSED, "Passed")
    lines += ["## Files not run", ""]
    grouped: dict[str, list[str]] = defaultdict(list)
    for path, reason in files_not_run.items():
        grouped[reason].append(path)
    lines += [f"- {reason}: {', '.join(f'`{p}`' for p in paths)}" for reason, paths in grouped.items()]
    return "\n".join(lines).rstrip() + "\n"


_LEGEND = (
    "*passed*: FoPE rotated queries and keys in the test, RoPE did not, and the test's own asserts hold on",
    "every rank. *passed, stored only*: FoPE's coefficients went into or came out of a checkpoint, nothing",
    "was rotated. *not exercised*: passed, but FoPE did nothing in it. *fails with RoPE too*: the same test",
    "fails on the same machine without FoPE. *failed*: it passes with RoPE.",
)


def _table(results: list[Result]) -> list[str]:
    lines = ["| launch | ranks | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for result in results:
        if result.not_launched:
            empty = " |" * (len(COLUMNS) - 1)
            lines.append(f"| {result.name} | {result.ranks} | not run: {result.not_launched} |{empty}")
            continue
        count = Counter(outcome.status for outcome in result.outcomes)
        cells = " | ".join(str(count[column]) for column in COLUMNS)
        lines.append(f"| {result.name} | {result.ranks} | {cells} |")
    count = totals(results)
    lines.append("| all | | " + " | ".join(f"**{count[column]}**" for column in COLUMNS) + " |")
    return lines


def _chosen(results: list[Result], status: str) -> list[tuple[Result, Outcome]]:
    return [(result, o) for result in results for o in result.outcomes if o.status == status]


def _list_tests(results: list[Result], status: str, title: str) -> list[str]:
    """Every test, its parametrisations on one line."""
    chosen = _chosen(results, status)
    if not chosen:
        return []
    lines = [f"## {title}", ""]
    families: dict[tuple[int, str], list[Outcome]] = defaultdict(list)
    for result, outcome in chosen:
        families[result.ranks, outcome.test.partition("[")[0]].append(outcome)
    for (ranks, name), members in families.items():
        times = f" x {len(members)}" if len(members) > 1 else ""
        rotations = sum(o.rotations for o in members)
        details = [f"{ranks} rank{'s' if ranks > 1 else ''}"]
        if status == PASSED:
            details.append(f"{rotations} rotations")
        if status == STORED:
            details.append(f"{sum(o.states for o in members)} states")
        if status == FAILED:
            details.append(members[0].reason)
        lines.append(f"- `{name}`{times}: {', '.join(details)}")
    return [*lines, ""]


def _by_reason(results: list[Result], status: str, title: str) -> list[str]:
    """Tests grouped by what kept them from passing, or by file."""
    chosen = _chosen(results, status)
    if not chosen:
        return []
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for _, outcome in chosen:
        name = outcome.test.partition("[")[0]
        path, _, short = name.partition("::")
        if status == NOT_EXERCISED:  # there is no reason but the file's topic
            reasons[f"`{path}`"][short] += 1
        else:
            reasons[outcome.reason][name] += 1
    lines = [f"## {title}", ""]
    for reason, tests in sorted(reasons.items(), key=lambda entry: -entry[1].total()):
        names = ", ".join(f"`{name}`" + (f" x {n}" if n > 1 else "") for name, n in tests.items())
        lines.append(f"- {reason} ({tests.total()}): {names}")
    return [*lines, ""]
