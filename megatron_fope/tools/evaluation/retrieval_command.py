"""``megatron-fope evaluate-retrieval``: what checkpoints find in long contexts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_fope.checkpoint.reader import Checkpoint
from megatron_fope.common.command_line import number, whole
from megatron_fope.common.errors import UserError
from megatron_fope.tools.data import read_sidecar
from megatron_fope.tools.evaluation import launching
from megatron_fope.tools.evaluation.launching import Layout
from megatron_fope.tools.evaluation.retrieval import TASKS, Task
from megatron_fope.tools.evaluation.tokens import (
    DATA_FILES,
    check_data,
    check_vocabulary,
    read_tokens,
    vocabulary,
)

_LENGTHS = "whole numbers, separated by commas"
_DEPTHS = "numbers from 0 to 1, separated by commas"
_IDS = "FIRST:STOP, ids from FIRST to STOP - 1, at least 2"
_MARKER = "The pass key is "
_TEXT_TOKENS = 4_000_000
"""How much of the data the haystacks are pieces of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "How often checkpoints find an answer in a long context, by length and depth: all tokens of the "
        "answer are the most likely ones. Prompts are token ids, so any tokenizer will do."
    )
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="the text to search, PREFIX.bin and PREFIX.idx; or a dataset of make-recall-data, which says "
        "what to ask",
    )
    add(
        "--task",
        choices=TASKS,
        help="passkey: one marked value in a text that repeats. needle: a random key and its value in real "
        "text. recall: one of many pairs of key and value. Default: recall for make-recall-data, else needle",
    )
    add(
        "--lengths",
        metavar="N,N,...",
        help="prompt lengths in tokens, answer included. Default: 1 to 16 times the first checkpoint's train "
        "length",
    )
    add(
        "--depths",
        default="0,0.25,0.5,0.75,1",
        metavar="D,D,...",
        help="where the answer stands, 0: at the beginning, 1: right before the query (default: %(default)s)",
    )
    add("--samples", type=whole(), default=20, metavar="N", help="prompts per length and depth (default: 20)")
    add("--seed", type=whole(), default=1234, metavar="N", help="of the prompts (default: 1234)")
    add("--key-ids", metavar="FIRST:STOP", help="ids of keys. Default: make-recall-data's, else the data's")
    add("--value-ids", metavar="FIRST:STOP", help="ids of values. Default: as for keys")
    add("--key-tokens", type=whole(), default=8, metavar="N", help="needle, passkey: key length (default: 8)")
    add("--value-tokens", type=whole(), metavar="N", help="answer length (default: 5; recall: always 1)")
    add(
        "--pair-fraction", type=number(), metavar="F", help="recall: part of the tokens that belongs to pairs"
    )
    add(
        "--tokenizer",
        metavar="bytes|PATH",
        help="passkey: mark the value with a text and draw it from the digits; as for prepare-data",
    )
    add("--marker", default=_MARKER, metavar="TEXT", help=f"that text (default: {_MARKER!r})")
    launching.add_arguments(parser, title="Retrieval")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, write what was asked for.

    Raises:
        UserError: bad input, found before any process starts; or an evaluation failed.
    """
    options = launching.common_options(arguments)
    lengths = arguments.lengths
    evaluate_retrieval(
        options.pop("checkpoints"),
        arguments.data_path,
        task=arguments.task,
        lengths=None if lengths is None else launching.parse_list("--lengths", lengths, int, _LENGTHS),
        depths=launching.parse_list("--depths", arguments.depths, float, _DEPTHS),
        samples=arguments.samples,
        seed=arguments.seed,
        key_ids=_ids("--key-ids", arguments.key_ids),
        value_ids=_ids("--value-ids", arguments.value_ids),
        key_tokens=arguments.key_tokens,
        value_tokens=arguments.value_tokens,
        pair_fraction=arguments.pair_fraction,
        tokenizer=arguments.tokenizer,
        marker=arguments.marker,
        on_result=_print_table,
        **options,
    )
    return 0


def evaluate_retrieval(
    checkpoints: dict[str, str | Path],
    data_path: str | Path,
    *,
    task: str | None = None,
    lengths: list[int] | None = None,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    seed: int = 1234,
    key_ids: range | None = None,
    value_ids: range | None = None,
    key_tokens: int = 8,
    value_tokens: int | None = None,
    pair_fraction: float | None = None,
    tokenizer: str | Path | None = None,
    marker: str = _MARKER,
    tokens_per_batch: int = 4096,
    layout: Layout | None = None,
    cpu: bool = False,
    megatron_flags: list[str] | None = None,
    output: str | Path | None = None,
    csv_file: str | Path | None = None,
    picture: str | Path | None = None,
    title: str = "Retrieval",
    on_result: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of checkpoints at lengths and depths; each runs in processes of its own.

    Args:
        checkpoints: ``{label: folder}``.
        data_path: prefix of a ``.bin``/``.idx`` pair: the text to search, or a dataset of
            ``make-recall-data``, whose pairs and text are then asked for.
        task: ``passkey``, ``needle`` or ``recall``, see :mod:`megatron_fope.tools.evaluation.prompts`; None:
            ``recall`` for a dataset of ``make-recall-data``, else ``needle``.
        lengths: prompt lengths in tokens; None: 1 to 16 times the first checkpoint's train length.
        depths: each 0 to 1.
        samples: prompts per length and depth.
        seed: of the prompts, which depend on it, the data and the task, not on layout or batch size.
        key_ids: ids of keys; None: the data's.
        value_ids: ids of values; None: the data's.
        key_tokens: length of a needle's key and of a passkey's marker without a tokenizer.
        value_tokens: length of the answer; None: 5. Recall: always 1.
        pair_fraction: recall: part of the tokens that belongs to pairs; None: as in the data, else 1.
        tokenizer: passkey: encodes ``marker``, and the digits that values are drawn from.
        marker: text in front of a passkey.
        tokens_per_batch: tokens in one forward pass, at least a prompt.
        layout: parallel sizes; None: the checkpoint's TP and PP.
        cpu: run on the CPU with gloo.
        megatron_flags: further flags for Megatron.
        output: JSON file to write, after every checkpoint with those that are done.
        csv_file: CSV file to write, likewise: a row per checkpoint, length and depth, with all settings.
        picture: PNG file with a heat map per checkpoint.
        title: the picture's title.
        on_result: called when a checkpoint is done, with the report so far and the checkpoint's label.

    Returns:
        ``{"task", "data_path", "seed", ..., "version", "checkpoints": {label: {"folder", "iteration",
        "position_embedding_type", "train_length", "results": [{"length", "depth", "samples", "found",
        "accuracy"}]}}}``; ``chance`` is the accuracy of guessing one of the values, None where the data
        decides what they are.

    Raises:
        UserError: bad input, or an evaluation failed.
    """
    depths = list(depths)
    _check(lengths, depths, samples, key_tokens, value_tokens, pair_fraction)
    check_data(data_path)
    if picture is not None:
        from megatron_fope.tools.evaluation import plot

        plot.require_matplotlib()
    asked, text = _task(
        data_path, task, seed, key_ids, value_ids, key_tokens, value_tokens, pair_fraction, tokenizer, marker
    )
    infos = launching.read_checkpoints(checkpoints)
    if lengths is None:
        trained = next(iter(infos.values())).train_length
        lengths = [trained * factor for factor in (1, 2, 4, 8, 16)]
    if min(lengths) < asked.shortest_length:
        raise UserError(
            f"--lengths is {min(lengths)}; allowed: at least "
            f"{asked.shortest_length} for this {asked.name} task, in which key and value come twice"
        )
    for info in infos.values():
        _check_vocabulary(asked, info)
    outputs = {"--output": output, "--csv": csv_file, "--picture": picture}
    prefixes = {str(data_path), text}
    files = [f"{prefix}.{end}" for prefix in prefixes for end in DATA_FILES]
    launching.check_outputs(outputs, [*files, *checkpoints.values()])
    for prefix in prefixes:
        check_vocabulary(prefix, read_tokens(prefix, _TEXT_TOKENS), infos.values())
    settings = {
        "task": asked.name,
        "data_path": str(data_path),
        "seed": seed,
        "key_tokens": len(asked.marker) or (1 if asked.name == "recall" else key_tokens),
        "value_tokens": asked.value_tokens,
        "own_values": asked.own_values if asked.name == "recall" else None,
        "pair_fraction": asked.pair_fraction if asked.name == "recall" else None,
        "chance": asked.chance if asked.value_ids else None,
    }
    request = {
        "kind": "retrieval",
        "task": {field: getattr(asked, field) for field in Task.__dataclass_fields__},
        "text": text,
        "text_tokens": _TEXT_TOKENS,
        "lengths": lengths,
        "depths": depths,
        "samples": samples,
        "tokens_per_batch": tokens_per_batch,
    }

    def finished(report: dict[str, Any], label: str) -> None:
        if on_result is not None:
            on_result(report, label)
        if output is not None:
            launching.write_json(report, output)
        if csv_file is not None:
            rows = [
                launching.identity(label, checkpoint) | settings | row
                for label, checkpoint in report["checkpoints"].items()
                for row in checkpoint["results"]
            ]
            launching.write_csv(rows, csv_file)

    report = launching.evaluate_all(
        request,
        settings,
        infos,
        layout or Layout(),
        cpu,
        megatron_flags or [],
        tokens=len(depths) * samples * sum(lengths),
        finished=finished,
    )
    if picture is not None:
        plot.draw_heat_maps(report, picture, title)
    return report


