"""Perplexity on one rank: mean loss over windows of one length, also by position in the window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NotRequired, TypedDict

from megatron_fope.tools.evaluation.model import Batch, sum_over_batches
from megatron_fope.tools.evaluation.tokens import read_tokens


class Loss(TypedDict):
    """Of a number of predicted tokens."""

    tokens: int
    loss: float
    """Mean, in nats per token."""
    perplexity: float


class PositionRow(Loss):
    """Of the tokens predicted at positions ``start`` to ``stop - 1``; position 0 sees one token."""

    start: int
    stop: int


class PerplexityRow(Loss):
    """Of windows of one length."""

    length: int
    by_position: NotRequired[list[PositionRow]]


def perplexity_by_length(
    model: list[Any],
    *,
    data_path: str,
    tokens: int,
    lengths: list[int],
    tokens_per_batch: int,
    buckets: int | None = None,
) -> list[PerplexityRow]:
    """Mean loss over windows of each length.

    Every token but the first is predicted exactly once, from the tokens before it in its window; what does
    not fill a window is left out.

    Args:
        model: from :func:`~megatron_fope.tools.evaluation.model.load_model`.
        data_path: prefix of the data.
        tokens: predicted at most.
        lengths: of the windows, in tokens.
        tokens_per_batch: tokens in one forward pass.
        buckets: also report the loss in this many equal ranges of positions, at most the shortest length.
    """
    import torch

    text = torch.from_numpy(read_tokens(data_path, tokens + 1))
    return [_perplexity(model, text, length, tokens_per_batch, buckets) for length in lengths]


def _perplexity(
    model: list[Any], tokens: Any, length: int, tokens_per_batch: int, buckets: int | None
) -> PerplexityRow:
    num_windows = (tokens.numel() - 1) // length
    inputs = tokens[: num_windows * length].view(num_windows, length)
    labels = tokens[1 : num_windows * length + 1].view(num_windows, length)
    sums = sum_over_batches(
        model,
        lambda first, size, count: _windows(
            inputs[first : first + size * count], labels[first : first + size * count], size
        ),
        partial(sum_by_bucket, length=length, buckets=buckets or 1),
        samples=num_windows,
        tokens_per_batch=tokens_per_batch,
        length=length,
        shape=(buckets or 1,),
    )
    result: PerplexityRow = {"length": length, **_mean(float(sums.sum()), num_windows * length)}
    if buckets:
        # The first position whose bucket is i.
        edges = [-(-i * length // buckets) for i in range(buckets + 1)]
        result["by_position"] = [
            {"start": start, "stop": stop, **_mean(float(sums[i]), num_windows * (stop - start))}
            for i, (start, stop) in enumerate(itertools.pairwise(edges))
        ]
    return result


def sum_by_bucket(losses: Any, batch: Batch, *, length: int, buckets: int) -> Any:
    """Sum losses over the batch and over ranges of positions.

    Args:
        losses: ``[b, s]``, nats.
        batch: with ``position_ids``, the place of every column in the whole window; ``[b, s]``.
        length: of the whole window.
        buckets: number of ranges; position p belongs to range ``p * buckets // length``.

    Returns:
        ``[buckets]``, float64.
    """
    bucket = batch["position_ids"][0] * buckets // length
    by_position = losses.double().sum(dim=0)
    return by_position.new_zeros(buckets).index_add_(0, bucket, by_position)


def _windows(inputs: Any, labels: Any, size: int) -> Iterator[Batch]:
    import torch

    for tokens, targets in zip(inputs.split(size), labels.split(size), strict=True):
        positions = torch.arange(tokens.size(1)).expand_as(tokens).contiguous()
        yield {"tokens": tokens, "position_ids": positions, "labels": targets}


def _mean(total: float, tokens: int) -> Loss:
    loss = total / tokens
    return {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
