"""Ladders: schedules become Megatron commands that fit each other, and run with resume."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Launcher
from launch import ROOT, TINY_MODEL
from synthetic import SyntheticCheckpoint, main

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.growth import check_growth
from megatron_fope.tools.ladder import execution
from megatron_fope.tools.ladder.plan import plan
from megatron_fope.tools.ladder.schedule import read_schedule

EXAMPLE = ROOT / "examples" / "context_extension" / "ladder_8b.toml"

SCHEDULE = """
launcher = ["torchrun", "--nproc-per-node", "4", "-m", "megatron_fope", "pretrain"]
gpus = 4
save = "{folder}/ladder"
[start]
checkpoint = "{folder}/base"
from-rope = "immediate"
[megatron]
num-layers = 4
hidden-size = 64
num-attention-heads = 4
group-query-attention = true
num-query-groups = 2
micro-batch-size = 1
global-batch-size = 4
train-iters = 4
save-interval = 2
eval-interval = 100
lr = 1e-3
mock-data = true
[[stage]]
seq-length = 128
tensor-model-parallel-size = 2
sequence-parallel = true
[[stage]]
name = "long"
seq-length = 512
rotary-base = 5e4
context-parallel-size = 4
lr = 5e-4
mock-data = false
data-path = ["0.5", "${{LADDER_DATA}}/a b", "0.5", "c"]
"""


@pytest.fixture
def schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LADDER_DATA", "/data")
    SyntheticCheckpoint(tmp_path / "base")
    path = tmp_path / "ladder.toml"
    path.write_text(SCHEDULE.format(folder=tmp_path))
    return path


def change(path: Path, *changes: str) -> Path:
    """Replace pieces of a schedule: ``old -> new``; the last occurrence of each."""
    text = path.read_text()
    for old, _, new in (words.partition(" -> ") for words in changes):
        assert old in text
        text = new.join(text.rsplit(old, 1))
    path.write_text(text)
    return path


def commands(text: str) -> list[list[str]]:
    """The commands in what ``ladder`` prints, which is a shell script."""
    lines = text.replace(" \\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1
    return command[command.index(flag) + 1]


def test_commands(schedule: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main("ladder", schedule, "--", "--log-interval", 1) == 0
    text = capfd.readouterr().out
    first, second = commands(text)
    launcher = ["torchrun", "--nproc-per-node", "4", "-m", "megatron_fope", "pretrain"]
    assert first[:6] == second[:6] == launcher and first[-2:] == second[-2:] == ["--log-interval", "1"]
    folders = [str(tmp_path / "ladder" / name) for name in ("stage1-128", "long")]
    sources = [str(tmp_path / "base"), folders[0]]
    for command, folder, source, length in zip(
        (first, second), folders, sources, ("128", "512"), strict=True
    ):
        assert value(command, "--load") == value(command, "--save") == folder
        assert value(command, "--pretrained-checkpoint") == source
        for flag in ("--seq-length", "--fope-train-length", "--max-position-embeddings"):
            assert value(command, flag) == length
        assert "--no-create-attention-mask-in-dataloader" in command and "--finetune" not in command
    assert value(first, "--fope-start-from-rope") == "immediate" and value(first, "--lr") == "0.001"
    assert not {"--fope-grow", "--fope-change-rotary-base", "--rotary-base"} & set(first)
    assert {"--fope-grow", "--fope-change-rotary-base"} < set(second) and value(second, "--lr") == "0.0005"
    assert "--fope-start-from-rope" not in second and value(second, "--rotary-base") == "50000"
    assert "--mock-data" in first and "--mock-data" not in second, "false takes a flag back"
    data = second.index("--data-path")
    assert second[data + 1 : data + 5] == ["0.5", "/data/a b", "0.5", "c"]
    assert "2,048 tokens in all" in text and "8,192 tokens in all" in text
    assert "TP 2, PP 1, CP 1, DP 2" in text and "TP 1, PP 1, CP 4, DP 1; 128 tokens" in text
    assert "rotary base 10000 -> 50000, 4 of 8 frequencies kept" in text
    assert main("ladder", schedule, "--stage", 2) == 0
    assert commands(capfd.readouterr().out) == [second[:-2]]


@pytest.mark.parametrize("way", ["clip-only", "function-preserving"])
def test_later_stages_of_other_starts(way: str, schedule: Path) -> None:
    """What the start implies must be named by the stages that have no start."""
    more = "\nanneal-iters = 3" if way == "function-preserving" else ""
    change(schedule, f'"immediate" -> "{way}"{more}')
    first, second = plan(read_schedule(schedule))
    assert value(first.argv, "--fope-start-from-rope") == way
    assert second.args.fope_square == (way == "clip-only")
    assert second.args.fope_pad_value == ("0,1" if way == "clip-only" else "1,1")
    assert second.args.fope_anneal_iters == 0 and "--fope-grow" in second.argv


def test_a_fope_checkpoint_only_grows(schedule: Path, tmp_path: Path) -> None:
    change(schedule, f'{tmp_path}/base" -> {tmp_path}/fope"', 'from-rope = "immediate" -> ')
    SyntheticCheckpoint(tmp_path / "fope", fope=FoPEConfig.from_profile(train_length=64, gain=0.5))
    first, _ = plan(read_schedule(schedule))
    assert "--fope-grow" in first.argv and "--fope-start-from-rope" not in first.argv


def test_growth_after_an_annealed_start() -> None:
    annealed = FoPEConfig.from_profile(train_length=64, anneal_iters=3)
    check_growth(annealed, FoPEConfig.from_profile(train_length=128), "the checkpoint")


def test_commands_without_the_checkpoint(
    schedule: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = '\nposition-embedding-type = "rope"\nseq-length = 64\nrotary-base = 10000'
    change(schedule, f'{tmp_path}/base" -> {tmp_path}/none"{facts}')
    assert main("ladder", schedule) == 0
    assert f"from {tmp_path}/none (RoPE, 64 tokens; not here, [start] says so)" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main("ladder", schedule, "--run")
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "--run is given, but there is no checkpoint in " in error


REFUSED = {
    "unknown key": ("gpus = 4 -> gpus = 4\nnodes = 3", "nodes is unknown; allowed: launcher, gpus, save"),
    "type": ("gpus = 4 -> gpus = 'four'", "gpus is 'four'; allowed: a whole number"),
    "missing": ("lr = 1e-3 -> ", "stage 1: lr is missing; requires a value in [[stage]] or in [megatron]"),
    "owned": ("lr = 5e-4 -> lr = 5e-4\nfinetune = true", "stage 2: finetune is given, but a ladder sets it"),
    "variable": (
        "${LADDER_DATA} -> ${LADDER_NONE}",
        "stage 2: data-path is '${LADDER_NONE}/a b', but LADDER_NONE is not set",
    ),
    "same name": (
        "seq-length = 128 -> seq-length = 128\nname = 'long'",
        "name is 'long' in 2 stages; use different ones",
    ),
    "shrinks": ("seq-length = 512 -> seq-length = 96", "stage 2: --seq-length is 96, but "),
    "context": (
        "seq-length = 512 -> seq-length = 516",
        "stage 2: --context-parallel-size is 4; allowed: numbers whose double divides the 516 tokens",
    ),
    "heads": ("tensor-model-parallel-size = 2 -> tensor-model-parallel-size = 3\ngpus = 3", "stage 1: --ten"),
    "ranks": ("context-parallel-size = 4 -> context-parallel-size = 8", "stage 2: --tensor-model-parallel-s"),
    "batch": ("lr = 5e-4 -> lr = 5e-4\ngpus = 12", "stage 2: --global-batch-size is 4; allowed: a multiple"),
    "sequence parallel": ("seq-length = 128 -> seq-length = 129", "stage 1: --tensor-model-parallel-size"),
    "typo": ("lr = 5e-4 -> lr = 5e-4\nrecompute = true", "stage 2: unrecognized arguments: --recompute"),
    "number": ("lr = 5e-4 -> lr = 'fast'", "stage 2: --lr is 'fast'; allowed: numbers"),
    "model": ("num-query-groups = 2 -> num-query-groups = 4", "stage 1: --num-query-groups is 4, but the"),
    "layers": ("num-layers = 4 -> num-layers = 6", "stage 1: --num-layers is 6, but the checkpoint in "),
    "warm-up": ("lr = 5e-4 -> lr = 5e-4\nlr-warmup-iters = 4", "stage 2: --lr-warmup-iters is 4; allowed"),
    "no start": ('from-rope = "immediate" -> ', "stage 1: {folder}/base is a RoPE model; requires [start]"),
    "start": ('"immediate" -> "slowly"', "stage 1: --fope-start-from-rope is 'slowly'; allowed: immediate"),
    "anneal": ('"immediate" -> "immediate"\nanneal-iters = 3', "stage 1: [start] anneal-iters is given;"),
    "anneal too long": (
        '"immediate" -> "function-preserving"\nanneal-iters = 9',
        "stage 1: --train-iters is 4; allowed: at least the 9 of [start] anneal-iters",
    ),
    "start's base": (
        '"immediate" -> "immediate"\nrotary-base = 500',
        "[start] rotary-base is 500, but {folder}/base has 10000",
    ),
    "no checkpoint": ('/base" -> /none"', "[start] checkpoint is '{folder}/none': no latest_checkpointed_it"),
    "preserved base": (
        [
            '"immediate" -> "function-preserving"\nanneal-iters = 3',
            "save-interval = 2 -> rotary-base = 5e4\nsave-interval = 2",
        ],
        "stage 1: --rotary-base is 50000, but the checkpoint in {folder}/base was trained with 10000; --fope",
    ),
    "other FoPE": (
        "lr = 5e-4 -> lr = 5e-4\nfope-pad-value = '0,1'",
        "stage 2: --fope-pad-value is '0,1', but",
    ),
    "folder": (
        ['/ladder" -> "', "seq-length = 128 -> seq-length = 128\nname = 'base'"],
        "stage 1: name is 'base': its folder {folder}/base is what the ladder starts from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, schedule: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, message = REFUSED[case]
    change(schedule, *([changes] if isinstance(changes, str) else changes))
    with pytest.raises(SystemExit) as stop:
        main("ladder", schedule)
    assert stop.value.code == 2
    captured = capfd.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("megatron-fope: error: ")]
    assert line.startswith(
        f"megatron-fope: error: {schedule}: {message.replace('{folder}', str(tmp_path))}"
    ), line
    assert captured.out == ""


def test_no_toml(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("gpus = = 3")
    with pytest.raises(UserError, match=r"no valid TOML: .*line 1"):
        read_schedule(tmp_path / "a.toml")
    with pytest.raises(UserError, match=r"SCHEDULE is .*; use a TOML file"):
        read_schedule(tmp_path / "b.toml")


def test_the_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = {
        "CHECKPOINT": "base",
        "OUT": str(tmp_path),
        "DATA_PATH": "d",
        "TOKENIZER": "t",
        "MASTER_ADDR": "a",
    }
    for name, text in site.items():
        monkeypatch.setenv(name, text)
    plans = plan(read_schedule(EXAMPLE))
    assert [one.args.seq_length for one in plans] == [32768, 131072]
    assert all(one.args.global_batch_size * one.args.seq_length == 2**22 for one in plans)
    assert not any(one.source_read for one in plans[:1]) and plans[0].launcher[0] == "srun"


# Running --------------------------------------------------------------------------------------------


def test_a_request_to_end_reaches_the_command(tmp_path: Path) -> None:
    """And a command's exit code, or signal, is that of the ladder."""
    child = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        f"open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(60)"
    )
    call = f"execution._call({[sys.executable, '-c', child]!r})"
    parent = f"import sys; from megatron_fope.tools.ladder import execution; sys.exit({call})"
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7
    assert execution._call(["bash", "-c", "exit 3"]) == 3
    assert execution._call(["bash", "-c", "kill -9 $$"]) == 137
    with pytest.raises(UserError, match="launcher starts with '/no/such'"):
        execution._call(["/no/such"])


