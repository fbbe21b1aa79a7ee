"""``@pytest.mark.ranks(2)``: a test whose body runs on so many ranks, each a process with Megatron imported.

A pytest plugin. The ranks are forks of the server in :mod:`forks`, with a gloo process group; in each, pytest
runs the test with its fixtures, so that assertions, ``skip`` and ``monkeypatch`` are what they always are. A
test passes when it does on all ranks; otherwise the report is that of the rank that failed first.

All tests of a module that want the same number of ranks share one fork, in which what a test changes stays
changed, and fixtures of the module stay alive. Behind a failure the others go on in a new one, because ranks
may be out of step.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from forks import Launcher

TIMEOUT = 900.0
"""Seconds for all tests of a fork; of an operation of the process group, a fifth."""
PHASES = ("setup", "call", "teardown")

_inside_a_rank = False

_launcher = pytest.StashKey[Launcher]()
_reports = pytest.StashKey[dict[str, list[pytest.TestReport]]]()


def fork_server(config: pytest.Config) -> Launcher:
    """The fork server of this pytest process, started by the first who asks."""
    if _launcher not in config.stash:
        config.stash[_launcher] = launcher = Launcher()
        launcher.__enter__()
        config.add_cleanup(lambda: launcher.__exit__(None, None, None))
    return config.stash[_launcher]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report what the ranks did, instead of running the test here."""
    marker = item.get_closest_marker("ranks")
    if marker is None or _inside_a_rank:
        return None
    known = item.config.stash.setdefault(_reports, {})
    if item.nodeid not in known:
        same = [
            other.nodeid
            for other in item.session.items
            if other.path == item.path and other.get_closest_marker("ranks") == marker
        ]
        known |= run(fork_server(item.config), item.config, marker.args[0], item.path, same)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in known.pop(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what an earlier test of the module had set up
    return True


def run(
    launcher: Launcher, config: pytest.Config, nproc: int, file: Path, nodeids: Iterable[str]
) -> dict[str, list[pytest.TestReport]]:
    """Run tests of one file on a number of ranks.

    Args:
        launcher: the server whose forks they are.
        config: pytest's, for the root folder and the settings.
        nproc: number of ranks.
        file: the test file.
        nodeids: which of its tests; all of them if there are none.

    Returns:
        By test, the reports of its phases: those of rank 0, or of the rank where it failed first.
    """
    done: dict[str, list[pytest.TestReport]] = {}
    wanted = list(nodeids)
    while True:
        left = [nodeid for nodeid in wanted if nodeid not in done]
        if (wanted and not left) or (done and not wanted):
            return done
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            arguments = (str(file), str(config.rootpath), left, folder)
            code, text = launcher.call(
                run_in_this_rank, *arguments, nproc=nproc, log=Path(folder) / "log", timeout=TIMEOUT
            )
            read = [_read(Path(folder) / f"rank{rank}.jsonl", config) for rank in range(nproc)]
        found = _merge(read)
        # A rank that dies takes the test it was in with it; a file that cannot be read, all of them.
        for nodeid in left[:1] if any(read) else left:
            found.setdefault(nodeid, [_died(nodeid, f"the ranks ended with {code}\n{text[-6000:]}")])
        assert found, text[-6000:]
        _count_the_fork(found, time.monotonic() - started)
        done |= found


def _count_the_fork(found: dict[str, list[pytest.TestReport]], seconds: float) -> None:
    """Add to the first report what its fork took besides the tests, so that ``--durations`` shows it."""
    first = next(iter(found.values()))[0]
    first.duration += max(0.0, seconds - sum(report.duration for some in found.values() for report in some))


def _read(file: Path, config: pytest.Config) -> dict[str, dict[str, pytest.TestReport]]:
    """A rank's reports by test and phase, in the order in which they came."""
    tests: dict[str, dict[str, pytest.TestReport]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        if report.skipped and isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # what pytest expects, and JSON does not know
        tests.setdefault(report.nodeid, {})[report.when] = report
    return tests


def _merge(ranks: list[dict[str, dict[str, pytest.TestReport]]]) -> dict[str, list[pytest.TestReport]]:
    """Of every test that no rank left unfinished, or that a rank failed: one report for each phase."""
    merged = {}
    for nodeid in ranks[0] | {nodeid: None for rank in ranks[1:] for nodeid in rank}:
        reports = []
        for phase in PHASES:
            of_ranks = {
                i: tests[nodeid][phase] for i, tests in enumerate(ranks) if phase in tests.get(nodeid, ())
            }
            failed = [i for i, report in of_ranks.items() if report.failed]
            if failed:  # the others may have failed because this one was gone
                first = min(failed, key=lambda i: of_ranks[i].stop)
                of_ranks[first].sections.append((f"failed on rank {first} of {len(ranks)}", ""))
                reports.append(of_ranks[first])
            elif of_ranks:
                reports.append(of_ranks[min(of_ranks)])
        whole = all("teardown" in tests.get(nodeid, ()) for tests in ranks)
        if whole or any(report.failed for report in reports):
            merged[nodeid] = reports
    return merged


def _died(nodeid: str, message: str) -> pytest.TestReport:
    location = (nodeid.partition("::")[0], None, nodeid.partition("::")[2])
    return pytest.TestReport(nodeid, location, {}, "failed", message, "call")


class Rank:
    """Inside a rank: the process group, the selection of tests, and a file of reports; also a plugin."""

    def __init__(self, only: list[str], reports: Path) -> None:
        self.only = set(only)
        self.reports = reports.open("w")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.only:
            items[:] = [item for item in items if item.nodeid in self.only]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Any:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data, default=str), file=self.reports, flush=True)
        yield

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config


def run_in_this_rank(file: str, root: str, only: list[str], folder: str) -> int:
    """What each rank does; called in the fork.

    Args:
        file: the test file.
        root: pytest's root folder.
        only: ids of the tests to run; all if empty.
        folder: for the reports and for temporary files.
    """
    import torch.distributed as dist

    global _inside_a_rank
    _inside_a_rank = True
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT / 5))
    os.chdir(root)
    arguments = [file, "--rootdir", root, "-o", "addopts=", "-q", "--basetemp", f"{folder}/rank{rank}"]
    arguments += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    if size > 1:
        arguments.append("-x")  # the other ranks may wait for this one
    plugin = Rank(only, Path(folder) / f"rank{rank}.jsonl")
    code = pytest.main(arguments, plugins=[plugin])
    return 0 if code == pytest.ExitCode.OK else int(code)
