"""Retrieval on one rank: the prompts of a grid of lengths and depths, and how many answers a model finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import numpy as np

from megatron_fope.common.errors import UserError
from megatron_fope.tools.evaluation.model import Batch, sum_over_batches
from megatron_fope.tools.evaluation.prompts import Ids, make_needle, make_passkey, make_recall
from megatron_fope.tools.evaluation.tokens import read_tokens

TASKS = ("passkey", "needle", "recall")

_FILLER_TOKENS = 32
"""Length of the text that a passkey's haystack repeats."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, apart from length and depth; see :mod:`megatron_fope.tools.evaluation.prompts`.

    Attributes:
        name: one of :data:`TASKS`.
        key_ids: ids of keys; empty: those that the text holds.
        value_ids: ids of values; empty with ``key_ids``.
        key_tokens: length of a needle's key.
        value_tokens: length of the answer.
        marker: passkey: the tokens in front of the value; empty: ``key_tokens`` ids drawn once per seed.
        pair_fraction: recall: part of the tokens that belongs to pairs; the rest is text.
        own_values: recall: every key has values of its own.
        seed: of everything that is random.
    """

    name: str
    key_ids: tuple[int, ...]
    value_ids: tuple[int, ...]
    key_tokens: int
    value_tokens: int
    marker: tuple[int, ...] = ()
    pair_fraction: float = 1.0
    own_values: bool = False
    seed: int = 1234

    def prompt(self, text: Ids, length: int, depth: float, sample: int) -> tuple[Ids, slice]:
        """One prompt; the same for the same arguments, whatever else is evaluated and in whatever layout.

        Args:
            text: haystack; may be empty for recall with pairs only.
            length: tokens in all.
            depth: 0 to 1.
            sample: number of the prompt.

        Returns:
            The tokens, ``[length]``, and where the answer is.

        Raises:
            UserError: a prompt like this cannot be built.
        """
        rng = np.random.default_rng([self.seed, length, round(depth * 1_000_000), sample])
        ids = {"value_ids": self.value_ids}
        if self.name == "recall":
            between = text if self.pair_fraction < 1 else ()
            ids |= {"key_ids": self.key_ids, "own_values": self.own_values}
            return make_recall(length, depth, rng, haystack=between, pair_fraction=self.pair_fraction, **ids)
        sizes = {"value_tokens": self.value_tokens}
        if self.name == "needle":
            sizes["key_tokens"] = self.key_tokens
            return make_needle(length, depth, rng, haystack=text, key_ids=self.key_ids, **ids, **sizes)
        marker = self.marker or np.random.default_rng(self.seed).choice(self.key_ids, self.key_tokens)
        return make_passkey(length, depth, rng, filler=text[:_FILLER_TOKENS], marker=marker, **ids, **sizes)

    @property
    def shortest_length(self) -> int:
        """Tokens that key and value need, twice each."""
        if self.name == "recall":
            return 4
        return 2 * (len(self.marker) or self.key_tokens) + 2 * self.value_tokens

    @property
    def chance(self) -> float:
        """Accuracy of an answer drawn at random from the values it can have."""
        if self.own_values:
            return 1 / (len(self.value_ids) // len(self.key_ids))
        return len(set(self.value_ids)) ** -float(self.value_tokens)


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