def _print_table(report: dict[str, Any], label: str) -> None:
    """A checkpoint's numbers as soon as they are there: what comes later may fail."""
    one = {label: report["checkpoints"][label]}
    print(("\n" if len(report["checkpoints"]) > 1 else "") + table(report | {"checkpoints": one}), flush=True)


def table(report: dict[str, Any]) -> str:
    """Accuracy in percent as one aligned text table per checkpoint: a row per length, a column per depth."""
    blocks = []
    for label, checkpoint in report["checkpoints"].items():
        rows = checkpoint["results"]
        depths = sorted({row["depth"] for row in rows})
        by_place = {(row["length"], row["depth"]): row["accuracy"] for row in rows}
        head = "length".rjust(8) + "".join(f"{depth:g}".rjust(8) for depth in depths) + "mean".rjust(8)
        lines = [f"{label}: {report['task']}, % of answers found, by depth", head]
        for length in dict.fromkeys(row["length"] for row in rows):
            found = [by_place[length, depth] for depth in depths]
            cells = "".join(f"{100 * value:.1f}".rjust(8) for value in (*found, sum(found) / len(found)))
            lines.append(str(length).rjust(8) + cells)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _task(
    data_path: str | Path,
    name: str | None,
    seed: int,
    key_ids: range | None,
    value_ids: range | None,
    key_tokens: int,
    value_tokens: int | None,
    pair_fraction: float | None,
    tokenizer: str | Path | None,
    marker: str,
) -> tuple[Task, str]:
    """What is asked, and the prefix of the text to search."""
    recall = (read_sidecar(data_path) or {}).get("recall")
    name = name or ("recall" if recall else "needle")
    given_ids = key_ids is not None
    if (key_ids is None) != (value_ids is None):
        raise UserError("--key-ids and --value-ids: one is given without the other; use both or none")
    if tokenizer is not None and name != "passkey":
        raise UserError(f"--tokenizer is {str(tokenizer)!r} with --task {name}; use --task passkey")
    if name == "recall" and value_tokens not in (None, 1):
        raise UserError(f"--value-tokens is {value_tokens} with --task recall; allowed: 1")
    text = str(data_path)
    if recall:
        # Without a text, the tokens between the pairs of the dataset itself.
        text = recall["text"] or text
        check_data(text)
        pair_fraction = recall["pair_fraction"] if pair_fraction is None else pair_fraction
        if key_ids is None:
            key_ids, value_ids = range(*recall["key_ids"]), range(*recall["value_ids"])
    if name == "recall" and key_ids is not None and set(key_ids) & set(value_ids):
        raise UserError("--key-ids and --value-ids have ids in common; use different ones for --task recall")
    marks: tuple[int, ...] = ()
    if tokenizer is not None:
        marks, digits = _encode_marker(tokenizer, marker)
        value_ids = value_ids or digits
        key_ids = key_ids or digits
    return (
        Task(
            name=name,
            key_ids=None if key_ids is None else tuple(key_ids),
            value_ids=None if value_ids is None else tuple(value_ids),
            key_tokens=key_tokens,
            value_tokens=1 if name == "recall" else value_tokens or 5,
            marker=marks,
            own_values=bool(recall and name == "recall" and not given_ids and recall["own_values"]),
            pair_fraction=1.0 if pair_fraction is None else pair_fraction,
            seed=seed,
        ),
        text,
    )


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


