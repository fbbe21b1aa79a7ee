"""``megatron-fope evaluate-retrieval``: what checkpoints find in long contexts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.common.command_line import number, whole
from megatron_fope.common.errors import UserError
from megatron_fope.tools.data import read_sidecar
from megatron_fope.tools.evaluation import launching, plot
from megatron_fope.tools.evaluation.options import EvaluationOptions, add_flags, listed, option, options_from
from megatron_fope.tools.evaluation.prompts import TASKS, Task
from megatron_fope.tools.evaluation.retrieval import RetrievalRow, retrieval_by_length
from megatron_fope.tools.evaluation.tokens import (
    check_data,
    check_vocabulary,
    read_tokens,
    vocabulary,
)

_LENGTHS = "whole numbers, separated by commas"
_DEPTHS = "numbers from 0 to 1, separated by commas"
_TEXT_TOKENS = 4_000_000
"""How much of the data the haystacks are pieces of."""


def _ids(text: str) -> range:
    """A flag's ``type``."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal()) or int(stop) - int(first) < 2:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; allowed: FIRST:STOP, ids from FIRST to STOP - 1, at least 2"
        )
    return range(int(first), int(stop))


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(EvaluationOptions):
    """Options of :func:`evaluate_retrieval`, described by their flags' help.

    Prompts depend on the seed, the data and the task, not on layout or batch size.

    Raises:
        UserError: a number out of range.
    """

    data_path: str | Path = option(
        "the text to search, PREFIX.bin and PREFIX.idx; or a dataset of make-recall-data, which says what to "
        "ask",
        metavar="PREFIX",
    )
    task: str | None = option(
        "passkey: one marked value in a text that repeats. needle: a random key and its value in real text. "
        "recall: one of many pairs of key and value. Default: recall for make-recall-data, else needle",
        None,
        choices=TASKS,
    )
    lengths: Sequence[int] | None = option(
        "prompt lengths in tokens, answer included. Default: 1 to 16 times the first checkpoint's train "
        "length",
        None,
        type=listed(int, _LENGTHS),
        metavar="N,N,...",
    )
    depths: Sequence[float] = option(
        "where the answer stands, 0: at the beginning, 1: right before the query "
        "(default: 0,0.25,0.5,0.75,1)",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        type=listed(float, _DEPTHS),
        metavar="D,D,...",
    )
    samples: int = option("prompts per length and depth (default: 20)", 20, type=whole(), metavar="N")
    seed: int = option("of the prompts (default: 1234)", 1234, type=whole(), metavar="N")
    key_ids: range | None = option(
        "ids of keys. Default: make-recall-data's, else the data's", None, type=_ids, metavar="FIRST:STOP"
    )
    value_ids: range | None = option(
        "ids of values. Default: as for keys", None, type=_ids, metavar="FIRST:STOP"
    )
    key_tokens: int = option(
        "needle, passkey without --tokenizer: key length (default: 8)", 8, type=whole(), metavar="N"
    )
    value_tokens: int | None = option(
        "answer length (default: 5; recall: always 1)", None, type=whole(), metavar="N"
    )
    pair_fraction: float | None = option(
        "recall: part of the tokens that belongs to pairs. Default: as in the data, else 1",
        None,
        type=number(),
        metavar="F",
    )
    tokenizer: str | Path | None = option(
        "passkey: mark the value with a text and draw it from the digits; as for prepare-data",
        None,
        metavar="bytes|PATH",
    )
    marker: str = option("that text (default: %(default)r)", "The pass key is ", metavar="TEXT")

    def __post_init__(self) -> None:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UserError(f"--lengths is {list(self.lengths)}; allowed: {_LENGTHS}")
        # Also refuses NaN.
        valid = self.depths and all(0 <= depth <= 1 for depth in self.depths)
        if not valid or len(set(self.depths)) < len(self.depths):
            raise UserError(f"--depths is {list(self.depths)}; allowed: different {_DEPTHS}")
        for name in ("samples", "key_tokens", "value_tokens"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise UserError(f"--{name.replace('_', '-')} is {given}; allowed: 1 or more")
        if self.pair_fraction is not None and not 0 < self.pair_fraction <= 1:
            raise UserError(f"--pair-fraction is {self.pair_fraction}; allowed: greater than 0, at most 1")
        if (self.key_ids is None) != (self.value_ids is None):
            raise UserError("--key-ids and --value-ids: one is given without the other; use both or none")


class RetrievalReport(launching.Report[RetrievalRow]):
    """What :func:`evaluate_retrieval` returns."""

    task: str
    seed: int
    key_tokens: int
    value_tokens: int
    own_values: bool | None
    """None without recall, as the next."""
    pair_fraction: float | None
    chance: float | None
    """Accuracy of guessing one of the values; None where the data decides what they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "How often checkpoints find an answer in a long context, by length and depth: all tokens of the "
        "answer are the most likely ones. Prompts are token ids, so any tokenizer will do."
    )
    add_flags(parser, RetrievalOptions)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print tables, write what was asked for.

    Raises:
        UserError: bad input, found before any process starts; or an evaluation failed.
    """
    evaluate_retrieval(options_from(RetrievalOptions, arguments), on_result=_print_table)
    return 0


def evaluate_retrieval(
    options: RetrievalOptions, on_result: Callable[[RetrievalReport, str], None] | None = None
) -> RetrievalReport:
    """Accuracy of checkpoints at lengths and depths, in processes of their own.

    Args:
        options: what to evaluate, and where to write the results.
        on_result: called when a checkpoint is done, with the report so far and the checkpoint's label.

    Raises:
        UserError: bad input, or an evaluation failed.
    """
    check_data(options.data_path)
    if options.picture is not None:
        plot.require_matplotlib()
    task, text = task_of(options)
    infos = launching.read_checkpoints(options)
    trained = next(iter(infos.values())).train_length
    lengths = list(options.lengths or (trained * factor for factor in (1, 2, 4, 8, 16)))
    if min(lengths) < task.shortest_length:
        raise UserError(
            f"--lengths is {min(lengths)}; allowed: at least "
            f"{task.shortest_length} for this {task.name} task, in which key and value come twice"
        )
    for info in infos.values():
        _check_vocabulary(task, info)
    prefixes = {str(options.data_path), text}
    options.check_outputs(*prefixes)
    for prefix in prefixes:
        check_vocabulary(prefix, read_tokens(prefix, _TEXT_TOKENS), infos.values())
    recall = task.name == "recall"
    settings = {
        "task": task.name,
        "data_path": str(options.data_path),
        "seed": task.seed,
        "key_tokens": len(task.marker) or (1 if recall else task.key_tokens),
        "value_tokens": task.value_tokens,
        "own_values": task.own_values if recall else None,
        "pair_fraction": task.pair_fraction if recall else None,
        "chance": task.chance if task.value_ids else None,
    }
    evaluation = launching.Evaluation(
        measure=partial(
            retrieval_by_length,
            task=task,
            text_path=text,
            text_tokens=_TEXT_TOKENS,
            lengths=lengths,
            depths=list(options.depths),
            samples=options.samples,
            tokens_per_batch=options.tokens_per_batch,
        ),
        settings=settings,
        lengths=lengths,
        tokens=len(options.depths) * options.samples * sum(lengths),
        columns=settings,
        csv_rows=lambda row: [row],
        draw=partial(plot.draw_heat_maps, title=options.title or "Retrieval"),
    )
    return launching.evaluate_all(evaluation, options, infos, on_result)


def _print_table(report: RetrievalReport, label: str) -> None:
    """A checkpoint's numbers as soon as they are there: what comes later may fail."""
    one = {label: report["checkpoints"][label]}
    print(
        ("\n" if len(report["checkpoints"]) > 1 else "") + table({**report, "checkpoints": one}), flush=True
    )


def table(report: RetrievalReport) -> str:
    """Accuracy in percent as one aligned text table per checkpoint: a row per length, a column per depth."""
    blocks = []
    for label, checkpoint in report["checkpoints"].items():
        by_place = {(row["length"], row["depth"]): 100 * row["accuracy"] for row in checkpoint["results"]}
        depths = sorted({depth for _, depth in by_place})
        cells = [["length", *(f"{depth:g}" for depth in depths), "mean"]]
        for length in dict.fromkeys(length for length, _ in by_place):
            found = [by_place[length, depth] for depth in depths]
            cells.append([str(length), *(f"{value:.1f}" for value in (*found, sum(found) / len(found)))])
        title = f"{label}: {report['task']}, % of answers found, by depth"
        blocks.append(f"{title}\n{launching.aligned(cells, first=8, others=8)}")
    return "\n\n".join(blocks)


def task_of(options: RetrievalOptions) -> tuple[Task, str]:
    """What is asked, and the prefix of the text to search.

    Raises:
        UserError: options that do not fit each other or the data.
    """
    text = str(options.data_path)
    recall = (read_sidecar(text) or {}).get("recall")
    name = options.task or ("recall" if recall else "needle")
    keys, values, pair_fraction = options.key_ids, options.value_ids, options.pair_fraction
    own_values = False
    if options.tokenizer is not None and name != "passkey":
        raise UserError(f"--tokenizer is {str(options.tokenizer)!r} with --task {name}; use --task passkey")
    if name == "recall" and options.value_tokens not in (None, 1):
        raise UserError(f"--value-tokens is {options.value_tokens} with --task recall; allowed: 1")
    if recall:
        # Without a text, the tokens between the pairs of the dataset itself.
        text = recall["text"] or text
        check_data(text)
        pair_fraction = pair_fraction or recall["pair_fraction"]
        if keys is None:
            keys, values = range(*recall["key_ids"]), range(*recall["value_ids"])
            own_values = name == "recall" and bool(recall["own_values"])
    if name == "recall" and set(keys or ()) & set(values or ()):
        raise UserError("--key-ids and --value-ids have ids in common; use different ones for --task recall")
    marks: tuple[int, ...] = ()
    key_ids, value_ids = tuple(keys or ()), tuple(values or ())
    if options.tokenizer is not None:
        marks, digits = _encode_marker(options.tokenizer, options.marker)
        key_ids, value_ids = key_ids or digits, value_ids or digits
    task = Task(
        name=name,
        key_ids=key_ids,
        value_ids=value_ids,
        key_tokens=options.key_tokens,
        value_tokens=1 if name == "recall" else options.value_tokens or 5,
        marker=marks,
        own_values=own_values,
        pair_fraction=pair_fraction or 1.0,
        seed=options.seed,
    )
    return task, text


def _encode_marker(tokenizer: str | Path, marker: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the marker and of the ten digits, without what the tokenizer puts around every text."""
    from megatron_fope.tools.data.tokenizers import load_tokenizer

    encoder = load_tokenizer(tokenizer, append_eod=False)
    around = encoder.ids(b"").tolist()

    def encode(text: str) -> list[int]:
        ids = encoder.ids(text.encode()).tolist()
        while around and ids and ids[0] in around:
            ids = ids[1:]
        while around and ids and ids[-1] in around:
            ids = ids[:-1]
        return ids

    marks = encode(marker)
    if not marks:
        raise UserError(f"--marker is {marker!r}, which has no tokens; use a text that has some")
    digits = [encode(str(digit)) for digit in range(10)]
    # Some tokenizers put a token for a space in front of every text.
    last = tuple(ids[-1] for ids in digits if ids)
    if len(set(last)) < 10:
        raise UserError(
            f"--tokenizer: {tokenizer} has no token for every digit; give --key-ids and --value-ids"
        )
    return tuple(marks), last


def _check_vocabulary(task: Task, info: Checkpoint) -> None:
    """Refuse ids that a checkpoint has no embedding for; those that come from the data the worker checks."""
    size, _ = vocabulary(info.args)
    ids = (*task.key_ids, *task.value_ids, *task.marker)
    if size and ids and max(ids) >= size:
        raise UserError(
            f"the {task.name} task has id {max(ids)}; allowed: ids below {size}, the vocabulary "
            f"of {info.folder}"
        )
