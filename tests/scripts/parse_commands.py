"""Feed complete launch commands to Megatron's parser and validation with FoPE registered, in one process.

Reads ``{name: {"ranks": N, "flags": [...]}}`` from standard input and prints ``{name: outcome}`` as the last
line of standard output; outcomes as in :mod:`bad_input_cases`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys

from bad_input_cases import outcome, scalars

from megatron_fope import cpu
from megatron_fope.common.errors import exit_on_user_error


def validated(ranks: int, flags: list[str]) -> argparse.Namespace:
    """Megatron's arguments as rank 0 of a run has them before it initialises anything."""
    from megatron.training import arguments

    from megatron_fope.training.pretrain import check_args

    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["train", *cpu.add_argument_defaults(flags)]
    args = arguments.parse_args()
    arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    with exit_on_user_error():
        check_args(args)
    return args


def main() -> None:
    """Run the cases, print the outcomes."""
    request = json.load(sys.stdin)
    os.environ.setdefault("RANK", "0")
    cpu.enable()
    from megatron_fope import register

    register()
    outcomes = {name: outcome(functools.partial(validated, **case)) for name, case in request.items()}
    for found in outcomes.values():
        found["args"] = scalars(found["args"])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
