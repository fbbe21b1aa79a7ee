"""The runner of Megatron-LM's own tests: what it selects, how it judges, what it reports."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch import ROOT

sys.path.insert(0, str(ROOT / "tests" / "upstream"))

import exam_plugin
import outcomes
import report
import run
import selection
from outcomes import FAILED, FAILED_WITH_ROPE_TOO, NOT_EXERCISED, PASSED, SKIPPED, STORED, Outcome

NOTHING = {"layers": 0, "rotations": 0, "states": 0, "rope": 0}


def end(test: str, outcome: str = "passed", reason: str = "", **counts: Any) -> dict[str, Any]:
    return {"test": test, "event": "end", "outcome": outcome, "reason": reason, **NOTHING, **counts}


def start(test: str) -> dict[str, Any]:
    return {"test": test, "event": "start"}


def status(*ranks: dict[str, Any] | None, position: str = "fope") -> str:
    """The status of one test from the record that each rank ended with."""
    records = [[start("t")] + ([record] if record else []) for record in ranks]
    (outcome,) = outcomes.merge(records, position)
    return outcome.status


def test_a_pass_counts_only_where_fope_rotated() -> None:
    assert status(end("t", layers=1, rotations=2)) == PASSED
    assert status(end("t", layers=1)) == NOT_EXERCISED, "layers alone prove nothing"
    assert status(end("t", layers=1, states=1)) == STORED
    assert status(end("t", layers=1, rotations=1, rope=1)) == NOT_EXERCISED, "RoPE rotated as well"
    assert status(end("t"), end("t", rotations=1)) == PASSED, "one pipeline stage may hold the attention"
    assert status(end("t", rotations=1), position="rope") == NOT_EXERCISED
    assert status(end("t", rope=1), position="rope") == PASSED


def test_every_rank_must_pass() -> None:
    passed, skipped = end("t", rotations=1), end("t", "skipped", "no GPU")
    assert status(passed, end("t", "failed", "assert 1 == 2")) == FAILED
    assert status(passed, None) == FAILED
    assert status(skipped, skipped) == SKIPPED
    assert status(skipped, passed) == PASSED


def test_the_reason_is_that_of_the_rank_that_failed_by_itself() -> None:
    ranks = [[end("t", "failed", "RuntimeError: gloo/transport: Connection closed by peer")]]
    ranks.append([end("t", "failed", "AssertionError: Mismatch")])
    (outcome,) = outcomes.merge(ranks, "fope")
    assert outcome.reason == "AssertionError: Mismatch" and not outcome.settled


def test_failures_in_the_wake_of_another_are_run_again() -> None:
    wrecked = [
        Outcome("a", PASSED),
        Outcome("b", FAILED, settled=False),
        Outcome("c", FAILED),
        Outcome("d", PASSED),
    ]
    assert [outcome.test for outcome in outcomes.trusted(wrecked)] == ["a", "b", "d"]
    settled = [replace(outcome, settled=True) for outcome in wrecked]
    assert outcomes.trusted(settled) == settled


def test_failures_are_attributed_by_the_same_test_with_rope() -> None:
    fope = [Outcome(name, FAILED, "boom") for name in "abc"] + [Outcome("d", PASSED)]
    rope = {"a": Outcome("a", FAILED, "needs CUDA"), "b": Outcome("b", PASSED)}
    a, b, c, d = outcomes.attribute(fope, rope)
    assert (a.status, a.reason) == (FAILED_WITH_ROPE_TOO, "needs CUDA")
    assert b.status == FAILED and d.status == PASSED
    assert c.status == FAILED and "not compared" in c.reason, "no comparison is no excuse"


def test_what_a_machine_lacks_is_a_skip() -> None:
    found = [
        Outcome("a", FAILED, "RuntimeError: world_size (4) is not divisible by 8"),
        Outcome("b", FAILED, "AssertionError: Mismatch in input_grad"),
        Outcome("c", FAILED, "RuntimeError: world_size (4) is not divisible by 8", settled=False),
    ]
    a, b, c = outcomes.explain(found, selection.MISSING_HERE)
    assert a.status == SKIPPED and "more ranks" in a.reason
    assert (b.status, c.status) == (FAILED, FAILED)


def test_half_written_records_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").write_text(json.dumps(start("t")) + '\n{"test": "t", "ev')
    assert outcomes.read(tmp_path) == [[start("t")]]
    (outcome,) = outcomes.merge(outcomes.read(tmp_path), "fope")
    assert outcome.status == FAILED and "did not finish" in outcome.reason


# Launching -------------------------------------------------------------------------------------------------


class FakeRunner(run.Runner):
    """Its processes are lists of records; the last one repeats."""

    def __init__(self, *launches: list[list[dict[str, Any]]], log: str = "") -> None:
        super().__init__(Path("checkout"), selection.Launch("fake", 1, ()), [], "", 60)
        self.launches, self.log, self.asked = list(launches), log, []

    def _start(self, position: str, only: list[str] | None) -> tuple[list[list[dict]], str]:
        self.asked.append(only)
        return self.launches.pop(0) if len(self.launches) > 1 else self.launches[0], self.log


def collected(*tests: str) -> list[dict[str, Any]]:
    return [{"test": test, "event": "collected"} for test in tests]


def test_a_hang_costs_one_test_and_the_rest_runs_again() -> None:
    first = [[*collected("a", "b", "c"), end("a", rotations=1), start("b")]]
    second = [[*collected("c"), end("c", rotations=1)]]
    runner = FakeRunner(first, second)
    found = {outcome.test: outcome.status for outcome in runner.run("fope")}
    assert found == {"a": PASSED, "b": FAILED, "c": PASSED}
    assert runner.asked == [None, ["c"]]


def test_what_never_runs_has_failed() -> None:
    crash = FakeRunner([[*collected("a", "b"), end("a", rotations=1)]], log="\nImportError: no such thing\n")
    a, b = crash.run("fope")
    assert a.status == PASSED
    assert b.status == FAILED and b.reason == "did not run: ImportError: no such thing"
    (nothing,) = FakeRunner([], log="SyntaxError: x").run("fope")
    assert nothing.status == FAILED and "SyntaxError" in nothing.reason


# Selection -------------------------------------------------------------------------------------------------


def checkout(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / selection.UNIT_TESTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 31\nPATCH = 7\n")
    return folder


def test_no_file_of_the_areas_is_forgotten(tmp_path: Path) -> None:
    files = [
        "transformer/test_attention.py",
        "transformer/test_rope.py",
        "transformer/test_linear_attention_v9.py",
        "transformer/test_mlp.py",
        "inference/engines/test_dynamic_engine.py",
        "inference/helpers.py",
    ]
    not_run = selection.files_not_run(checkout(tmp_path, *files))
    assert "RoPE's own module" in not_run.pop("transformer/test_rope.py")
    assert "GPU" in not_run.pop("inference/engines/test_dynamic_engine.py")
    assert not_run == {"transformer/test_linear_attention_v9.py": "not looked at yet"}


def test_parallel_sizes_among_the_parameters_say_how_many_ranks_a_test_needs() -> None:
    def needed(**parameters: Any) -> int:
        return exam_plugin._ranks_needed(SimpleNamespace(callspec=SimpleNamespace(params=parameters)))

    assert needed(src_tp_pp=(2, 1), dest_tp_pp=(1, 8), singleton=True) == 8
    assert needed(tp=4, shape=(64, 64)) == 1 and needed(src_parallel=(2, 2, 1)) == 4
    assert exam_plugin._ranks_needed(SimpleNamespace()) == 1


def test_the_selection_is_consistent() -> None:
    assert len({launch.name for launch in selection.LAUNCHES}) == len(selection.LAUNCHES)
    launched = {path for launch in selection.LAUNCHES for path in launch.files}
    assert {path for path in launched if path in selection.EXCLUDED_FILES} == set()
    assert {launch.ranks for launch in selection.LAUNCHES} >= {1, 2, 4}


# The command and its report --------------------------------------------------------------------------------


def test_the_report_counts_and_lists_everything() -> None:
    result = report.Result("attention, two ranks", 2, selected="`f.py` `-k 'not g'`")
    result.outcomes = [
        Outcome("f.py::a[1]", PASSED, rotations=3),
        Outcome("f.py::a[2]", PASSED, rotations=4),
        Outcome("f.py::b", STORED, states=2),
        Outcome("f.py::c", NOT_EXERCISED),
        Outcome("f.py::d", SKIPPED, "needs TE"),
        Outcome("f.py::e", FAILED_WITH_ROPE_TOO, "asserts CUDA"),
        Outcome("f.py::f", FAILED, "Mismatch"),
    ]
    skipped = report.Result("more", 8, not_launched="--ranks 4")
    text = report.markdown([result, skipped], {"g.py": "FP8"}, {"Megatron-LM": "0.31"})
    assert "| attention, two ranks | 2 | 2 | 1 | 1 | 1 | 1 | 1 |" in text
    assert "| more | 8 | not run: --ranks 4 |" in text and "- Megatron-LM: 0.31" in text
    assert "- `f.py::a` x 2: 2 ranks, 7 rotations" in text and "- `f.py::b`: 2 ranks, 2 states" in text
    assert "- `f.py::f`: 2 ranks, Mismatch" in text and "- FP8: `g.py`" in text
    assert "- `f.py` (1): `c`" in text and "- attention, two ranks: `f.py` `-k 'not g'`" in text
    assert "- needs TE (1): `f.py::d`" in text and "- asserts CUDA (1): `f.py::e`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1, "every row has the same cells"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on a fake checkout, whose only launch ends as given."""

    def call(records: list[dict[str, Any]], *flags: str) -> tuple[int, str]:
        folder = tmp_path / "Megatron-LM"
        if not folder.exists():
            checkout(folder, "transformer/test_attention.py")
        one = (selection.Launch("only", 1, ("transformer/test_attention.py",)),)
        monkeypatch.setattr(selection, "LAUNCHES", one)
        tests = [record["test"] for record in records]
        fake = lambda self, position, only: ([[*collected(*tests), *records]], "")  # noqa: E731
        monkeypatch.setattr(run.Runner, "_start", fake)
        monkeypatch.setattr(run, "PACKAGES", {"pytest": "pytest"})
        written = tmp_path / "report.md"
        code = run.main(["--megatron-lm", str(folder), "--report", str(written), *flags])
        return code, written.read_text()

    return call


