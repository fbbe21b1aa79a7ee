"""Retrieval on one rank: the prompts of a grid of lengths and depths, and how many answers a model finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import numpy as np

from megatron_fope.common.errors import UserError
from megatron_fope.tools.evaluation.model import Batch, sum_over_batches
from megatron_fope.tools.evaluation.prompts import Ids, Task
from megatron_fope.tools.evaluation.tokens import read_tokens


class RetrievalRow(TypedDict):
    """Answers found at one length and depth."""

    length: int
    depth: float
    samples: int
    found: int
    accuracy: float


def retrieval_by_length(
    model: list[Any],
    *,
    task: Task,
    text_path: str,
    text_tokens: int,
    lengths: list[int],
    depths: list[float],
    samples: int,
    tokens_per_batch: int,
) -> list[RetrievalRow]:
    """How often a model's most likely tokens are the answer, all of it.

    Args:
        model: from :func:`~megatron_fope.tools.evaluation.model.load_model`.
        task: what is asked.
        text_path: prefix of the haystack; for recall, its keys and values are left out.
        text_tokens: of the haystack that are used.
        lengths: tokens of a prompt.
        depths: where the answer stands, each 0 to 1.
        samples: prompts per length and depth.
        tokens_per_batch: tokens in one forward pass, at least a prompt.

    Raises:
        UserError: the text holds nothing to search, or the model has no embedding for an id.
    """
    from megatron.training import get_args

    text = read_tokens(text_path, text_tokens)
    if not task.key_ids:
        ids = tuple(np.unique(text).tolist())
        # In recall, where a key is one token, none is a value, too.
        keys, values = (ids[::2], ids[1::2]) if task.name == "recall" else (ids, ids)
        task = replace(task, key_ids=keys, value_ids=values)
    if task.name == "recall" and task.pair_fraction < 1:
        text = text[~np.isin(text, [*task.key_ids, *task.value_ids])]
    if not len(text):
        raise UserError(
            f"--data-path is {text_path!r}: it holds no tokens besides keys and values; use data that does"
        )
    vocab_size = get_args().padded_vocab_size
    for ids, what in (
        (text, f"--data-path {text_path}"),
        ((*task.key_ids, *task.value_ids, *task.marker), f"the {task.name} task"),
    ):
        if (largest := int(np.max(ids))) >= vocab_size:
            raise UserError(
                f"{what} holds id {largest}; allowed: ids below {vocab_size}, the checkpoint's vocabulary"
            )
    return [
        row
        for length in lengths
        for row in _accuracy(model, task, text, length, depths, samples, tokens_per_batch)
    ]


def _accuracy(
    model: list[Any],
    task: Task,
    text: Ids,
    length: int,
    depths: list[float],
    samples: int,
    tokens_per_batch: int,
) -> list[RetrievalRow]:
    shape = (len(depths) * samples, task.value_tokens)
    hits = sum_over_batches(
        model,
        partial(prompt_batches, task, text, length, depths, samples),
        partial(count_hits, shape=shape, argmax=_argmax),
        samples=len(depths) * samples,
        tokens_per_batch=tokens_per_batch,
        length=length,
        shape=shape,
    )
    found = (hits == 1).all(dim=1).view(len(depths), samples).sum(dim=1).tolist()
    return [
        {"length": length, "depth": depth, "samples": samples, "found": n, "accuracy": n / samples}
        for depth, n in zip(depths, found, strict=True)
    ]


def prompt_batches(
    task: Task,
    text: Ids,
    length: int,
    depths: list[float],
    samples: int,
    first: int,
    size: int,
    count: int,
) -> Iterator[Batch]:
    """Batches of prompts, built when they are needed.

    Args:
        task: what is asked.
        text: haystack, ``[n]``.
        length: tokens of a prompt.
        depths: where the answer stands.
        samples: prompts per depth; prompt number p is sample ``p % samples`` at depth ``p // samples``.
        first: number of the first prompt.
        size: prompts in a batch.
        count: number of batches.

    Yields:
        ``[size, length]`` int64 each: ``tokens``; ``position_ids``; ``answers``, the token that must follow
        where that is the answer's, else -1; ``slots``, the prompt's number times the answer's length plus
        the place in the answer, where ``answers`` is not -1.
    """
    import torch

    for start in range(first, first + size * count, size):
        tokens = torch.empty(size, length, dtype=torch.int64)
        answers = torch.full_like(tokens, -1)
        slots = torch.zeros_like(tokens)
        for row, number in enumerate(range(start, start + size)):
            built, answer = task.prompt(text, length, depths[number // samples], number % samples)
            tokens[row] = torch.from_numpy(built)
            predicting = slice(answer.start - 1, answer.stop - 1)
            answers[row, predicting] = tokens[row, answer]
            slots[row, predicting] = number * task.value_tokens + torch.arange(task.value_tokens)
        positions = torch.arange(length).expand_as(tokens).contiguous()
        yield {"tokens": tokens, "position_ids": positions, "answers": answers, "slots": slots}


def count_hits(logits: Any, batch: Batch, *, shape: tuple[int, int], argmax: Callable[[Any], Any]) -> Any:
    """Mark the answer tokens that are the most likely ones.

    Args:
        logits: ``[b, s, v]`` of a part of the positions and of the vocabulary.
        batch: the same positions of a batch of :func:`prompt_batches`.
        shape: number of prompts and tokens of an answer.
        argmax: the most likely ids over the whole vocabulary for logits ``[n, v]``.

    Returns:
        ``shape``, float64, 1 for an answer token that is right and in this part, else 0.
    """
    import torch

    there = batch["answers"] >= 0
    right = argmax(logits[there]) == batch["answers"][there]
    hits = torch.zeros(shape[0] * shape[1], dtype=torch.float64, device=logits.device)
    hits[batch["slots"][there]] = right.double()
    return hits.view(shape)


def _argmax(logits: Any) -> Any:
    """The most likely ids, ``[n]``, from logits ``[n, v]`` of a part of the vocabulary on each rank."""
    import torch
    from megatron.core import parallel_state

    best, ids = logits.float().max(dim=-1)
    ids = ids + parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    if num_ranks == 1:
        return ids
    group = parallel_state.get_tensor_model_parallel_group()
    all_best = [torch.empty_like(best) for _ in range(num_ranks)]
    all_ids = [torch.empty_like(ids) for _ in range(num_ranks)]
    torch.distributed.all_gather(all_best, best.contiguous(), group=group)
    torch.distributed.all_gather(all_ids, ids.contiguous(), group=group)
    winner = torch.stack(all_best).argmax(dim=0, keepdim=True)
    return torch.stack(all_ids).gather(0, winner)[0]
