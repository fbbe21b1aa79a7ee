"""``megatron-fope make-recall-data``: the flags, and what the command prints."""

from __future__ import annotations

import argparse
import shlex

from megatron_fope.common.command_line import number, whole
from megatron_fope.tools.data.recall import make_recall_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``make-recall-data`` to its parser."""
    parser.description = (
        "Write documents of associative recall as a Megatron dataset: pairs of a key and its value, one "
        "token each, between the tokens of a text. Small models learn it in minutes, and evaluate-retrieval "
        "asks for it."
    )
    add = parser.add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="PREFIX.bin, .idx and .json are written")
    add("--overwrite", action="store_true", help="replace an existing dataset of that prefix")
    add(
        "--length",
        type=whole(),
        required=True,
        metavar="N",
        help="tokens of a document; train with --seq-length N",
    )
    add("--documents", type=whole(), required=True, metavar="N", help="how many")
    add(
        "--text",
        metavar="PREFIX",
        help="dataset of prepare-data whose text stands between the pairs (default: random tokens)",
    )
    add("--keys", type=whole(), default=8, metavar="N", help="different keys (default: 8)")
    add("--values", type=whole(), default=8, metavar="N", help="different values of each key (default: 8)")
    add(
        "--common-values",
        dest="own_values",
        action="store_false",
        help="all keys share the values; harder: the answer takes two attention layers, not one",
    )
    add(
        "--pair-fraction",
        type=number(),
        default=0.5,
        metavar="F",
        help="part of the tokens that belongs to pairs (default: 0.5)",
    )
    add(
        "--seed", type=whole(), default=1234, metavar="N", help="of everything that is random (default: 1234)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``make-recall-data`` and print what was written and how to train on it.

    Raises:
        UserError: see :func:`make_recall_data`.
    """
    done = make_recall_data(**vars(args))
    keys, values = (f"{ids.start}-{ids.stop - 1}" for ids in (done.key_ids, done.value_ids))
    print(
        f"wrote {done.train.prefix}.bin, .idx, .json: {done.train.documents} documents, {done.train.tokens} "
        f"tokens; ids {keys} are keys, {values} values ({done.seconds:.1f} s)"
    )
    print(f"train with: --data-path {shlex.quote(done.train.prefix)} {shlex.join(done.train_flags)}")
    return 0
