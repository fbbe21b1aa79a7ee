"""What evaluations read and write besides checkpoints: data of the right vocabulary, results that last."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import ROOT
from synthetic import SyntheticCheckpoint, main

from megatron_fope.common.errors import UserError
from megatron_fope.tools.data import prepare_data
from megatron_fope.tools.evaluation import launching
from megatron_fope.tools.evaluation.progress import tokens_done

RUN = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "transformer_impl": "local",
    "padded_vocab_size": 384, "vocab_size": 256, "tokenizer_type": "NullTokenizer",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare_data(ROOT, folder / "text", include=["LICENSE"], show_progress=False)
    return folder / "text"


@pytest.fixture
def refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Both evaluations refuse in one line, before any process starts."""
    monkeypatch.setattr(launching, "_launch", lambda *_: pytest.fail("a process was started"))

    def refuse(data: Path, *flags: object, **changes: Any) -> str:
        if not (tmp_path / "model").exists():
            SyntheticCheckpoint(tmp_path / "model", **RUN | changes)
        words = ["--checkpoint", tmp_path / "model", "--data-path", data, "--lengths", 64, *flags]
        lines = []
        for command in (["evaluate-perplexity", "--tokens", 128], ["evaluate-retrieval"]):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main(*command, *words)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.count("\n") == 1, error
            lines.append(error.removeprefix("megatron-fope: error: ").rstrip())
        assert lines[0] == lines[1]
        return lines[0]

    return refuse


def dataset(prefix: Path, tokens: list[int], dtype: type) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(np.array(tokens, dtype), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path, refuse: Callable[..., str]) -> None:
    """Also where the padded vocabulary has a row for them, which nobody trained."""
    data = dataset(tmp_path / "data", [1, 300] * 200, np.int32)
    line = refuse(data)
    assert line.endswith(
        f"holds the id 300, but the tokenizer of {tmp_path}/model has 257 ids; use data of its tokenizer"
    )


def test_ids_beyond_the_vocabulary(tmp_path: Path, refuse: Callable[..., str]) -> None:
    data = dataset(tmp_path / "data", [1, 400] * 200, np.uint16)
    line = refuse(data, tokenizer_type="HuggingFaceTokenizer", vocab_size=None)
    assert f"holds the id 400, but the vocabulary of {tmp_path}/model has 384 ids" in line


