"""Megatron-LM's own unit tests, from a checkout, on CPUs and with FoPE in RoPE's place.

    python tests/upstream/run.py --megatron-lm /path/to/Megatron-LM --report tests/upstream.md

Each launch of ``selection.py`` runs under torchrun with ``exam_plugin.py``. What fails is run again with
RoPE, so that a failure is FoPE's only if RoPE passes on the same machine; those alone make the exit code 1.
``--position rope`` runs everything with RoPE instead. Half an hour on 2 cores with ``--ranks 4``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import outcomes
import report
import selection
from outcomes import FAILED, Outcome
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PREFIX = f"{selection.UNIT_TESTS.as_posix()}/"
"""Of every test's id as pytest says it."""
PACKAGES = {
    "pytest": "pytest",
    "pytest_mock": "pytest-mock",
    "pytest_asyncio": "pytest-asyncio",
    "einops": "einops",
}
"""What upstream's tests import and Megatron-Core does not bring: module to distribution."""


def main(argv: list[str] | None = None) -> int:
    """Run the launches, print the table, write the report; returns the exit code."""
    args = _parse(argv)
    checkout = args.megatron_lm.resolve()
    facts = _facts(checkout, args, sys.argv[1:] if argv is None else argv)
    results = [
        report.Result(launch.name, launch.ranks, not_launched="not yet") for launch in selection.LAUNCHES
    ]
    for launch, result in zip(selection.LAUNCHES, results, strict=True):
        _run_launch(checkout, launch, result, args)
        document = report.markdown(results, selection.files_not_run(checkout), facts)
        if args.report:  # after every launch: a run that is stopped leaves what it has
            args.report.write_text(document)
    if not args.report:
        print(document)
    return 1 if report.totals(results)[FAILED] else 0


def _run_launch(
    checkout: Path, launch: selection.Launch, result: report.Result, args: argparse.Namespace
) -> None:
    """Fill in one launch's result."""
    files = [path for path in launch.files if (checkout / selection.UNIT_TESTS / path).is_file()]
    if launch.ranks > args.ranks:
        result.not_launched = f"--ranks {args.ranks}"
    elif args.launch and not any(part in launch.name for part in args.launch):
        result.not_launched = "--launch"
    elif not files:
        result.not_launched = "the checkout has no such file"
    else:
        runner = Runner(checkout, launch, files, args.keep, args.timeout)
        found = runner.run(args.position)
        failed = [outcome.test for outcome in found if outcome.status == FAILED]
        if failed and args.position == "fope":
            with_rope = {outcome.test: outcome for outcome in runner.run("rope", only=failed)}
            found = outcomes.attribute(found, with_rope)
        result.outcomes, result.not_launched = found, ""
        result.selected = ", ".join(f"`{path}`" for path in files)
        result.selected += f" `-k '{runner.keep}'`" if runner.keep else ""
        print(_summary(result), flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a Megatron-LM checkout")
    parser.add_argument("--ranks", type=int, default=4, help="largest number of processes of a launch")
    parser.add_argument("--position", choices=("fope", "rope"), default="fope")
    parser.add_argument("-k", dest="keep", default="", help="pytest's -k, on top of each launch's own")
    parser.add_argument("--launch", nargs="*", help="only launches whose name holds one of these words")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds of one launch")
    parser.add_argument("--report", type=Path, help="markdown file to write; else it is printed")
    parser.add_argument("--commit", help="what to call the checkout when it is no git repository")
    args = parser.parse_args(argv)
    if not (args.megatron_lm / selection.UNIT_TESTS).is_dir():
        parser.error(
            f"--megatron-lm is {str(args.megatron_lm)!r}; use a checkout with {selection.UNIT_TESTS}"
        )
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(
            f"Megatron-LM's tests need {', '.join(missing)}: pip install 'megatron-fope[upstream-tests]'"
        )
    return args


class Runner:
    """Runs the tests of one launch to the end, in as many processes as hangs and crashes make necessary."""

    def __init__(
        self, checkout: Path, launch: selection.Launch, files: list[str], keep: str, timeout: int
    ) -> None:
        self.checkout = checkout
        self.launch = launch
        self.files = files
        self.keep = " and ".join(f"({part})" for part in (launch.keep, keep) if part)
        self.timeout = timeout

    def run(self, position: str, only: list[str] | None = None) -> list[Outcome]:
        """Outcomes in order; tests that never got a turn are failures and say so.

        Args:
            position: ``fope`` or ``rope``.
            only: tests to keep to.
        """
        done: dict[str, Outcome] = {}
        wanted = None if only is None else [f"{PREFIX}{test}" for test in only]
        while True:
            ranks, log = self._start(position, wanted)
            collected = [r["test"] for records in ranks[:1] for r in records if r["event"] == "collected"]
            if wanted is None:
                wanted = collected
            found = outcomes.explain(outcomes.merge(ranks, position), selection.MISSING_HERE)
            news = {outcome.test: outcome for outcome in outcomes.trusted(found)}
            news = {test: outcome for test, outcome in news.items() if test not in done}
            done |= news
            wanted = [test for test in wanted if test not in done]
            if not wanted:
                break
            if not news:
                reason = f"did not run: {_last_words(log)}"
                done |= {test: Outcome(test, FAILED, reason) for test in wanted}
                break
        if not done:
            done[self.launch.name] = Outcome(self.launch.name, FAILED, f"nothing ran: {_last_words(log)}")
        return [replace(outcome, test=outcome.test.removeprefix(PREFIX)) for outcome in done.values()]

    def _start(self, position: str, only: list[str] | None) -> tuple[list[list[dict]], str]:
        port = free_port()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "outcomes").mkdir()
            environment = os.environ | {
                "EXAM_POSITION": position,
                "EXAM_OUTCOMES": str(folder / "outcomes"),
                "EXAM_EXCLUDED": json.dumps(selection.EXCLUDED_TESTS),
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
                "PYTHONPATH": os.pathsep.join(
                    [str(self.checkout), str(ROOT), str(Path(__file__).resolve().parent)]
                    + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
                ),
            }
            environment.pop("EXAM_ONLY", None)
            if only is not None:
                (folder / "only").write_text("\n".join(only))
                environment["EXAM_ONLY"] = str(folder / "only")
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.launch.ranks)),
                *("--master-addr", "localhost", "--master-port", str(port)),
                *("-m", "pytest", "-p", "exam_plugin", "-c", os.devnull, "--rootdir", str(self.checkout)),
                *("-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short", "-q"),
                *("--basetemp", str(folder / "pytest" / "base"), *(["-k", self.keep] if self.keep else [])),
                *[str(self.checkout / selection.UNIT_TESTS / path) for path in self.files],
            ]
            (folder / "pytest").mkdir()
            log = _run(command, environment, folder, self.timeout)
            return outcomes.read(folder / "outcomes"), log


