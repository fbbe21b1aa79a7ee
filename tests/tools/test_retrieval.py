"""Retrieval prompts, what counts as found, and the data that teaches recall."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fope.common.errors import UserError
from megatron_fope.tools import cli
from megatron_fope.tools.data import prepare_data, read_sidecar
from megatron_fope.tools.data.recall import make_recall_data
from megatron_fope.tools.evaluation import launching
from megatron_fope.tools.evaluation.options import EvaluationOptions
from megatron_fope.tools.evaluation.perplexity import sum_by_bucket
from megatron_fope.tools.evaluation.prompts import Task
from megatron_fope.tools.evaluation.retrieval import count_hits, prompt_batches
from megatron_fope.tools.evaluation.retrieval_command import RetrievalOptions, task_of

TEXT = np.random.default_rng(0).integers(100, size=5000)
VOCAB = 200
KEYS, VALUES = tuple(range(100, 108)), tuple(range(120, 152))
DEPTHS = [0.0, 0.5, 1.0]
TASKS = {
    "passkey": Task("passkey", KEYS, VALUES, key_tokens=3, value_tokens=4),
    "marked passkey": Task("passkey", KEYS, VALUES, key_tokens=8, value_tokens=2, marker=(150, 160)),
    "needle": Task("needle", tuple(range(100)), VALUES, key_tokens=6, value_tokens=3),
    "recall": Task("recall", KEYS, VALUES, key_tokens=1, value_tokens=1, pair_fraction=0.5),
    "recall, pairs only": Task("recall", KEYS, VALUES, key_tokens=1, value_tokens=1),
    "recall, own values": Task(
        "recall", KEYS, VALUES, key_tokens=1, value_tokens=1, pair_fraction=0.3, own_values=True
    ),
}


def occurrences(tokens: np.ndarray, part: np.ndarray) -> list[int]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return np.flatnonzero((windows == part).all(axis=1)).tolist()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [40, 41, 300])
@pytest.mark.parametrize("name", TASKS)
def test_prompt_asks_for_what_stands_at_its_depth(name: str, length: int, depth: float) -> None:
    task = TASKS[name]
    tokens, answer = task.prompt(TEXT, length, depth, 0)
    width = {"passkey": 3, "marked passkey": 2, "needle": 6}.get(name, 1)
    assert tokens.shape == (length,) and tokens.dtype == np.int64
    assert (answer.start, answer.stop) == (length - task.value_tokens, length)
    query = tokens[answer.start - width : answer.start]
    room = length - 2 * (width + task.value_tokens)
    first, last = occurrences(tokens, query)
    assert last == answer.start - width
    assert first == round(depth * room)
    assert (tokens[first + width :][: task.value_tokens] == tokens[answer]).all()
    assert set(tokens[answer]) <= set(VALUES)
    if task.name != "passkey":
        other, _ = task.prompt(TEXT, length, depth, 1)
        assert (other != tokens).any()


def test_text_of_a_needle_is_a_piece_of_the_haystack() -> None:
    task = Task("needle", KEYS, VALUES, key_tokens=2, value_tokens=5)
    tokens, _ = task.prompt(np.arange(50), 60, 0.0, 0)
    text = tokens[7:-7]
    assert ((text[1:] - text[:-1]) % 50 == 1).all(), "consecutive, in a circle"


def test_passkey_repeats_its_filler() -> None:
    task = Task("passkey", (), VALUES, key_tokens=8, value_tokens=1, marker=(9, 9))
    tokens, _ = task.prompt(np.array([1, 2, 3]), 30, 1.0, 0)
    assert tokens[:24].tolist() == [1, 2, 3] * 8


def test_pairs_of_recall() -> None:
    """Every key always has one value, in between stands text, and the share of pairs is as asked."""
    tokens, _ = TASKS["recall"].prompt(TEXT, 404, 0.5, 3)
    at = np.flatnonzero(np.isin(tokens, KEYS))
    values = {int(key): set(tokens[at[tokens[at] == key] + 1]) for key in tokens[at]}
    assert all(len(of_key) == 1 for of_key in values.values()) and len(values) == len(KEYS)
    assert len(at) == 404 // 4 + 1
    assert np.isin(tokens, TEXT).sum() == 404 - 2 * len(at)


def test_own_values_name_their_key() -> None:
    for sample in range(20):
        tokens, answer = TASKS["recall, own values"].prompt(TEXT, 64, 0.5, sample)
        key, value = int(tokens[-2]), int(tokens[answer][0])
        assert (value - VALUES[0]) // 4 == key - KEYS[0]
    assert TASKS["recall, own values"].chance == 1 / 4


def test_prompts_do_not_depend_on_batches_or_on_other_prompts() -> None:
    def collect(size: int, count: int, first: int = 0) -> torch.Tensor:
        batches = prompt_batches(TASKS["needle"], TEXT, 80, DEPTHS, 4, first, size, count)
        return torch.cat([batch["tokens"] for batch in batches])

    whole = collect(12, 1)
    assert torch.equal(collect(1, 12), whole) and torch.equal(collect(3, 2, first=6), whole[6:])
    assert len({tuple(row) for row in whole.tolist()}) == 12


def oracle(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Logits of a model that, after tokens that stood together before, expects what followed them."""
    logits = torch.zeros(*tokens.shape, VOCAB)
    for row, sequence in enumerate(tokens.tolist()):
        seen: dict[tuple[int, ...], int] = {}
        for place in range(width - 1, len(sequence)):
            known = tuple(sequence[place - width + 1 : place + 1])
            if known in seen:
                logits[row, place, seen[known]] = 1.0
            if place + 1 < len(sequence):
                seen.setdefault(known, sequence[place + 1])
    return logits