class Ladder:
    """A real ladder of two stages on the CPU, 64 -> 128 -> 256 tokens; every run's log by stage."""

    def __init__(self, folder: Path, base: Path, launcher: Launcher) -> None:
        self.folder, self.logs, self._launcher = folder, [], launcher
        folder.mkdir()
        self.path = folder / "ladder.toml"
        self.path.write_text(
            f'launcher = ["--cpu", "pretrain"]\ngpus = 1\nsave = "{folder}"\n'
            f'[start]\ncheckpoint = "{base}"\nfrom-rope = "function-preserving"\nanneal-iters = 2\n'
            f"[megatron]\n{_table(TINY_MODEL)}save-interval = 2\ntensorboard-log-interval = 1\n"
            f'[[stage]]\nseq-length = 128\ntensorboard-dir = "{folder}/events1"\n'
            f"[[stage]]\nseq-length = 256\ngpus = 2\ncontext-parallel-size = 2\nrotary-base = 5e4\n"
            f'tensorboard-dir = "{folder}/events2"\n'
        )

    def call(self, argv: list[str]) -> int:
        """In place of a process of its own, which would import Megatron each time."""
        ranks = 2 if "--context-parallel-size" in argv else 1
        code, log = self._launcher.run(ranks, argv, self.folder / f"log{len(self.logs)}")
        self.logs.append(log)
        return code

    def curve(self, stage: int) -> dict[int, float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / f"events{stage}"))
        events.Reload()
        return {event.step: event.value for event in events.Scalars("lm loss")}