def test_data_of_a_larger_tokenizer(text: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    """Its description says so, although the ids at its beginning happen to fit."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{text}{suffix}", f"{tmp_path}/data{suffix}")
    description = json.loads((tmp_path / "data.json").read_text())
    description["tokenizer"]["vocab_size"] = 50257
    (tmp_path / "data.json").write_text(json.dumps(description))
    assert "made with a tokenizer of 50257 ids, but the tokenizer" in refuse(tmp_path / "data")


@pytest.mark.parametrize(
    ("tokens", "dtype", "part"),
    [
        ([1, -3], np.int32, "which holds the id -3; use token ids >= 0"),
        ([1, 2], np.float32, "which holds float32; use data of whole numbers"),
    ],
    ids=["negative", "float"],
)
def test_numbers_that_are_no_ids(
    tokens: list[int], dtype: type, part: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    assert part in refuse(dataset(tmp_path / "data", tokens * 200, dtype))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "folder"])
def test_damaged_data(how: str, suffix: str, text: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    for end in (".bin", ".idx"):
        shutil.copy(f"{text}{end}", f"{tmp_path}/data{end}")
    file = tmp_path / f"data{suffix}"
    if how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "garbage" and suffix == ".idx":
        file.write_bytes(os.urandom(5000))
    else:
        os.truncate(file, 0 if how == "empty" else file.stat().st_size // 2)
    assert refuse(tmp_path / "data").startswith(f"--data-path is '{tmp_path}/data'")


@pytest.mark.parametrize("flag", ["--output", "--csv"])
def test_files_that_cannot_be_written(
    flag: str, text: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    for path, reason in (
        ("/dev/full", "which cannot be written (No space left on device)"),
        (tmp_path, "which cannot be written (Is a directory)"),
        (f"{text}.bin", "which this evaluation reads; use another file"),
        (tmp_path / "model" / "iter_0000004" / "new", "which this evaluation reads; use another file"),
    ):
        assert refuse(text, flag, path) == f"{flag} is '{path}', {reason}"
    one = tmp_path / "one"
    assert "--csv and --output are both" in refuse(text, "--output", one, "--csv", one)
    assert not one.exists() and Path(f"{text}.bin").stat().st_size > 1000


ROW = {"length": 64, "tokens": 128, "loss": 1.0, "perplexity": 2.75}
ROW |= {"depth": 0.0, "samples": 2, "found": 1, "accuracy": 0.275}


@pytest.mark.parametrize("command", ["evaluate-perplexity", "evaluate-retrieval"])
def test_a_later_failure_loses_nothing(
    command: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first checkpoint's numbers are printed and written when the second one fails."""
    SyntheticCheckpoint(tmp_path / "model", **RUN)

    def launch(request: launching.Request, ranks: int, bar: Any) -> Iterator[list[dict[str, Any]]]:
        yield [ROW]
        raise UserError("the second one failed")

    monkeypatch.setattr(launching, "_launch", launch)
    words = ["--data-path", text, "--lengths", 64, "--output", tmp_path / "report.json"]
    words += ["--csv", tmp_path / "report.csv", "--checkpoint", f"a={tmp_path}/model"]
    words += ["--checkpoint", f"b={tmp_path}/model"]
    words += ["--tokens", 128] if command == "evaluate-perplexity" else ["--depths", 0]
    with pytest.raises(SystemExit):
        main(command, *words)
    said = capsys.readouterr()
    assert said.err == "megatron-fope: error: the second one failed\n"
    assert "a: " in said.out and ("2.75" in said.out or "27.5" in said.out)
    assert list(json.loads((tmp_path / "report.json").read_text())["checkpoints"]) == ["a"]
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 2


def test_one_launch_for_each_layout(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report keeps the order that was asked for."""
    for name, ranks in (("a", 1), ("b", 2), ("c", 1)):
        SyntheticCheckpoint(tmp_path / name, **RUN | {"tensor_model_parallel_size": ranks})
    started = []

    def launch(request: launching.Request, ranks: int, bar: Any) -> Iterator[list[dict[str, Any]]]:
        started.append((ranks, [Path(folder).name for folder, _ in request.checkpoints]))
        yield from [[ROW]] * len(request.checkpoints)

    monkeypatch.setattr(launching, "_launch", launch)
    words = [word for name in "abc" for word in ("--checkpoint", tmp_path / name)]
    words += ["--data-path", text, "--lengths", 64, "--tokens", 128, "--output", tmp_path / "report.json"]
    main("evaluate-perplexity", *words)
    assert started == [(1, ["a", "c"]), (2, ["b"])]
    assert list(json.loads((tmp_path / "report.json").read_text())["checkpoints"]) == ["a", "b", "c"]


SLEEPER = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
(folder / "progress").write_text("70")
time.sleep(300)
"""
STARTER = """
import sys
from types import SimpleNamespace
from megatron_fope.common.command_line import command
from megatron_fope.tools.evaluation import launching
launching._WORKER = "sleeper"
with command():
    bar = SimpleNamespace(n=0, total=100, update=lambda n: None, close=lambda: None)
    for results in launching._launch(launching.Request([("a", []), ("b", [])], True, print), 2, bar):
        print(results)
"""
FAILING = """
import json, os, sys
from pathlib import Path
if os.environ["RANK"] == "0":
    Path(sys.argv[1], "0.json").write_text(json.dumps(["numbers of a"]))
    sys.exit("megatron-fope: error: b is refused")
"""


@pytest.mark.launch
def test_a_rank_that_fails(tmp_path: Path) -> None:
    """What came before is kept, however soon the failure follows; the line is the rank's."""
    (tmp_path / "sleeper.py").write_text(FAILING)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", STARTER],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == "['numbers of a']\n"
    assert done.stderr == "megatron-fope: error: b is refused\n" and done.returncode == 2


@pytest.mark.launch
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_ranks(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "pids").mkdir()
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        env={**os.environ, "PYTHONPATH": path, "PIDS": str(tmp_path / "pids")},
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    ends = time.monotonic() + 200
    while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < ends:
        time.sleep(0.1)
    ranks = [int(file.read_text()) for file in (tmp_path / "pids").iterdir()]
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == code and error.count("\n") == 1, error
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_progress(tmp_path: Path) -> None:
    import torch

    from megatron_fope.tools.evaluation import progress

    file = tmp_path / "progress"
    assert tokens_done(file) == 0
    progress.count_in(file)
    for _ in progress.counted([{"tokens": torch.zeros(2, 8)}] * 3):
        pass
    assert tokens_done(file) == 16 and progress._done == 48, "one in a fifth of a second"
