"""One rank of an evaluation; started by :mod:`megatron_fope.tools.evaluation.launching` under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError, exit_on_user_error
from megatron_fope.tools.evaluation import progress
from megatron_fope.tools.evaluation.tokens import read_tokens


def main(request_file: str, result_file: str) -> None:
    """Evaluate as the request says; rank 0 writes the result."""
    request = json.loads(Path(request_file).read_text())
    sys.argv = ["megatron-fope", *request["megatron_flags"]]
    from megatron_fope.training.launch import prepare

    prepare(cpu=request["cpu"])
    import torch

    from megatron_fope.tools.evaluation.model import load_model

    if os.environ["RANK"] == "0":
        progress.count_in(Path(result_file).with_name("progress"))

    model = load_model(request["checkpoint"])
    results = {"perplexity": _perplexity, "retrieval": _retrieval}[request["kind"]](model, request)
    if torch.distributed.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _perplexity(model: list[Any], request: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from megatron_fope.tools.evaluation.perplexity import perplexity

    tokens = torch.from_numpy(read_tokens(request["data_path"], request["num_tokens"] + 1))
    return [
        {"length": length}
        | perplexity(model, tokens, length, request["tokens_per_batch"], request["by_position"])
        for length in request["lengths"]
    ]


def _retrieval(model: list[Any], request: dict[str, Any]) -> list[dict[str, Any]]:
    import numpy as np
    from megatron.training import get_args

    from megatron_fope.tools.evaluation.retrieval import Task, check_ids, retrieval_accuracy

    text = read_tokens(request["text"], request["text_tokens"])
    values = request["task"]
    if values["key_ids"] is None:
        values |= _ids_of(text, values["name"])
    task = Task(**values)
    if task.name == "recall" and task.pair_fraction < 1:
        text = text[~np.isin(text, [*task.key_ids, *task.value_ids])]
    if not len(text):
        raise UserError(
            f"--data-path is {request['text']!r}: it holds no tokens besides keys and values; use data "
            "that does"
        )
    vocab_size = get_args().padded_vocab_size
    check_ids(text, vocab_size, f"--data-path {request['text']}")
    check_ids(np.array([*task.key_ids, *task.value_ids, *task.marker]), vocab_size, f"the {task.name} task")
    depths, samples = request["depths"], request["samples"]
    return [
        row
        for length in request["lengths"]
        for row in retrieval_accuracy(model, task, text, length, depths, samples, request["tokens_per_batch"])
    ]


def _ids_of(text: Any, task: str) -> dict[str, list[int]]:
    """Keys and values from the ids that a text holds; in recall, where a key is one token, none is both."""
    import numpy as np

    ids = np.unique(text).tolist()
    if task == "recall":
        return {"key_ids": ids[::2], "value_ids": ids[1::2]}
    return {"key_ids": ids, "value_ids": ids}


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