def _table(words: list[str]) -> str:
    """Flags as lines of a schedule; without those that stages have."""
    lines, position = "", 0
    while position < len(words):
        key, values = words[position].removeprefix("--"), []
        while (position := position + 1) < len(words) and not words[position].startswith("--"):
            values.append(words[position])
        if key not in ("seq-length", "max-position-embeddings", "train-iters"):
            lines += f"{key} = {values or 'true'}\n"
    return lines + "train-iters = 2\n"


@pytest.mark.launch
def test_a_real_ladder_with_resume(
    tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    flags = [*TINY_MODEL, "--position-embedding-type", "rope", "--train-iters", "2", "--save", str(base)]
    launcher.output(1, ["--cpu", "pretrain", *flags, "--save-interval", "2"], tmp_path / "log")
    whole, broken = (Ladder(tmp_path / name, base, launcher) for name in ("whole", "broken"))

    monkeypatch.setattr(execution, "_call", whole.call)
    assert main("ladder", whole.path, "--run") == 0, whole.logs[-1][-4000:]
    assert len(whole.logs) == 2
    assert "FoPE's weight against RoPE is 0, and 1 in 2 iterations from iteration 0" in whole.logs[0]
    assert "the coefficients grow (aligned) from train length 128 to 256" in whole.logs[1]
    assert "the rotary base changes from 10000 to 50000" in whole.logs[1]
    assert "FoPE's weight" not in whole.logs[1], "the start was over"
    assert list(whole.curve(1)) == list(whole.curve(2)) == [1, 2]

    monkeypatch.setattr(execution, "_call", broken.call)
    with pytest.raises(SystemExit) as stop:
        main("ladder", broken.path, "--run", "--stage", 2)
    assert stop.value.code == 2 and "is at iteration 0 of 2; finish it first" in capfd.readouterr().err
    assert main("ladder", broken.path, "--run", "--", "--exit-interval", 1) == 1
    assert "stage 1 of 2 (stage1-128) stopped at iteration 1 of 2" in capfd.readouterr().err
    assert main("ladder", broken.path, "--run") == 0, broken.logs[-1][-4000:]
    said = capfd.readouterr().err
    assert "stage 1 of 2 (stage1-128) goes on from iteration 1" in said and "(stage2-256) starts" in said
    assert len(broken.logs) == 3
    assert broken.curve(1) == whole.curve(1) and broken.curve(2) == whole.curve(2), "bit for bit"

    assert main("ladder", broken.path, "--run") == 0
    assert capfd.readouterr().err.count(" is finished: iteration 2 in ") == 2 and len(broken.logs) == 3
    change(broken.path, "rotary-base = 5e4 -> rotary-base = 6e4")
    with pytest.raises(SystemExit):
        main("ladder", broken.path, "--run")
    assert "was trained with --rotary-base 50000.0, the schedule says 60000.0" in capfd.readouterr().err
