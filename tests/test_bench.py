"""The benchmarks: what they refuse to time, what they write, and that every command runs."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fope import cli, rotation
from megatron_fope.bench import cases, end_to_end, memory, plot, providers, results, rotary, table, timing
from megatron_fope.bench.allocation import allocation, saved_for_backward
from megatron_fope.bench.cases import Case
from megatron_fope.bench.check import Expected, check
from megatron_fope.bench.providers import PROVIDERS, Provider
from megatron_fope.errors import UserError

CPU = torch.device("cpu")
TINY = Case(48, heads=4, kv_heads=2, head_dim=16, dtype="bf16")


@pytest.fixture(autouse=True)
def same_process_settings(monkeypatch: pytest.MonkeyPatch):
    """The command sets the number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


# Correctness before speed -----------------------------------------------------------------------------


def rotate(inputs, **changed):
    arguments = {
        "query": inputs.query,
        "key": inputs.key,
        "sin_basis": inputs.sin_basis,
        "cos_basis": inputs.cos_basis,
        "coefficients": inputs.coefficients,
        "config": inputs.fope,
    }
    return rotation.rotate(**arguments | changed)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, as tensor cores read float32 by default."""
    bits = x.detach().view(torch.int32) + (1 << 12)
    return (bits & ~((1 << 13) - 1)).view(torch.float32)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.02


def one_nan(x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(x)
    mask.view(-1)[-1] = math.nan
    return x + mask


BROKEN = {
    "other sign of sin": (lambda i: rotate(i, sin_basis=-i.sin_basis), "query"),
    "TF32 mixing": (
        lambda i: rotate(i, coefficients={k: tf32(v) for k, v in i.coefficients.items()}),
        "query",
    ),
    "one element not written": (lambda i: (lambda q, k: (q, one_nan(k)))(*rotate(i)), "rotated key"),
    "gradient 2 % too large": (
        lambda i: rotate(i, key=WrongGradient.apply(i.key)),
        "gradient of the key",
    ),
    "not rounded": (lambda i: (lambda q, k: (q.float(), k))(*rotate(i)), "torch.float32"),
    "raises": (lambda i: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_provider_gets_no_speed(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    function, complaint = BROKEN[name]
    if name == "not rounded" and dtype == "fp32":
        return
    broken = Provider("broken", "fope", lambda inputs: lambda: function(inputs))
    monkeypatch.setitem(PROVIDERS, "broken", broken)
    flags = ["--sequence", "48", "--heads", "4/2", "--head-dim", "16", "--dtype", dtype, "--seconds", "1"]
    flags += ["--provider", "broken,fope-torch", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["bench", "rotary", *flags]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("  broken, ")]
    assert complaint in line and "no speed is given" in line
    assert "| broken" not in printed and "| fope-torch" in printed
    timed = {row["provider"] for row in results.read(tmp_path / rotary.CSV, results.ROTARY_COLUMNS)}
    assert timed == {"fope-torch", "copy"}


def available(case: Case) -> list[Provider]:
    return [p for p in PROVIDERS.values() if p.missing(case, CPU) is None]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_heads": 4, "layout": "contiguous"},
        {"profile": "intern-s1-pro"},
        {"learnable": True, "kv_heads": 4},
        {"batch": 3, "rotary_base": 500.0},
    ],
    ids=str,
)
def test_every_provider_is_correct(dtype: str, settings: dict) -> None:
    case = Case(**{"tokens": 65, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": dtype} | settings)
    inputs = cases.make_inputs(case, CPU)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all other tests here
        problems = {
            provider.name: check(provider, provider.call(inputs), Expected(inputs, provider.computes))
            for provider in available(case)
        }
    assert set(problems.values()) == {None}, problems
    expected = {"fope-torch", "fope-compiled", "fope-reference", "megatron-rope", "copy"}
    assert set(problems) == expected | ({"published"} if case.kv_heads == 4 else set())


def test_comparison_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are compared part by part; an error in the last part counts."""
    inputs = cases.make_inputs(TINY, CPU)
    monkeypatch.setattr("megatron_fope.bench.check._CHUNK", 7 * 4 * 16)
    expected = Expected(inputs, "fope")
    call = PROVIDERS["fope-torch"].call(inputs)
    outputs = call.forward()
    good = [*outputs, *call.backward(outputs)]
    assert expected.compare(good) is None
    bad = [x.detach().clone() for x in good]
    bad[3][-1, 0, 0, 0] += 1
    assert "gradient of the key: 1 of" in expected.compare(bad)


def test_what_cannot_run_is_listed_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    selected = providers.select("fope-triton-tables,fope-triton-fused,te-rope,published,fope-torch")
    assert rotary.run([TINY], selected, CPU, tmp_path, seconds=0, say=said.append) == 0
    text = "\n".join(said)
    assert "published: the authors' code needs as many KV heads as query heads" in text
    for name in ("fope-triton-tables", "fope-triton-fused", "te-rope"):
        assert re.search(rf"^  {name}: \S+", text, re.MULTILINE)
    assert providers._not_installed("no_such_module", "xyz") == "not installed: pip install xyz"