def found(
    task: Task, model: Callable[[torch.Tensor], torch.Tensor], samples: int, cut: Any = None
) -> list[int]:
    """Answers found per depth, over batches of 5 and one of 2; ``cut``: columns of each rank."""
    num_prompts = len(DEPTHS) * samples
    hits = torch.zeros(num_prompts, task.value_tokens, dtype=torch.float64)
    full, rest = divmod(num_prompts, 5)
    for first, size, count in ((0, 5, full), (5 * full, rest, 1))[: 2 if rest else 1]:
        for batch in prompt_batches(task, TEXT, 64, DEPTHS, samples, first, size, count):
            logits = model(batch["tokens"])
            for columns in cut or [slice(None)]:
                part = {key: value[:, columns] for key, value in batch.items()}
                hits += count_hits(
                    logits[:, columns], part, shape=tuple(hits.shape), argmax=lambda x: x.argmax(-1)
                )
    return (hits == 1).all(dim=1).view(len(DEPTHS), samples).sum(dim=1).tolist()


ZIGZAG = [torch.cat([torch.arange(16), torch.arange(48, 64)]), torch.arange(16, 48)]


@pytest.mark.parametrize("cut", [None, ZIGZAG], ids=["one rank", "context parallel"])
@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_looks_back_finds_everything(name: str, cut: Any) -> None:
    width = {"passkey": 3, "marked passkey": 2, "needle": 3}.get(name, 1)
    assert found(TASKS[name], lambda tokens: oracle(tokens, width), 9, cut) == [9, 9, 9]


def test_a_constant_model_finds_as_much_as_chance() -> None:
    def constant(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., VALUES[3]] = 1.0
        return logits

    total = sum(found(TASKS["recall"], constant, 400))
    assert total / 1200 == pytest.approx(TASKS["recall"].chance, abs=0.02)
    assert sum(found(TASKS["needle"], constant, 100)) == 0, (
        "three tokens of an answer are seldom all the same"
    )


def test_one_wrong_token_is_a_wrong_answer() -> None:
    def nearly(tokens: torch.Tensor) -> torch.Tensor:
        logits = oracle(tokens, 3)
        logits[0, -3:-2] = 0.0
        return logits

    # The first prompt of each batch of 5 (and of 2) misses one token of its answer.
    assert sum(found(TASKS["needle"], nearly, 9)) == 27 - 6


