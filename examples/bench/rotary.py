"""``bench rotary``: the rotation of queries and keys, all providers on the same tensors in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench import results
from bench.allocation import allocation
from bench.cases import Case, Inputs, make_inputs
from bench.check import Expected, check
from bench.providers import Call, Provider
from bench.results import Row, number
from bench.table import ratios, rotary_table
from bench.timing import MODES, Samples, fixed_microseconds, measure, quantiles
from megatron_fope.common.errors import UserError

CSV = "rotary.csv"


def run(
    cases: list[Case],
    providers: list[Provider],
    device: torch.device,
    out: Path,
    *,
    seconds: float,
    say: Callable[[str], None] = print,
) -> int:
    """Check and time every provider in every case, write the CSV, print the tables.

    Correctness comes first, for all cases; a provider that fails a case gets no time there.

    Args:
        cases: configurations.
        providers: implementations.
        device: where to run.
        out: folder of the CSV, which gains or replaces rows.
        seconds: time spent measuring each case.
        say: prints a line.

    Returns:
        The number of failed checks.
    """
    facts = results.facts(device)
    say(f"{facts['machine']}, torch {facts['torch']}, commit {facts['commit']}")
    say("\nCorrectness, forward and gradients against the formula in float64:")
    passed, failures = check_all(cases, providers, device, say)
    rows: list[Row] = []
    for case, able in passed.items():
        if not able:
            continue
        try:
            fresh = _time(case, able, device, seconds, facts)
        except torch.OutOfMemoryError:
            say(f"\n{case}: out of memory")
            continue
        rows += fresh
        results.update(out / CSV, results.ROTARY_COLUMNS, results.ROTARY_MEASURED, fresh)
        say(f"\n{case}\n{rotary_table(fresh)}")
    if rows:
        say(f"\n{ratios(rows)}\n\n{out / CSV}")
    return failures


def check_all(
    cases: list[Case], providers: list[Provider], device: torch.device, say: Callable[[str], None]
) -> tuple[dict[Case, list[Provider]], int]:
    """Which providers compute which cases correctly.

    Returns:
        The correct providers of every case, and the number of failed checks. One that cannot run is not a
        failure; the reason is printed.
    """
    absent: dict[tuple[str, str], int] = {}
    passed: dict[Case, list[Provider]] = {}
    failures = 0
    for case in cases:
        passed[case] = []
        able = []
        for provider in providers:
            reason = provider.missing(case, device)
            if reason is None:
                able.append(provider)
            else:
                absent[provider.name, reason] = absent.get((provider.name, reason), 0) + 1
        # One kind at a time: the expected values take as much memory as all results in float32.
        for kind in dict.fromkeys(provider.computes for provider in able):
            group = [provider for provider in able if provider.computes == kind]
            for provider, problem in _check_group(case, group, kind, device):
                if problem is None:
                    passed[case].append(provider)
                    continue
                failures += problem.failed
                say(f"  {provider.name}, {case}: {problem.text}; no speed is given")
        passed[case].sort(key=providers.index)
    num_passed = sum(map(len, passed.values()))
    say(f"  {num_passed} of {num_passed + failures} checks passed in {len(cases)} configurations")
    for (name, reason), count in absent.items():
        say(f"  {name}: {reason}" + ("" if count == len(cases) else f" ({count} of {len(cases)})"))
    return passed, failures


@dataclasses.dataclass(frozen=True)
class _Problem:
    text: str
    failed: bool = True
    """False: it could not run, which is no error."""


def _check_group(
    case: Case, providers: list[Provider], kind: str, device: torch.device
) -> Iterator[tuple[Provider, _Problem | None]]:
    try:
        inputs = make_inputs(case, device)
        expected = Expected(inputs, kind)
    except torch.OutOfMemoryError:
        yield from ((provider, _Problem("out of memory", failed=False)) for provider in providers)
        return
    for provider in providers:
        yield provider, _problem(provider, inputs, expected)


def _problem(provider: Provider, inputs: Inputs, expected: Expected) -> _Problem | None:
    try:
        wrong = check(provider, provider.call(inputs), expected)
    except torch.OutOfMemoryError:
        return _Problem("out of memory", failed=False)
    except UserError as error:
        return _Problem(f"refused: {error}", failed=False)
    except Exception as error:
        # Whatever a third-party kernel raises is a failed check of it and not the end of the run.
        return _Problem(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    return _Problem(f"wrong {wrong}") if wrong else None


def _time(
    case: Case, providers: list[Provider], device: torch.device, seconds: float, facts: Row
) -> list[Row]:
    inputs = make_inputs(case, device)
    calls = {provider.name: provider.call(inputs) for provider in providers}
    for call in calls.values():
        call.backward(call.forward())
    samples = measure(calls, device, seconds=seconds)
    copy_ms = {mode: quantiles(samples["copy"].milliseconds[mode]).q50 for mode in MODES}
    rows = []
    for provider in providers:
        call = calls[provider.name]
        peaks = {
            "forward": allocation(_forward(call), device).peak,
            "both": allocation(_both(call), device).peak,
        }
        host = _host_microseconds(provider, inputs, device, samples[provider.name])
        for mode in MODES:
            times = quantiles(samples[provider.name].milliseconds[mode])
            directions = 2 if mode == "both" else 1
            rows.append(
                {
                    "op": "rotate q and k",
                    "provider": provider.name,
                    "mode": mode,
                    "shape": results.compact(case.shape),
                    "dtype": case.dtype,
                    "profile": case.profile,
                    "ms50": number(times.q50),
                    "ms20": number(times.q20),
                    "ms80": number(times.q80),
                    "gbps": number(directions * case.minimum_bytes / times.q50 / 1e6),
                    "pct_copy": number(100 * copy_ms[mode] / times.q50),
                    "peak_mb": number(peaks["forward" if mode == "forward" else "both"] / 2**20),
                    "host_us": number(host.get(mode)),
                    **facts,
                }
            )
    return rows


def _forward(call: Call) -> Callable[[], object]:
    call.forget()
    return call.forward


def _both(call: Call) -> Callable[[], object]:
    call.forget()
    return lambda: call.backward(call.forward())


def _host_microseconds(
    provider: Provider, inputs: Inputs, device: torch.device, samples: Samples
) -> dict[str, float]:
    if device.type == "cuda":
        return {mode: quantiles(samples.host_microseconds[mode]).q50 for mode in MODES}
    if provider.compiles:
        return {}
    return fixed_microseconds(provider.call(_one_token(inputs)))


def _one_token(inputs: Inputs) -> Inputs:
    """The first token of every tensor."""
    parts = {}
    for name in ("query", "key", "grad_query", "grad_key", "sin_basis", "cos_basis", "angles"):
        tensor = getattr(inputs, name)
        parts[name] = tensor.detach()[:1].requires_grad_(tensor.requires_grad)
    return dataclasses.replace(inputs, **parts)