# Cases and time ---------------------------------------------------------------------------------------


def test_default_configurations() -> None:
    on_cpu = cases.default_cases(CPU)
    assert {(c.tokens, c.dtype) for c in on_cpu if c.layout == "split"} == {
        (s, d) for s in (1024, 4096) for d in ("fp32", "bf16")
    }
    assert all((c.heads, c.kv_heads, c.head_dim) == (16, 16, 128) for c in on_cpu)
    on_gpu = [c for c in cases.default_cases(torch.device("cuda")) if c == Case(
        c.tokens, c.heads, c.kv_heads, rotary_base=c.rotary_base)]  # fmt: skip
    assert {(c.tokens, c.heads, c.kv_heads) for c in on_gpu} == {
        (s, *h) for s in (8192, 32768, 131072) for h in ((32, 8), (64, 8), (16, 16))
    }


def test_tensors_look_like_megatrons() -> None:
    def strides(**settings):
        inputs = cases.make_inputs(Case(8, head_dim=4, **settings), CPU)
        return inputs.query.is_contiguous(), inputs.key.is_contiguous()

    assert strides(heads=2, kv_heads=2) == (False, False)
    assert strides(heads=4, kv_heads=2) == (True, False)  # Megatron's reshape copies the query here
    assert strides(heads=2, kv_heads=2, layout="contiguous") == (True, True)


def test_minimum_traffic() -> None:
    assert (
        Case(10, heads=4, kv_heads=2, head_dim=8, batch=3, dtype="fp32").minimum_bytes
        == 2 * 10 * 3 * 6 * 8 * 4
    )


def test_quantiles() -> None:
    assert timing.quantiles([3.0]) == timing.Quantiles(3.0, 3.0, 3.0)
    q = timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (q.q50, q.q20, q.q80) == pytest.approx((3.5, 2.0, 5.0))


def test_calls_take_turns() -> None:
    order: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self) -> str:
            order.append(self.name)
            return self.name

        def backward(self, outputs: str) -> None:
            order.append(outputs + "'")

    samples = timing.measure({n: Recorder(n) for n in "abc"}, CPU, seconds=0, least=4, most=9)
    warm_up, rounds = order[:6], "".join(order[6:]).replace("'", "")
    assert warm_up == ["a", "a'", "b", "b'", "c", "c'"]
    assert rounds == "aabbccbbccaaccaabbaabbcc"
    for sample in samples.values():
        forward, backward, both = (sample.milliseconds[mode] for mode in timing.MODES)
        assert len(both) == 4 and both == [f + b for f, b in zip(forward, backward, strict=True)]


def test_ratio_of_medians() -> None:
    noisy = [1.0, 1.1, 0.9, 1.3, 1.05, 0.95, 1.02, 0.99]
    assert end_to_end.ratio_of_medians(noisy, noisy) == end_to_end.Ratio(1.0, 1.0, 1.0)
    ratio = end_to_end.ratio_of_medians([1.5 * x for x in noisy], noisy[::-1])
    assert ratio.value == pytest.approx(1.5) and 1.2 < ratio.low < 1.5 < ratio.high < 1.9


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
        ("rotary --seconds x", r"--seconds is 'x'"),
        ("rotary --threads 0", r"--threads is '0'"),
        ("rotary --device tpu", r"--device is 'tpu'; allowed: auto, cpu, cuda"),
        ("memory --sequence 4", r"--sequence is '4'; allowed: at least 16"),
        ("step --steps 1", r"--steps is '1'; allowed: whole numbers >= 2"),
        ("communication --layout TP3", r"--layout is 'TP3'; allowed: TP2 SP, "),
        ("plot", r"--out holds no measurements"),
    ],
)
def test_bad_input(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *flags.split(), "--out", str(tmp_path / "none")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, line), line
    assert not (tmp_path / "none").exists()


def test_rotary_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--sequence", "16,32", "--heads", "2/2", "--head-dim", "16", "--seconds", "1", "--device", "cpu"]
    flags += ["--provider", "fope-torch,published,megatron-rope", "--out", str(tmp_path)]
    assert cli.main(["bench", "rotary", *flags]) == 0
    assert cli.main(["bench", "plot", "--out", str(tmp_path)]) == 0
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
    assert (
        cli.main(["bench", "memory", "--sequence", "512,2048", "--device", "cpu", "--out", str(tmp_path)])
        == 0
    )
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


@pytest.mark.launch
def test_step_command(tmp_path: Path) -> None:
    """Real training of both twins, in a process of its own: the CPU runtime changes torch."""
    command = [sys.executable, "-m", "megatron_fope", "bench", "step", "--device", "cpu", "--steps", "3"]
    command += ["--out", str(tmp_path), "--", "--seq-length", "32", "--max-position-embeddings", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = results.read(tmp_path / end_to_end.CSV, end_to_end.COLUMNS)
    assert result["steps"] == "3" and "PyTorch" in result["implementation"]
    assert float(result["ratio_low"]) <= float(result["ratio"]) <= float(result["ratio_high"])
    assert f"fope / rope: {result['ratio']}" in done.stdout
