"""Both evaluations of one trained checkpoint, in every kind of layout, against one rank."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Launcher
from launch import TINY_MODEL

from megatron_fope.tools.data.recall import RecallData, make_recall_data
from megatron_fope.tools.evaluation import launching
from megatron_fope.tools.evaluation.perplexity_command import (
    PerplexityOptions,
    PerplexityReport,
    evaluate_perplexity,
    position_table,
)
from megatron_fope.tools.evaluation.retrieval_command import (
    RetrievalOptions,
    RetrievalReport,
    evaluate_retrieval,
    table,
)

pytestmark = pytest.mark.launch

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor and context": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}
WORKER = "import sys; from megatron_fope.tools.evaluation import worker; worker.main({!r}); sys.exit(0)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RecallData:
    prefix = tmp_path_factory.mktemp("recall") / "recall"
    return make_recall_data(prefix, length=64, documents=300, keys=4, values=2)


@pytest.fixture(scope="module")
def checkpoint(launcher: Launcher, data: RecallData) -> Path:
    """A model that knows which values are whose, so that it finds about half of the answers."""
    folder = Path(data.train.prefix).parent
    flags = [flag for flag in TINY_MODEL if flag != "--mock-data"]
    flags += [*data.train_flags, "--data-path", data.train.prefix, "--data-cache-path", str(folder / "cache")]
    flags += ["--split", "1,0,0", "--train-iters", "60", "--lr", "1e-2", "--micro-batch-size", "8"]
    flags += ["--global-batch-size", "8", "--num-layers", "2", "--init-method-std", "0.1"]
    flags += ["--position-embedding-type", "fope", "--save", str(folder / "saved")]
    flags += ["--save-interval", "60"]
    launcher.output(1, ["--cpu", "pretrain", *flags], folder / "log")
    return folder / "saved"


@pytest.fixture(scope="module")
def another(launcher: Launcher, data: RecallData) -> Path:
    """A model that differs in all that may outlive a model in its process: shape, precision, positions."""
    folder = Path(data.train.prefix).parent
    flags = [*TINY_MODEL, *data.train_flags, "--num-layers", "3", "--bf16", "--save-interval", "3"]
    flags += ["--position-embedding-type", "rope", "--normalization", "LayerNorm", "--seq-length", "32"]
    launcher.output(1, ["--cpu", "pretrain", *flags, "--save", str(folder / "another")], folder / "log")
    return folder / "another"


@pytest.fixture
def forked(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Workers are forks, which are quicker than torchrun; the number of ranks of each launch."""
    started = []

    def launch(request: launching.Request, num_ranks: int, bar: Any) -> Iterator[list[dict[str, Any]]]:
        started.append(num_ranks)
        folder = tmp_path / f"ranks{len(started)}"
        folder.mkdir()
        (folder / "request").write_bytes(pickle.dumps(request))
        launcher.output(num_ranks, [], tmp_path / "log", hook=WORKER.format(str(folder)))
        for number in range(len(request.checkpoints)):
            yield json.loads((folder / f"{number}.json").read_text())

    monkeypatch.setattr(launching, "_launch", launch)
    return started


def test_retrieval(checkpoint: Path, data: RecallData, forked: list[int], tmp_path: Path) -> None:
    """What is found does not depend on layout or batch size, and the files hold what is returned."""

    def run(tokens_per_batch: int, **options: Any) -> RetrievalReport:
        options |= {"checkpoints": {"FoPE": checkpoint}, "data_path": data.train.prefix, "cpu": True}
        options |= {"lengths": [64, 128], "depths": [0.0, 1.0], "samples": 40}
        return evaluate_retrieval(RetrievalOptions(tokens_per_batch=tokens_per_batch, **options))

    files = {"output": tmp_path / "r.json", "csv": tmp_path / "r.csv", "picture": tmp_path / "r.png"}
    one = run(700, **files)
    found = [row["found"] for row in one["checkpoints"]["FoPE"]["results"]]
    assert one["task"] == "recall" and one["chance"] == 0.5
    assert all(5 < number < 40 for number in found[:2]), "neither nothing nor everything: layouts can differ"
    for name, layout in LAYOUTS.items():
        rows = run(64 * 64, **layout)["checkpoints"]["FoPE"]["results"]
        # Sums in another order may turn an answer that is a toss-up.
        assert [row["found"] for row in rows] == pytest.approx(found, abs=1), name
    assert forked == [1, 2, 2, 2, 4]

    assert json.loads(files["output"].read_text()) == one
    assert files["picture"].stat().st_size > 5_000
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["found"]) for row in rows] == found
    assert rows[0]["task"] == "recall" and rows[0]["checkpoint"] == "FoPE" and rows[-1]["length"] == "128"
    assert f"{100 * found[0] / 40:.1f}" in table(one).splitlines()[2]


