"""The benchmark of the rotation: what it refuses to time, on which tensors, and how it measures."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from bench import cases, command, end_to_end, providers, results, rotary, timing
from bench.cases import Case
from bench.check import Expected, check
from bench.providers import PROVIDERS, Provider

from megatron_fope.kernels import torch_rotary

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
    return torch_rotary.rotate(**arguments | changed)


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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in BROKEN for d in ("fp32", "bf16") if (n, d) != ("not rounded", "fp32")],
)
def test_a_wrong_provider_gets_no_speed(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    function, complaint = BROKEN[name]
    broken = Provider("broken", "fope", lambda inputs: lambda: function(inputs))
    monkeypatch.setitem(PROVIDERS, "broken", broken)
    flags = [
        "--sequence",
        "48",
        "--heads",
        "4/2",
        "--head-dim",
        "16",
        "--dtype",
        dtype,
        "--seconds",
        "1",
        "--no-picture",
    ]
    flags += ["--provider", "broken,fope-torch", "--out", str(tmp_path), "--device", "cpu"]
    assert command.main(["rotary", *flags]) == 1
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
    monkeypatch.setattr("bench.check._CHUNK", 7 * 4 * 16)
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
    selected = providers.select(
        "fope-triton-tables,fope-triton-fused,fope-triton-tf32x3,te-rope,published,fope-torch"
    )
    assert rotary.run([TINY], selected, CPU, tmp_path, seconds=0, say=said.append) == 0
    text = "\n".join(said)
    assert "published: the authors' code needs as many KV heads as query heads" in text
    for name in ("fope-triton-tables", "fope-triton-fused", "fope-triton-tf32x3", "te-rope"):
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


def test_kept_tables_do_not_count_where_a_model_has_none() -> None:
    """Coefficients per layer: the cache would have dropped the tables before this layer's next call."""
    from megatron_fope.kernels import launch

    provider = PROVIDERS["fope-triton-tables"]
    launch.TABLES.get("some", lambda: ())
    provider.call(cases.make_inputs(dataclasses.replace(TINY, profile="intern-s1-pro"), CPU)).forget()
    assert len(launch.TABLES) == 1
    provider.call(cases.make_inputs(TINY, CPU)).forget()
    assert len(launch.TABLES) == 0


def test_quantiles() -> None:
    assert timing.quantiles([3.0]) == timing.Quantiles(3.0, 3.0, 3.0)
    q = timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (q.q50, q.q20, q.q80) == pytest.approx((3.5, 2.0, 5.0))


def test_calls_take_turns() -> None:
    order: list[str] = []
    forgotten: list[int] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def forget(self) -> None:
            forgotten.append(len(order))

        def forward(self) -> str:
            order.append(self.name)
            return self.name

        def backward(self, outputs: str) -> None:
            order.append(outputs + "'")

    samples = timing.measure({n: Recorder(n) for n in "abc"}, CPU, seconds=0, least=4, most=9)
    warm_up, rounds = order[:6], "".join(order[6:]).replace("'", "")
    assert warm_up == ["a", "a'", "b", "b'", "c", "c'"]
    assert rounds == "aabbccbbccaaccaabbaabbcc"
    assert forgotten == list(range(len(order))), "before every direction"
    for sample in samples.values():
        forward, backward, both = (sample.milliseconds[mode] for mode in timing.MODES)
        assert len(both) == 4 and both == [f + b for f, b in zip(forward, backward, strict=True)]


def test_ratio_of_medians() -> None:
    noisy = [1.0, 1.1, 0.9, 1.3, 1.05, 0.95, 1.02, 0.99]
    assert end_to_end.ratio_of_medians(noisy, noisy) == end_to_end.Ratio(1.0, 1.0, 1.0)
    ratio = end_to_end.ratio_of_medians([1.5 * x for x in noisy], noisy[::-1])
    assert ratio.value == pytest.approx(1.5) and 1.2 < ratio.low < 1.5 < ratio.high < 1.9
