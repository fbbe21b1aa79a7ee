"""What all commands share: parser, types of flags, and how a command ends whatever happens to it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example_scripts import load

from megatron_fope.common.command_line import (
    OneLineParser,
    command,
    number,
    one_line_errors,
    separated,
    whole,
)
from megatron_fope.common.errors import UserError
from megatron_fope.tools import cli


def parser(kind: type[argparse.ArgumentParser] = OneLineParser) -> argparse.ArgumentParser:
    made = kind(prog="tool")
    made.add_argument("--count", type=whole(1, 8))
    made.add_argument("--any", type=int)
    made.add_argument("--share", type=number(above=0, below=1))
    made.add_argument("--lengths", type=separated(whole(2)))
    made.add_argument("--kind", choices=("red", "green"))
    made.add_argument("--flag", action="store_true")
    made.add_argument("--two", nargs=2)
    one = made.add_mutually_exclusive_group()
    one.add_argument("--left", action="store_true")
    one.add_argument("--right", action="store_true")
    made.add_argument("file", metavar="FILE")
    sub = made.add_subparsers(dest="command", metavar="COMMAND")
    sub.add_parser("go").add_argument("--far", type=whole(), required=True)
    return made


MISTAKES = {
    "f --count x": "--count is 'x'; allowed: whole numbers from 1 to 8",
    "f --count 0": "--count is 0; allowed: whole numbers from 1 to 8",
    "f --count 1.5": "--count is '1.5'; allowed: whole numbers from 1 to 8",
    "f --count": "--count requires one value",
    "f --any x": "--any is 'x'; allowed: whole numbers",
    "f --share 0": "--share is 0; allowed: numbers > 0 and < 1",
    "f --share nan": "--share is nan; allowed: numbers > 0 and < 1",
    "f --lengths 2,1": "--lengths is '2,1'; allowed: whole numbers >= 2, separated by commas",
    "f --lengths=": "--lengths is ''; allowed: whole numbers >= 2, separated by commas",
    "f --kind blue": "--kind is 'blue'; allowed: red, green",
    "f --flag=1": "--flag takes no value, but '1' is given",
    "f --two 1": "--two requires 2 values",
    "f --left --right": "--right and --left are both given; use one of them",
    "": "required, but missing: FILE",
    "f --cou": "unrecognized arguments: --cou; use those that --help lists",
    "f stop": "COMMAND is 'stop'; allowed: go",
    "f go": "required, but missing: --far",
    "f go --far 1e3": "--far is '1e3'; allowed: whole numbers",
    f"f go --far 1{'0' * 30}": f"--far is 1{'0' * 30}; allowed: whole numbers",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_in_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        parser().parse_args(line.split())
    assert str(error.value) == MISTAKES[line]
    assert capsys.readouterr() == ("", "")


def test_values() -> None:
    args = parser().parse_args(
        ["--count", "8", "--share", "0.5", "--lengths", "2,3", "f", "go", "--far", "-4"]
    )
    assert (args.count, args.share, args.lengths, args.far) == (8, 0.5, [2, 3], -4)


def test_other_parsers_end_with_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = parser(argparse.ArgumentParser)
    one_line_errors(theirs)
    with pytest.raises(SystemExit) as stop:
        theirs.parse_args(["f", "--kind", "blue"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "megatron-fope: error: --kind is 'blue'; allowed: red, green\n"


# How a command ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--a is 1\nand more"), 2, "tool: error: --a is 1 and more\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (
            OSError(28, "No space left on device"),
            2,
            "tool: error: input or output: No space left on device\n",
        ),
        (PermissionError(13, "Permission denied", "/a"), 2, "tool: error: /a: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", "/a"), 2, "tool: error: /a: Is a directory\n"),
    ],
)
def test_ends_with_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, command("tool"):
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_mistakes_of_ours_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), command("tool"):
        1 / 0  # noqa: B018


def test_sigterm_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as stop, command("tool"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)
    assert (stop.value.code, cleaned) == (143, [True])
    assert capsys.readouterr().err == "tool: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def run(code: str, *, unbuffered: bool, stdout: int) -> subprocess.CompletedProcess[str]:
    text = f"from megatron_fope.common.command_line import command\nwith command('tool'):\n    {code}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *(["-u"] if unbuffered else []), "-c", text],
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("unbuffered", [False, True])
def test_full_standard_output(unbuffered: bool) -> None:
    with open("/dev/full", "w") as full:
        done = run("print('x')", unbuffered=unbuffered, stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr.startswith("tool: error: ") and done.stderr.endswith(": No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_leaves(unbuffered: bool, lines: int) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(f"for i in range({lines}): print(i)", unbuffered=unbuffered, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_forks_are_terminated_as_ever() -> None:
    code = "import os, time, signal; pid = os.fork(); pid or time.sleep(60); time.sleep(0.5)"
    code += "; os.kill(pid, signal.SIGTERM); assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -15"
    assert run(code, unbuffered=False, stdout=subprocess.DEVNULL).stderr == ""


COMMANDS = sorted(cli.COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_unknown_flags_in_one_line(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--no-such-flag"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("megatron-fope: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "program,name,value",
    [
        ("demo/run.py", "DEMO_ITERS", "many"),
        ("demo/run.py", "DEMO_LENGTH", "0"),
        ("extend/run.py", "EXTEND_SEEDS", "1;2"),
        ("extend/run.py", "EXTEND_JOBS", "-1"),
        ("extend/run.py", "EXTEND_MORE_ITERS", ""),
    ],
)
def test_variables_of_the_examples(
    program: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        load(program, "starts")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"{name} is" in line and "allowed: whole numbers" in line