def test_perplexity_by_position(
    checkpoint: Path, data: RecallData, forked: list[int], tmp_path: Path
) -> None:
    def run(**options: Any) -> PerplexityReport:
        options |= {"checkpoints": {"FoPE": checkpoint}, "data_path": data.train.prefix, "cpu": True}
        options |= {"lengths": [64, 128], "tokens": 3000, "tokens_per_batch": 700}
        return evaluate_perplexity(PerplexityOptions(by_position=5, **options))

    files = {"csv": tmp_path / "p.csv", "picture": tmp_path / "p.png"}
    one = run(**files)
    results = one["checkpoints"]["FoPE"]["results"]
    for row in results:
        parts = row["by_position"]
        assert parts[0]["start"] == 0 and parts[-1]["stop"] == row["length"]
        assert [part["start"] for part in parts[1:]] == [part["stop"] for part in parts[:-1]]
        assert sum(part["tokens"] for part in parts) == row["tokens"]
        mean = sum(part["loss"] * part["tokens"] for part in parts) / row["tokens"]
        assert mean == pytest.approx(row["loss"], abs=1e-9)
    # Documents end with the window, so the first token of each is seen, and later ones repeat what was known.
    first, *_, last = (part["loss"] for part in results[0]["by_position"])
    assert abs(first - last) > 0.01, "layouts that mix up positions must show"
    for name, layout in LAYOUTS.items():
        for row, expected in zip(run(**layout)["checkpoints"]["FoPE"]["results"], results, strict=True):
            losses = [part["loss"] for part in row["by_position"]]
            assert losses == pytest.approx([part["loss"] for part in expected["by_position"]], abs=1e-4), name
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 and float(rows[0]["loss"]) == results[0]["loss"]
    assert files["picture"].stat().st_size > 10_000
    assert "104-127" not in position_table(one) and "103-127" in position_table(one)


@pytest.mark.parametrize("layout", [{}, LAYOUTS["tensor"]], ids=["one rank", "tensor"])
def test_one_launch_finds_what_one_for_each_finds(
    layout: dict[str, int], checkpoint: Path, another: Path, data: RecallData, forked: list[int]
) -> None:
    """To every digit, whichever model came before."""
    folders = {"first": another, "second": checkpoint, "third": another}

    def results(labels: list[str]) -> list[list[Any]]:
        common: dict[str, Any] = {"checkpoints": {label: folders[label] for label in labels}, "cpu": True}
        common |= {"data_path": data.train.prefix, "lengths": [64, 128], "tokens_per_batch": 700, **layout}
        text = evaluate_perplexity(PerplexityOptions(tokens=3000, by_position=5, **common))
        found = evaluate_retrieval(RetrievalOptions(samples=10, depths=[0.0, 1.0], **common))
        assert list(text["checkpoints"]) == list(found["checkpoints"]) == labels
        return [text["checkpoints"][x]["results"] + found["checkpoints"][x]["results"] for x in labels]

    together = results(["first", "second", "third"])
    ranks = 2 if layout else 1
    assert forked == [ranks, ranks]
    first, second = (results([label])[0] for label in ("first", "second"))
    assert together == [first, second, first] and first != second