def test_the_command_fails_only_for_what_rope_passes(command: Any) -> None:
    test = f"{run.PREFIX}transformer/test_attention.py::t"
    code, text = command([end(test, rotations=1)])
    assert code == 0 and "- `transformer/test_attention.py::t`: 1 rank, 1 rotations" in text
    assert "version 0.31.7" in text and "/path/to/Megatron-LM" in text
    code, text = command([end(test, "failed", "boom")])  # the fake fails with RoPE too
    assert code == 0 and FAILED_WITH_ROPE_TOO in text
    code, text = command([end(test, "failed", "boom")], "--position", "rope")
    assert code == 1


def test_bad_calls_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--megatron-lm", str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "nowhere" in capsys.readouterr().err
    monkeypatch.setattr(run, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(SystemExit):
        run.main(["--megatron-lm", str(checkout(tmp_path, "transformer/test_attention.py"))])
    assert "no-such-package" in capsys.readouterr().err


# One real launch -------------------------------------------------------------------------------------------

FAKE_TESTS = """
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


def attention(cls=SelfAttention):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend="nccl")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    config = TransformerConfig(**sizes, use_cpu_initialization=True)
    submodules = get_gpt_layer_with_transformer_engine_submodules().self_attention.submodules
    return cls(config, submodules, layer_number=1, attn_mask_type=AttnMaskType.causal)


def forward(module):
    angles = torch.rand(8, 1, 1, 16)
    return module(torch.rand(8, 1, 64), None, rotary_pos_emb=(angles, angles))


def test_rotates():
    assert torch.cuda.is_available()
    forward(attention())


def test_builds_only():
    attention()


def test_with_a_class_of_its_own():
    class Own(SelfAttention):
        pass

    forward(attention(Own))


def test_fope_breaks_it():
    module = attention()
    forward(module)
    assert not hasattr(module, "fope")


def test_needs_what_is_not_there():
    forward(attention())
    assert torch.ones(1).device.type == "cuda"


def test_deselected():
    raise AssertionError
"""


@pytest.mark.launch
def test_fope_cannot_be_absent_without_being_noticed(tmp_path: Path) -> None:
    """Real processes: what FoPE did is seen per test, and RoPE settles whose failure it is."""
    folder = checkout(tmp_path, "transformer/test_fake.py")
    (folder / "megatron" / "core" / "package_info.py").unlink()
    (folder / "megatron" / "core").rmdir()  # Megatron itself is the installed one
    (folder / selection.UNIT_TESTS / "transformer" / "test_fake.py").write_text(FAKE_TESTS)
    launch = selection.Launch("fake", 1, ("transformer/test_fake.py",), keep="not deselected")
    runner = run.Runner(folder, launch, list(launch.files), "", 300)
    found = runner.run("fope")
    with_rope = runner.run("rope", only=[o.test for o in found if o.status == FAILED])
    found = outcomes.attribute(found, {outcome.test: outcome for outcome in with_rope})
    assert {outcome.test.partition("::")[2]: outcome.status for outcome in found} == {
        "test_rotates": PASSED,
        "test_builds_only": NOT_EXERCISED,
        "test_with_a_class_of_its_own": NOT_EXERCISED,
        "test_fope_breaks_it": FAILED,
        "test_needs_what_is_not_there": FAILED_WITH_ROPE_TOO,
    }
    rotated, built, own, *_ = found
    assert (rotated.layers, rotated.rotations, rotated.rope) == (1, 1, 0)
    assert (built.layers, built.rotations) == (1, 0)
    assert (own.layers, own.rotations) == (0, 0) and own.rope > 0
    assert with_rope[0].test.endswith("test_fope_breaks_it") and with_rope[0].rope > 0
