"""FoPE under DeepSpeed: ``examples/deepspeed`` is really trained, saved and resumed on two ranks."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from example_scripts import load
from launch import ROOT, torchrun

EXAMPLE = ROOT / "examples" / "deepspeed"
CHECKS = ROOT / "tests" / "scripts" / "deepspeed_checks.py"
CASES = re.findall(r'^    "([^"]+)": "--zero', CHECKS.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    done = torchrun(2, [str(CHECKS)], timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_training(case: str, results: dict[str, str | None]) -> None:
    assert results[case] is None, f"\n{results[case]}"


@pytest.mark.launch
def test_readme(tmp_path: Path) -> None:
    """The commands of the README print what it says, to the digits that do not depend on the machine."""
    text = (EXAMPLE / "README.md").read_text()
    commands = re.findall(r"^torchrun --nproc-per-node 2 examples/deepspeed/(.*)$", text, re.MULTILINE)
    expected = dict(re.findall(r"^step (\d+): loss ([\d.]+)$", text, re.MULTILINE))
    assert len(commands) == 2 and len(expected) >= 4
    printed: dict[str, str] = {}
    for command in commands:
        script, *flags = shlex.split(command.replace("out/deepspeed", str(tmp_path)))
        done = torchrun(2, [str(EXAMPLE / script), *flags])
        assert done.returncode == 0, done.stdout[-4000:]
        printed |= dict(re.findall(r"^step (\d+): loss ([\d.]+)$", done.stdout, re.MULTILINE))
    for step, loss in expected.items():
        assert float(printed[step]) == pytest.approx(float(loss), abs=1e-3), step


# Bad input, in this process: it is found before Megatron or DeepSpeed is imported.


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, in the first of 2 ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    return load("deepspeed/train.py")


REFUSED = {
    "--zero 4": "--zero is 4; allowed: 0, 1, 2, 3",
    "--ulysses 3": "--ulysses is 3; allowed: a divisor of the number of ranks, 2",
    "--ulysses 0": "--ulysses is 0; allowed: whole numbers >= 1",
    "--ulysses 2 --kv-heads 1": "--kv-heads is 1; allowed: a multiple of 2 "
    "(--ulysses: every rank attends with some heads)",
    "--heads 4 --kv-heads 3": "--heads is 4; allowed: a multiple of 3 (--kv-heads)",
    "--hidden 66": "--hidden is 66; allowed: a multiple of 4 (--heads)",
    "--ulysses 2 --seq-length 66": "--seq-length is 66; allowed: a multiple of 4 "
    "(two pieces per rank of --ulysses)",
    "--global-batch-size 3": "--global-batch-size is 3; allowed: a multiple of 2 (ranks / --ulysses)",
    "--zero 2 --zero-init": "--zero-init is given with --zero 2; requires --zero 3",
    "--bf16 --fope-learnable": "--fope-learnable is given with --bf16, where DeepSpeed rounds every "
    "parameter to bf16, but coefficients need fp32; leave one of the two out",
    "--zero 3 --zero-init --bf16 --position rope": "--zero-init is given with --bf16 --position rope, where "
    "DeepSpeed rounds the frequencies of Megatron's RoPE to bf16; leave --zero-init out",
    "--fope-gain -1": "--fope-gain is -1.0; allowed: greater than 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_one_line_for_bad_input(
    flags: str, train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(train, flags, monkeypatch, capsys) == REFUSED[flags]


def test_one_line_without_deepspeed(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    message = "deepspeed is not installed; get it with: pip install 'megatron-fope[deepspeed]'"
    assert refusal(train, "", monkeypatch, capsys) == message


def test_one_line_without_torchrun(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    message = "one process per rank is needed; start with: torchrun --nproc-per-node N ..."
    assert refusal(train, "", monkeypatch, capsys) == message


def refusal(
    train: ModuleType, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line that the program leaves with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    out, line = capsys.readouterr()
    assert not out and line.startswith("train.py: error: ") and line.count("\n") == 1
    return line.removeprefix("train.py: error: ").rstrip("\n")