def test_buckets_of_positions() -> None:
    """Also where a rank holds the first and the last quarter of a window, and where ranges differ in size."""
    losses = torch.rand(3, 64)
    positions = torch.arange(64).expand(3, 64)
    whole = sum_by_bucket(losses, {"position_ids": positions}, length=64, buckets=5)
    parts = [
        sum_by_bucket(losses[:, columns], {"position_ids": positions[:, columns]}, length=64, buckets=5)
        for columns in ZIGZAG
    ]
    edges = [0, 13, 26, 39, 52, 64]
    expected = [losses[:, a:b].double().sum() for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(whole, torch.stack(expected))
    torch.testing.assert_close(sum(parts), whole)


def recall(**changes: Any) -> tuple[np.ndarray, slice]:
    return dataclasses.replace(TASKS["recall, pairs only"], **changes).prompt(TEXT, 64, 0.5, 0)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: TASKS["needle"].prompt(TEXT, 17, 0.5, 0), "--lengths is 17; allowed: at least 18"),
        (lambda: TASKS["needle"].prompt(TEXT, 64, 1.5, 0), "--depths is 1.5; allowed: numbers from 0 to 1"),
        (lambda: recall(key_ids=(5,)), "the keys are 1 different ids"),
        (lambda: recall(value_ids=(7,)), "the values are 1 different ids"),
        (lambda: recall(value_ids=VALUES[:15], own_values=True), "the values are 15 ids for 8 keys"),
        (
            lambda: Task("needle", (1, 2), (1, 2), key_tokens=1, value_tokens=5).prompt(
                np.array([1, 2] * 50), 64, 0.5, 0
            ),
            "--key-tokens is 1 with 2 key ids: the data holds every key",
        ),
    ],
)
def test_prompts_that_cannot_be_built(call: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value).startswith(line)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("Some text to stand between pairs, and then some more of it. " * 20)
    return prepare_data(folder / "a.txt", folder / "text", show_progress=False).train.prefix


def documents(prefix: str) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [np.array(document) for document in IndexedDataset(prefix)]


