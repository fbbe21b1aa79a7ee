"""What the benchmarks write, and that every command runs and refuses bad input."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import command, end_to_end, memory, plot, results, rotary, table
from bench.allocation import allocation, saved_for_backward

from megatron_fope.common.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_process_settings(monkeypatch: pytest.MonkeyPatch):
    """The command sets the number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


# Files ------------------------------------------------------------------------------------------------


def row(**values: str) -> results.Row:
    base = dict.fromkeys(results.ROTARY_COLUMNS, "1")
    shape = '{"s":8,"b":1,"hq":1,"hkv":1,"d":8,"layout":"split","base":1e4,"learnable":false}'
    return base | {"shape": shape, "mode": "both", "provider": "copy", "profile": "paper"} | values


def update(path: Path, *rows: results.Row) -> list[results.Row]:
    results.update(path, results.ROTARY_COLUMNS, results.ROTARY_MEASURED, list(rows))
    return results.read(path, results.ROTARY_COLUMNS)


def test_a_rerun_replaces_its_rows_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.csv"
    update(path, row(commit="a", ms50="1"), row(commit="b", ms50="2"))
    again = update(path, row(commit="a", ms50="3", date="2030-01-01"))
    assert [(r["commit"], r["ms50"]) for r in again] == [("a", "3"), ("b", "2")]
    for name in set(results.ROTARY_COLUMNS) - {*results.ROTARY_MEASURED, "date"}:
        assert len(update(tmp_path / f"{name}.csv", row(), row(**{name: "other"}))) == 2, name
    assert [r["ms50"] for r in results.newest(again, results.ROTARY_MEASURED)] == ["3"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        update(path, row())


def test_ratios_and_picture_come_from_the_rows(tmp_path: Path) -> None:
    rows = [row(provider=p, ms50=t, ms20=t, ms80=t) for p, t in
            (("fope-torch", "6"), ("megatron-rope", "8"), ("published", "30"), ("copy", "2"))]  # fmt: skip
    text = table.ratios(rows)
    assert "/ te-rope" not in text
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[2:-1]] == [
        "fope-torch", "0.75", "0.20", "3.00"]  # fmt: skip
    update(tmp_path / rotary.CSV, *rows)
    (picture,) = plot.draw(tmp_path / rotary.CSV)
    assert picture.parent == tmp_path and picture.stat().st_size > 10_000


# Commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("rotary --provider warp", r"--provider is 'warp'; allowed: fope-torch, .*copy"),
        ("rotary --sequence -5", r"--sequence is '-5'; allowed: whole numbers >= 1"),
        ("rotary --sequence 1k", r"--sequence is '1k'"),
        ("rotary --batch 0", r"--batch is '0'"),
        ("rotary --heads 8/3", r"--heads is '8/3'; allowed: query heads / KV heads"),
        ("rotary --dtype int8", r"--dtype is 'int8'; allowed: fp32, bf16, fp16"),
        ("rotary --layout thd", r"--layout is 'thd'; allowed: split, contiguous"),
        ("rotary --profile olmo", r"--profile is 'olmo'; allowed: paper, intern-s1-pro"),
        ("rotary --rotary-base 1", r"--rotary-base is '1'"),
        ("rotary --head-dim 5", r"--head-dim 5"),
        ("rotary --seconds x", r"--seconds is 'x'; allowed: whole numbers >= 1"),
        ("rotary --threads 0", r"--threads is 0; allowed: whole numbers >= 1"),
        ("rotary --device tpu", r"--device is 'tpu'; allowed: auto, cpu, cuda"),
        ("memory --sequence 4", r"--sequence is '4'; allowed: whole numbers >= 16, separated by commas"),
        ("step --steps 1", r"--steps is 1; allowed: whole numbers >= 2"),
        ("communication --layout TP3", r"--layout is 'TP3'; allowed: TP2 SP, "),
        ("plot", r"--out holds no measurements"),
    ],
)
def test_bad_input(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([*flags.split(), "--out", str(tmp_path / "none")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, line), line
    assert not (tmp_path / "none").exists()


def test_rotary_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--sequence", "16,32", "--heads", "2/2", "--head-dim", "16", "--seconds", "1", "--device", "cpu"]
    flags += ["--provider", "fope-torch,published,megatron-rope", "--out", str(tmp_path)]
    assert command.main(["rotary", *flags]) == 0
    assert command.main(["plot", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "8 of 8 checks passed" in printed and "/ megatron-rope" in printed
    with (tmp_path / rotary.CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3
    for r in rows:
        assert float(r["ms20"]) <= float(r["ms50"]) <= float(r["ms80"])
        assert float(r["peak_mb"]) > 0 and float(r["host_us"]) > 0 and json.loads(r["shape"])["d"] == 16
        traffic = (2 if r["mode"] == "both" else 1) * 2 * json.loads(r["shape"])["s"] * 4 * 16 * 2
        assert float(r["gbps"]) == pytest.approx(traffic / float(r["ms50"]) / 1e6, rel=2e-3)
        if r["provider"] == "copy":
            assert float(r["pct_copy"]) == 100


def test_allocations_are_counted() -> None:
    kept = []

    def keep() -> torch.Tensor:
        kept.append(torch.ones(1 << 18))
        return torch.ones(1 << 20) + torch.ones(1 << 20)

    counted = allocation(keep, CPU)
    assert counted.left == 1 << 20 and counted.peak == (1 + 3 * 4) << 20
    x = torch.ones(1000, requires_grad=True)
    _, saved = saved_for_backward(lambda: x.exp() * x[:10].sum())
    assert sorted(saved.values()) == [4, 4000]  # the exponential once, though two operations save it


def test_memory_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["memory", "--sequence", "512,2048", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = (tmp_path / memory.MARKDOWN).read_text()
    assert text in capsys.readouterr().out
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")
    ]
    shared = [c for c in cells if len(c) == 9 and c[0] in ("paper", "intern-s1-pro")]
    assert len(shared) == 2 * 2 * 2
    assert all(c[6] == "1.000" and c[7] == "0 B" for c in shared)
    calls = {c[0]: c for c in cells if len(c) == 5}
    query_and_key = 2 * 2048 * memory.KV_HEADS * memory.HEAD_DIM * 2 / 2**20
    assert [float(calls[name][2]) for name in ("paper", "intern-s1-pro")] == [0, 0]
    assert float(calls["paper, learnable"][2]) == query_and_key
    assert float(calls["published algorithm"][2]) == 4 * query_and_key  # float32 tables for q and for k


@pytest.mark.parametrize("cp_size", [1, 8])
def test_a_rank_holds_its_own_positions_only(cp_size: int) -> None:
    shared = memory.measure_shared("paper", 1024, cp_size, CPU)
    assert shared.measured == shared.formula == 2 * (1024 // cp_size) * shared.d_in * 4
    assert shared.second_layer == 0


def test_what_a_layer_adds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = memory._layer

    def hoarding(*arguments: object) -> torch.nn.Module:
        layer, kept = original(*arguments), []
        layer.register_forward_hook(lambda *_: kept.append(torch.ones(100)))
        return layer

    def saving(*arguments: object) -> torch.nn.Module:
        layer = original(*arguments)
        layer.register_forward_hook(lambda module, inputs, out: (out[0].float().exp().bfloat16(), out[1]))
        return layer

    monkeypatch.setattr(memory, "_layer", hoarding)
    assert memory.measure_shared("paper", 64, 1, CPU).second_layer == 400
    monkeypatch.setattr(memory, "_layer", saving)
    assert memory.measure_shared("paper", 64, 1, CPU).second_layer == 64 * memory.HEAD_DIM * 4


def test_everything_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run in order; a failed check is not forgotten, and the step runs in a process of its own."""
    ran: list[str] = []
    monkeypatch.setattr(command, "_rotary", lambda *_: ran.append("rotary") or 1)
    monkeypatch.setattr(command, "_memory", lambda *_: ran.append("memory") or 0)

    def start(words: list[str], **_: object) -> subprocess.CompletedProcess:
        ran.append(" ".join(words[2:5]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", start)
    assert command.main(["all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert ran == ["rotary", "memory", "step --device cpu"]


def test_only_the_rotation_runs_without_megatron(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse() -> None:
        raise UserError("Megatron-Core is not installed")

    monkeypatch.setattr(command, "require_supported_megatron", refuse)
    monkeypatch.setattr(command, "_rotary", lambda *_: 0)
    monkeypatch.setattr(command, "_memory", None)
    assert command.main(["all", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "no memory and no step: Megatron-Core is not installed" in capsys.readouterr().out
    for name in ("memory", "step", "communication"):
        with pytest.raises(SystemExit):
            command.main([name, "--device", "cpu", "--out", str(tmp_path)])
        assert "Megatron-Core is not installed" in capsys.readouterr().err


@pytest.mark.launch
def test_step_command(tmp_path: Path) -> None:
    """Real training of both twins, in a process of its own: the CPU runtime changes torch."""
    words = [sys.executable, str(Path(command.__file__).parent), "step", "--device", "cpu", "--steps", "3"]
    words += ["--out", str(tmp_path), "--", "--seq-length", "32", "--max-position-embeddings", "32"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = results.read(tmp_path / end_to_end.CSV, end_to_end.COLUMNS)
    assert result["steps"] == "3" and "PyTorch" in result["implementation"]
    assert float(result["ratio_low"]) <= float(result["ratio"]) <= float(result["ratio_high"])
    assert f"fope / rope: {result['ratio']}" in done.stdout
