"""What the ranks of a launch recorded, put together: one outcome per test."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PASSED = "passed"
STORED = "passed, stored only"
"""FoPE's coefficients went into or came out of a checkpoint, but the test rotates nothing."""
NOT_EXERCISED = "not exercised"
"""Passed without FoPE doing anything: proves nothing about it."""
FAILED = "failed"
FAILED_WITH_ROPE_TOO = "fails with RoPE too"
SKIPPED = "skipped"

CONNECTION_TROUBLE = ("gloo", "Connection closed", "Timed out", "timed out", "Socket", "DistNetworkError")
"""What a rank says whose partner failed."""


@dataclass(frozen=True)
class Outcome:
    """One test over all ranks of its launch."""

    test: str
    """Path below ``tests/unit_tests``, ``::``, name."""
    status: str
    reason: str = ""
    layers: int = 0
    """FoPE layers built, summed over the ranks, as are the following."""
    rotations: int = 0
    states: int = 0
    """FoPE states handed to a checkpoint."""
    rope: int = 0
    """Rotations by RoPE."""
    seconds: float = 0.0
    settled: bool = True
    """False where ranks disagree or never finished: what came later in the same launch cannot be trusted."""


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of every rank; a line that a killed process left half-written is dropped."""
    ranks = []
    for path in sorted(folder.glob("rank*.jsonl")):
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        ranks.append(records)
    return ranks


def merge(ranks: list[list[dict[str, Any]]], position: str) -> list[Outcome]:
    """One outcome per test that was started, in the order of starting.

    Args:
        ranks: records of every rank.
        position: ``fope`` or ``rope``; decides what counts as exercised.
    """
    order: dict[str, None] = {}
    ends: list[dict[str, dict[str, Any]]] = []
    for records in ranks:
        order |= dict.fromkeys(record["test"] for record in records if record["event"] != "collected")
        ends.append({record["test"]: record for record in records if record["event"] == "end"})
    return [_merge_test(test, [end.get(test) for end in ends], position) for test in order]


def _merge_test(test: str, records: list[dict[str, Any] | None], position: str) -> Outcome:
    finished = [record for record in records if record is not None]
    total = {
        name: sum(record[name] for record in finished) for name in ("layers", "rotations", "states", "rope")
    }
    common = {"test": test, **total, "seconds": max((r.get("seconds", 0.0) for r in finished), default=0.0)}
    failures = [record["reason"] for record in finished if record["outcome"] == "failed"]
    if failures:
        own = [text for text in failures if not any(word in text for word in CONNECTION_TROUBLE)]
        settled = len(own) == len(records)
        return Outcome(status=FAILED, reason=(own or failures)[0], settled=settled, **common)
    if len(finished) < len(records):
        reason = f"{len(records) - len(finished)} of {len(records)} ranks did not finish"
        return Outcome(status=FAILED, reason=reason, settled=False, **common)
    if all(record["outcome"] == "skipped" for record in finished):
        return Outcome(status=SKIPPED, reason=finished[0]["reason"], **common)
    return Outcome(status=_kind_of_pass(total, position), **common)


def _kind_of_pass(total: dict[str, int], position: str) -> str:
    if position == "rope":
        return PASSED if total["rope"] else NOT_EXERCISED
    if total["rotations"] and not total["rope"]:
        return PASSED
    return STORED if total["states"] and not total["rope"] else NOT_EXERCISED


def explain(found: list[Outcome], missing: dict[str, str]) -> list[Outcome]:
    """Turn failures that only say what this machine or launch lacks into skips."""
    explained = []
    for outcome in found:
        why = next((why for pattern, why in missing.items() if re.search(pattern, outcome.reason)), None)
        if outcome.status == FAILED and outcome.settled and why is not None:
            outcome = replace(outcome, status=SKIPPED, reason=why)
        explained.append(outcome)
    return explained


def trusted(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that hold: after the first unsettled one, failures may be its consequences and are dropped."""
    for index, outcome in enumerate(outcomes):
        if not outcome.settled:
            later = [each for each in outcomes[index + 1 :] if each.status not in (FAILED,)]
            return [*outcomes[: index + 1], *later]
    return outcomes


def attribute(outcomes: list[Outcome], with_rope: dict[str, Outcome]) -> list[Outcome]:
    """Mark the failures that RoPE has as well on the same machine: they say nothing about FoPE."""
    marked = []
    for outcome in outcomes:
        rope = with_rope.get(outcome.test)
        if outcome.status == FAILED and rope is not None and rope.status == FAILED:
            outcome = replace(outcome, status=FAILED_WITH_ROPE_TOO, reason=rope.reason)
        elif outcome.status == FAILED and rope is None:
            outcome = replace(outcome, reason=f"{outcome.reason} (not compared with RoPE)")
        marked.append(outcome)
    return marked