def test_recall_data(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command writes: documents of one length, keys with a value each, text between them."""
    prefix = str(tmp_path / "recall")
    argv = [
        "make-recall-data",
        "--length",
        "64",
        "--keys",
        "4",
        "--values",
        "3",
        "--text",
        text,
        "--seed",
        "7",
    ]
    assert cli.main([*argv, "--output-prefix", prefix, "--documents", "20"]) == 0
    assert "ids 257-260 are keys, 261-272 values" in capsys.readouterr().out
    sidecar = read_sidecar(prefix)
    assert sidecar["recall"]["key_ids"] == [257, 261] and sidecar["recall"]["value_ids"] == [261, 273]
    vocabulary = int(sidecar["train_flags"][-1])
    assert 273 <= vocabulary <= 274
    rows = documents(prefix)
    assert len(rows) == 20 and {len(row) for row in rows} == {64}
    learnt = set()
    for row in rows:
        at = np.flatnonzero((row >= 257) & (row < 261))
        assert len(at) == 16
        pairs = {(int(row[i]), int(row[i + 1])) for i in at}
        assert len({key for key, _ in pairs}) == len(pairs), "one value per key in a document"
        assert all((value - 261) // 3 == key - 257 for key, value in pairs)
        assert (row < 257).sum() == 32
        learnt |= pairs
    assert len(learnt) == 12, "another value in another document"
    # A document depends on the seed and its number, not on how many there are.
    again = make_recall_data(
        tmp_path / "again", length=64, documents=5, text=text, keys=4, values=3, seed=7
    ).train.prefix
    assert all((a == b).all() for a, b in zip(documents(again), rows, strict=False))
    other = make_recall_data(
        tmp_path / "other", length=64, documents=5, text=text, keys=4, values=3, seed=8
    ).train.prefix
    assert any((a != b).any() for a, b in zip(documents(other), rows, strict=False))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def refused(argv: list[str], *parts: str) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("megatron-fope: error: ") and all(part in lines[0] for part in parts), (
            lines
        )

    return refused


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--length 4", "--length is 4; allowed: 8 or more"),
        ("--documents 0", "--documents is 0; allowed: 1 or more"),
        ("--keys 1", "--keys is 1; allowed: 2 or more"),
        ("--values 1", "--values is 1; allowed: 2 or more"),
        ("--pair-fraction 1.5", "--pair-fraction is 1.5; allowed: greater than 0, at most 1"),
        ("--keys 20", "--keys is 20; allowed: at most 8"),
        ("--text {folder}/no", "--text: '{folder}/no' given; {folder}/no.bin does not exist"),
        ("--text {folder}/there", "--text is '{folder}/there', which does not say what its ids mean"),
        ("--output-prefix {folder}/there", "--output-prefix: {folder}/there.bin exists"),
    ],
)
def test_bad_recall_data(flags: str, line: str, tmp_path: Path, refused: Callable[..., None]) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"there.{suffix}").touch()
    argv = f"make-recall-data --output-prefix {tmp_path}/new --length 64 --documents 2 {flags}"
    refused(argv.format(folder=tmp_path).split(), line.format(folder=tmp_path))
    assert not list(tmp_path.glob("*new*"))


STORED = {
    "seq_length": 64,
    "padded_vocab_size": 384,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": True,
    "ckpt_format": "torch_dist",
    "position_embedding_type": "fope",
}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lengths 8", "--lengths is 8; allowed: at least 26 for this needle task"),
        ("--lengths 0", "--lengths is [0]; allowed: whole numbers"),
        ("--lengths long", "--lengths is 'long'; allowed: whole numbers"),
        (
            "--lengths 67",
            "--lengths is 67; allowed: multiples of 2 with sequence parallelism over 2 ranks",
        ),
        (
            "--lengths 68 --context-parallel-size 2",
            "--lengths is 68; allowed: multiples of 8 with --context-parallel-size 2 and sequence "
            "parallelism over 2 ranks",
        ),
        (
            "--lengths 66 --context-parallel-size 2 --tensor-model-parallel-size 1",
            "--lengths is 66; allowed: multiples of 4 with --context-parallel-size 2",
        ),
        ("--context-parallel-size 0", "--context-parallel-size is 0; allowed: 1 or more"),
        ("--tensor-model-parallel-size 5", "--tensor-model-parallel-size is 5; allowed: divisors of 384"),
        ("--depths 0,2", "--depths is [0.0, 2.0]; allowed: different numbers from 0 to 1"),
        ("--depths 0,0", "--depths is [0.0, 0.0]; allowed: different numbers from 0 to 1"),
        ("--depths deep", "--depths is 'deep'; allowed: numbers from 0 to 1"),
        ("--samples 0", "--samples is 0; allowed: 1 or more"),
        ("--key-ids 5 --value-ids 0:9", "--key-ids is '5'; allowed: FIRST:STOP"),
        ("--key-ids 0:9", "--key-ids and --value-ids: one is given without the other"),
        ("--key-ids 0:500 --value-ids 0:9", "the needle task has id 499; allowed: ids below 384"),
        ("--task recall --key-ids 0:9 --value-ids 8:20", "--key-ids and --value-ids have ids in common"),
        ("--task recall --value-tokens 2", "--value-tokens is 2 with --task recall; allowed: 1"),
        ("--tokenizer bytes", "--tokenizer is 'bytes' with --task needle; use --task passkey"),
        ("--task passkey --tokenizer nothing", "--tokenizer: 'nothing' is neither 'bytes' nor an existing"),
        ("--task passkey --tokenizer bytes --marker=", "--marker is '', which has no tokens"),
        ("--data-path nowhere", "--data-path is 'nowhere': nowhere.bin does not exist"),
        ("--checkpoint b/c", "--checkpoint has the labels c, c"),
    ],
)
def test_bad_evaluation(
    flags: str, line: str, text: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before any process starts."""
    from megatron_fope.checkpoint.reader import Checkpoint

    monkeypatch.setattr(
        launching,
        "open_checkpoint",
        lambda folder, name: Checkpoint(folder, 1, folder, {}, {"args": SimpleNamespace(**STORED)}),
    )
    monkeypatch.setattr(launching, "_launch", lambda *_: pytest.fail("a process was started"))
    argv = f"--cpu evaluate-retrieval --checkpoint a/c --data-path {text} {flags}"
    refused(argv.split(), line)


def test_not_a_checkpoint(text: str, tmp_path: Path, refused: Callable[..., None]) -> None:
    argv = ["evaluate-retrieval", "--checkpoint", str(tmp_path), "--data-path", text]
    refused(argv, f"--checkpoint is '{tmp_path}'", "a folder made by --save")


def test_legacy_checkpoint_keeps_its_layout() -> None:
    info = SimpleNamespace(
        folder="x", format="torch", args=SimpleNamespace(**STORED | {"ckpt_format": "torch"})
    )

    def sizes(**layout: int) -> tuple[int, int, int]:
        return EvaluationOptions(checkpoints={}, data_path="", **layout).parallel_sizes(info)

    assert sizes(context_parallel_size=2) == (2, 1, 2)
    with pytest.raises(UserError, match=r"^--tensor-model-parallel-size is 1, but x was saved with 2"):
        sizes(tensor_model_parallel_size=1)


def test_marker_and_digits_of_a_tokenizer(text: str) -> None:
    options = RetrievalOptions(
        checkpoints={}, data_path=text, task="passkey", tokenizer="bytes", marker="key: "
    )
    task, _ = task_of(options)
    assert bytes(task.marker) == b"key: " and bytes(task.value_ids) == b"0123456789"
    tokens, answer = task.prompt(np.frombuffer(b"Grass is green. ", np.uint8), 60, 0.5, 0)
    assert (
        bytes(tokens[answer.start - 5 :].tolist()).startswith(b"key: ")
        and bytes(tokens[answer].tolist()).isdigit()
    )