def _ids(flag: str, text: str | None) -> range | None:
    if text is None:
        return None
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal()) or int(stop) - int(first) < 2:
        raise UserError(f"{flag} is {text!r}; allowed: {_IDS}")
    return range(int(first), int(stop))


def _check(
    lengths: list[int] | None,
    depths: list[float],
    samples: int,
    key_tokens: int,
    value_tokens: int | None,
    pair_fraction: float | None,
) -> None:
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise UserError(f"--lengths is {lengths}; allowed: {_LENGTHS}")
    # Also refuses NaN.
    if not depths or not all(0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        raise UserError(f"--depths is {depths}; allowed: different {_DEPTHS}")
    for flag, given in (
        ("--samples", samples),
        ("--key-tokens", key_tokens),
        ("--value-tokens", 1 if value_tokens is None else value_tokens),
    ):
        if given < 1:
            raise UserError(f"{flag} is {given}; allowed: 1 or more")
    if pair_fraction is not None and not 0 < pair_fraction <= 1:
        raise UserError(f"--pair-fraction is {pair_fraction}; allowed: greater than 0, at most 1")


def _check_vocabulary(task: Task, info: Checkpoint) -> None:
    """Refuse ids that a checkpoint has no embedding for; those that come from the data the worker checks."""
    size, _ = vocabulary(info.args)
    ids = (*(task.key_ids or ()), *(task.value_ids or ()), *task.marker)
    if size and ids and max(ids) >= size:
        raise UserError(
            f"the {task.name} task has id {max(ids)}; allowed: ids below {size}, the vocabulary "
            f"of {info.folder}"
        )
