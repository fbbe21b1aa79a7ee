"""One rank of a perplexity evaluation; started by :mod:`megatron_fope.evaluation.command` under torchrun."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fope.errors import UserError, exit_on_user_error

_MODEL_GROUPS = (
    "transformer configuration",
    "network size",
    "tokenizer",
    "moe",
    "mla",
    "experimental_attention_variant",
    "heterogeneous architecture",
    "FoPE",
)
"""Argument groups of Megatron that describe the model and not how it was run."""

_ALSO_MODEL = ("seq_length", "fp16", "bf16", "transformer_impl", "spec")
_NOT_MODEL = (
    "fusion",
    "recompute",
    "offload",
    "cuda_graph",
    "persist",
    "cpu_initialization",
    "coder_num_layers",
)
"""Parts of names that stand among the model's arguments but are ways of running, or derived from others."""


def main(request_file: str, result_file: str) -> None:
    """Evaluate as the request says; rank 0 writes the result."""
    request = json.loads(Path(request_file).read_text())
    sys.argv = ["megatron-fope evaluate-perplexity", *request["megatron_flags"]]
    from megatron_fope.launch import prepare

    prepare(cpu=request["cpu"])
    import torch

    model = load_model(request["checkpoint"])
    tokens = read_tokens(request["data_path"], request["num_tokens"] + 1)
    if tokens.numel() <= max(request["lengths"]):
        raise UserError(
            f"--data-path is {request['data_path']!r}: it holds {tokens.numel()} tokens; allowed: more than "
            f"the longest length, {max(request['lengths'])}"
        )
    results = [
        {"length": length} | perplexity(model, tokens, length, request["tokens_per_batch"])
        for length in request["lengths"]
    ]
    if torch.distributed.get_rank() == 0:
        Path(result_file).write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def load_model(checkpoint: str) -> list[Any]:
    """Initialise Megatron as the checkpoint's arguments say and load its model.

    Args:
        checkpoint: folder given to ``--save``; ``sys.argv`` holds the flags for this run.

    Returns:
        The model's chunks on this rank, in evaluation mode.
    """
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model

    from megatron_fope import compat
    from megatron_fope.checkpoint import read_checkpoint
    from megatron_fope.model import embedding_ranks, model_provider

    compat.use_prebuilt_dataset_helpers()
    compat.repair_checkpoint_metadata_reader()
    stored = read_checkpoint(checkpoint).args
    compat.initialize_megatron(partial(_adopt, stored), get_embedding_ranks=embedding_ranks)
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    if get_args().position_embedding_type == "fope":
        from megatron_fope.report import assert_fope_active, describe

        if describe(model):
            assert_fope_active(model)
    for chunk in model:
        chunk.eval()
    return model


def _adopt(stored: Any, parser: Any, args: Any) -> None:
    """Take everything that describes the model from the checkpoint's arguments.

    Megatron's ``--use-checkpoint-args`` copies a list that leaves out precision, query/key normalisation
    and more; a model evaluated without them would be another one.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    parallel = set(ModelParallelConfig.__dataclass_fields__)
    given = {word.split("=")[0] for word in sys.argv}
    for group in parser._action_groups:
        for action in group._group_actions:
            name = action.dest
            of_model = group.title in _MODEL_GROUPS and name not in parallel
            if name not in _ALSO_MODEL and (not of_model or any(part in name for part in _NOT_MODEL)):
                continue
            if hasattr(stored, name) and not given & set(action.option_strings):
                setattr(args, name, getattr(stored, name))


def read_tokens(prefix: str, count: int) -> Any:
    """The first tokens of a dataset, documents joined in order.

    Returns:
        ``[count]`` int64, fewer when the dataset is smaller.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    parts, total = [], 0
    for i in range(len(dataset)):
        parts.append(np.asarray(dataset[i], dtype=np.int64))
        total += len(parts[-1])
        if total >= count:
            break
    return torch.from_numpy(np.concatenate(parts)[:count])


def perplexity(model: list[Any], tokens: Any, length: int, tokens_per_batch: int) -> dict[str, float]:
    """Mean loss over windows of one length.

    Every token but the first is predicted exactly once, from the tokens before it in its window; what does
    not fill a window is left out.

    Args:
        model: from :func:`load_model`.
        tokens: ``[n + 1]`` int64.
        length: window length in tokens.
        tokens_per_batch: tokens in one forward pass.

    Returns:
        ``tokens`` evaluated, mean ``loss`` in nats per token and its exponential, ``perplexity``.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    num_windows = (tokens.numel() - 1) // length
    inputs = tokens[: num_windows * length].view(num_windows, length)
    labels = tokens[1 : num_windows * length + 1].view(num_windows, length)
    batch = max(1, min(num_windows, tokens_per_batch // length))
    total = torch.zeros(1, dtype=torch.float64)
    # The schedule keeps one size for all micro-batches, so a smaller last batch is a run of its own.
    full, rest = divmod(num_windows, batch)
    for first, size, count in ((0, batch, full), (full * batch, rest, 1)):
        if not size:
            continue
        pieces = iter(zip(inputs[first:].split(size), labels[first:].split(size), strict=True))
        with torch.no_grad():
            reports = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=list(itertools.tee(pieces, len(model))),
                model=model,
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
            )
        total += sum(float(report["loss"]) for report in reports)
    on_last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    total = total.to(next(model[0].parameters()).device)
    torch.distributed.broadcast(
        total, on_last_stage, group=parallel_state.get_pipeline_model_parallel_group()
    )
    loss = float(total) / (num_windows * length)
    return {"tokens": num_windows * length, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _forward_step(data_iterator: Iterator, model: Any) -> tuple[Any, Callable]:
    import torch

    inputs, labels = (part.cuda() for part in next(data_iterator))
    positions = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    losses = model(inputs, positions, None, labels=labels)
    return losses, _sum_of_losses


def _sum_of_losses(losses: Any) -> tuple[Any, dict[str, Any]]:
    total = losses.double().sum()
    # A copy: the schedule divides the first value in place by the number of micro-batches.
    return total, {"loss": total.clone()}


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
