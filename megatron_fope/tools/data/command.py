"""``megatron-fope prepare-data``: the flags, and what the command prints."""

from __future__ import annotations

import argparse
import logging
import shlex

from megatron_fope.common.command_line import number, whole
from megatron_fope.tools.data.prepare import ON_BAD_FILE, prepare_data
from megatron_fope.tools.data.readers import DEFAULT_INCLUDE, FORMATS
from megatron_fope.tools.data.tokenizers import BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``prepare-data`` to its parser."""
    parser.description = (
        "Write text as a Megatron dataset (.bin/.idx) through Megatron's own builder. "
        "An existing dataset is never replaced unless asked; an interrupted run leaves nothing that loads."
    )
    add = parser.add_argument
    add(
        "--input",
        dest="inputs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text or JSONL files, or folders of them",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="PREFIX.bin, .idx and .json are written")
    add("--overwrite", action="store_true", help="replace an existing dataset of that prefix")
    add(
        "--tokenizer",
        default=BYTES,
        metavar="bytes|PATH",
        help="bytes (default; ids 0..255, end of document 256), or a Hugging Face tokenizer.json or folder",
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document id (default: yes)",
    )
    add("--eod-token", metavar="TOKEN", help="Hugging Face tokenizers: that token, if not their EOS token")
    add(
        "--workers",
        type=whole(),
        default=1,
        metavar="N",
        help="Hugging Face tokenizers: threads (default: 1)",
    )
    add(
        "--include",
        nargs="+",
        default=DEFAULT_INCLUDE,
        metavar="GLOB",
        help=f"folders: names or relative paths to read (default: {' '.join(DEFAULT_INCLUDE)})",
    )
    add(
        "--exclude",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="folders: names or relative paths to leave out; * also matches /, so 'test/*' is all below test",
    )
    add(
        "--format",
        dest="input_format",
        choices=FORMATS,
        default="auto",
        help="auto (the default): .jsonl, .ndjson and .json hold a JSON object per line, other files are one "
        "document each",
    )
    add("--json-key", default="text", metavar="KEY", help="JSONL: the field with the text (default: text)")
    add(
        "--on-bad-file",
        choices=ON_BAD_FILE,
        default="refuse",
        help="a file or line that is not UTF-8, not readable or not as it should be: stop there (default), "
        "or name it and go on",
    )
    add(
        "--shuffle-seed",
        type=whole(),
        metavar="N",
        help="put the documents in an order drawn from N (default: as read); see Megatron's --split",
    )
    add(
        "--holdout-fraction",
        type=number(),
        default=0.0,
        metavar="F",
        help="put this part of the documents into PREFIX_heldout, the rest into PREFIX_train; "
        "copies of a text stay together (default: 0, one dataset)",
    )
    add("--holdout-seed", type=whole(), default=0, metavar="N", help="which documents those are (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run ``prepare-data`` and print what was written and how to train on it.

    Raises:
        UserError: see :func:`prepare_data`.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_fope").setLevel(logging.INFO)
    done = prepare_data(**vars(args))
    print(
        f"read {done.files} files, {done.text_bytes / 1e6:.1f} MB of text in {done.seconds:.1f} s; "
        f"left out {done.empty_documents} empty documents and {len(done.skipped)} bad files or lines"
    )
    for dataset in filter(None, (done.train, done.heldout)):
        print(
            f"wrote {dataset.prefix}.bin, .idx, .json: {dataset.documents} documents, "
            f"{dataset.tokens} tokens ({done.dtype})"
        )
    print(f"train with: --data-path {shlex.quote(done.train.prefix)} {shlex.join(done.train_flags)}")
    return 0
