"""What a test may be skipped for; a library that the test environment is supposed to hold is no reason.

A pytest plugin: any other skip is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

REASONS = (
    r"no CUDA device is visible",
    r"needs (a GPU|two GPUs|\d+ GPUs|compute capability \d+\.\d+)",
    r"transformer_engine is not installed; see docs/gpu\.md",  # only builds on a machine with a GPU
    r"MEGATRON_LM does not name a Megatron-LM checkout",
    r"there is no patch for Megatron-LM 0\.16",
    r"root reads files whatever their mode",
    r"not implemented: ",  # tests/golden: what no published model uses
    r"this Megatron-Core has no such flag: ",
    r"through 0\.17 ",
    r"needs Megatron-Core \d",
    r"the built-in pre-training reads packed documents from Megatron-Core 0\.18 on",
    r"FSDP was tried from Megatron-Core 0\.19 on",
)


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):  # not an expected failure
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not re.match("|".join(REASONS), reason):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that is not in tests/helpers/skips.py: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of tests and fixtures."""
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Of whole modules."""
    report = yield
    _refuse(report)
    return report