def _run(command: list[str], environment: dict[str, str], folder: Path, timeout: int) -> str:
    """Run a command with all its children in a group that a time-out ends as a whole; its output."""
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            file.write(f"\ntimed out after {timeout} seconds\n")
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


def _last_words(log: str) -> str:
    """The line of a log that most likely says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"Error|ERROR|timed out", line)]
    return (errors or lines or ["no output"])[0][:300]


def _summary(result: report.Result) -> str:
    count = report.totals([result])
    parts = [f"{count[status]} {status}" for status in report.COLUMNS if count[status]]
    seconds = sum(outcome.seconds for outcome in result.outcomes)
    return f"{result.name}: {', '.join(parts)} ({seconds:.0f} s in tests)"


def _facts(checkout: Path, args: argparse.Namespace, argv: list[str]) -> dict[str, str]:
    """What a reader needs to repeat the run; no path of this machine."""
    shown = ["--megatron-lm", "/path/to/Megatron-LM"]
    skip = False
    for word in argv:
        if skip or word.startswith(("--megatron-lm", "--commit")):
            skip = not skip and "=" not in word
            continue
        shown.append(word)
    return {
        "Megatron-LM": args.commit or _commit(checkout),
        "command": f"`python tests/upstream/run.py {shlex.join(shown)}`",
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()} CPU, gloo",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "pytest")),
        "megatron-fope": _git(ROOT, "describe", "--always", "--dirty") or "unknown",
    }


def _commit(checkout: Path) -> str:
    """The checkout's commit, and its version file where it is no repository of its own."""
    if (checkout / ".git").exists():
        described = _git(checkout, "describe", "--tags", "--always")
        return f"{described} ({_git(checkout, 'rev-parse', 'HEAD')[:12]})"
    text = (checkout / "megatron" / "core" / "package_info.py").read_text()
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)$", text, re.MULTILINE)
    return f"version {'.'.join(numbers)}, commit unknown (no git repository)"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    raise SystemExit(main())
