"""Token sequences with something to find: passkeys, needles in a haystack and associative recall.

Everything is built from token ids, so it fits any tokenizer, and no text has to be cut or joined. A sequence
of ``length`` tokens ends with the query and, behind it, the answer: a model that reads the whole sequence
predicts the answer's tokens from the positions just before them (teacher forcing), and has found it when its
most likely token is right at all of them.

Random numbers come from seeds and from nothing else. This module needs numpy only. Passkeys are those of
Mohtashami and Jaggi (arXiv 2305.16300), associative recall follows the multi-query form of Arora et al.
(arXiv 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fope.common.errors import UserError

Ids = NDArray[np.int64]

TASKS = ("passkey", "needle", "recall")

_FILLER_TOKENS = 32
"""Length of the text that a passkey's haystack repeats."""

_TRIES = 100
"""How often a key is drawn again because the haystack holds it by chance."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, apart from length and depth.

    ``passkey``: a short text repeated over and over, somewhere in it a marker and a random value; the marker
    asks. ``needle``: a piece of the text with a random key and its random value in it; the key asks.
    ``recall``: many pairs of a key and its value, one token each, perhaps with text between them; one key
    that occurred once asks at the end, the others occur as often as it takes to fill the sequence.

    Attributes:
        name: one of :data:`TASKS`.
        key_ids: ids of keys; empty: those that the text holds. For recall none of them is in the text.
        value_ids: ids of values; empty with ``key_ids``.
        key_tokens: length of a needle's key.
        value_tokens: length of the answer; recall: 1.
        marker: passkey: the tokens in front of the value; empty: ``key_tokens`` ids drawn once per seed.
        pair_fraction: recall: part of the tokens that belongs to pairs; the rest is text.
        own_values: recall: every key draws from values of its own, see :func:`draw_pairs`.
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
            text: haystack, read in a circle when it is shorter than needed; may be empty for recall with
                pairs only.
            length: tokens in all.
            depth: where key and value stand, 0 at the beginning, 1 right before the query.
            sample: number of the prompt.

        Returns:
            The tokens, ``[length]``, and where the answer is.

        Raises:
            UserError: a prompt like this cannot be built.
        """
        rng = np.random.default_rng([self.seed, length, round(depth * 1_000_000), sample])
        room = self._room(length, depth)
        if self.name == "passkey":
            marker = self.marker or np.random.default_rng(self.seed).choice(self.key_ids, self.key_tokens)
            value = _values(rng, self.value_ids, self.value_tokens)
            tokens = _plant(np.resize(text[:_FILLER_TOKENS], room), depth, np.asarray(marker), value)
        elif self.name == "needle":
            tokens = self._needle(text, room, depth, rng)
        else:
            keys, values = draw_pairs(rng, self.key_ids, self.value_ids, own_values=self.own_values)
            asked = rng.integers(len(keys))
            others = np.delete(np.arange(len(keys)), asked)
            between = text if self.pair_fraction < 1 else ()
            before = round(depth * room)
            first, last = (
                mix_pairs(
                    size,
                    rng,
                    keys[others],
                    values[others],
                    haystack=between,
                    pair_fraction=self.pair_fraction,
                )
                for size in (before, room - before)
            )
            pair = np.array([keys[asked], values[asked]])
            tokens = np.concatenate([first, pair, last, pair])
        return tokens, slice(length - self.value_tokens, length)

    def _needle(self, text: Ids, room: int, depth: float, rng: np.random.Generator) -> Ids:
        text = _piece(text, room, rng)
        value = _values(rng, self.value_ids, self.value_tokens)
        for _ in range(_TRIES):
            key = rng.choice(np.asarray(self.key_ids, dtype=np.int64), self.key_tokens)
            tokens = _plant(text, depth, key, value)
            if _count(tokens, key) == 2:
                return tokens
        raise UserError(
            f"--key-tokens is {self.key_tokens} with {len(self.key_ids)} key ids: the data holds every key "
            "that was tried; use longer keys, or ids that the data does not hold"
        )

    def _room(self, length: int, depth: float) -> int:
        """Tokens of haystack in a sequence that holds key and value twice."""
        if not 0 <= depth <= 1:
            raise UserError(f"--depths is {depth:g}; allowed: numbers from 0 to 1")
        if length < self.shortest_length:
            raise UserError(
                f"--lengths is {length}; allowed: at least {self.shortest_length}, to hold a key of "
                f"{self.shortest_length // 2 - self.value_tokens} and a value of {self.value_tokens} tokens "
                "twice"
            )
        return length - self.shortest_length

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


def draw_pairs(
    rng: np.random.Generator, key_ids: Sequence[int], value_ids: Sequence[int], *, own_values: bool = False
) -> tuple[Ids, Ids]:
    """A value for every key.

    Args:
        rng: draws the values.
        key_ids: the keys, ``[K]``, all different.
        value_ids: ids that values are drawn from.
        own_values: divide the values among the keys in order, the same number for each, and draw every key's
            value from its own. Such a value says whose it is, so that one attention layer can find it from
            the key; with common values, a layer below has to tell every value which key it follows.

    Returns:
        The keys and their values, ``[K]`` each; two keys may have the same value, if values are common.

    Raises:
        UserError: fewer than 2 keys, or no choice of values.
    """
    if len(set(key_ids)) < 2:
        raise UserError(f"the keys are {len(set(key_ids))} different ids; allowed: 2 or more")
    keys = np.asarray(key_ids, dtype=np.int64)
    if not own_values:
        return keys, _values(rng, value_ids, len(keys))
    per_key = len(value_ids) // len(keys)
    if per_key < 2:
        raise UserError(
            f"the values are {len(value_ids)} ids for {len(keys)} keys with values of their own; allowed: at "
            "least 2 for each key"
        )
    first = per_key * np.arange(len(keys))
    return keys, np.asarray(value_ids, dtype=np.int64)[first + rng.integers(per_key, size=len(keys))]


def mix_pairs(
    length: int,
    rng: np.random.Generator,
    keys: Ids,
    values: Ids,
    *,
    haystack: Sequence[int] | Ids = (),
    pair_fraction: float = 1.0,
) -> Ids:
    """Pairs drawn at random, in a random order with a piece of text.

    Args:
        length: tokens in all; an odd one without a haystack leaves half a pair, a value, at the front.
        rng: draws pairs, their places and the piece of text.
        keys: ``[K]``.
        values: the keys' values, ``[K]``.
        haystack: the text, read in a circle; empty: pairs only.
        pair_fraction: part of the tokens that belongs to pairs.

    Returns:
        ``[length]`` tokens.
    """
    if not len(haystack):
        drawn = rng.integers(len(keys), size=(length + 1) // 2)
        tokens = np.stack([keys[drawn], values[drawn]], axis=1).reshape(-1)
        return tokens[len(tokens) - length :]
    num_pairs = round(length * pair_fraction / 2 - 1e-9)
    num_text = length - 2 * num_pairs
    is_pair = np.zeros(num_pairs + num_text, dtype=bool)
    is_pair[:num_pairs] = True
    rng.shuffle(is_pair)
    widths = np.where(is_pair, 2, 1)
    starts = np.cumsum(widths) - widths
    drawn = rng.integers(len(keys), size=num_pairs)
    tokens = np.empty(length, dtype=np.int64)
    tokens[starts[is_pair]] = keys[drawn]
    tokens[starts[is_pair] + 1] = values[drawn]
    tokens[starts[~is_pair]] = _piece(np.asarray(haystack), num_text, rng)
    return tokens


def _values(rng: np.random.Generator, value_ids: Sequence[int], count: int) -> Ids:
    if len(set(value_ids)) < 2:
        raise UserError(f"the values are {len(set(value_ids))} different ids; allowed: 2 or more")
    return rng.choice(np.asarray(value_ids, dtype=np.int64), count)


def _piece(text: NDArray[Any], count: int, rng: np.random.Generator) -> Ids:
    """Consecutive tokens from a random place, going on at the beginning behind the end."""
    first = rng.integers(len(text))
    if first + count <= len(text):
        return text[first : first + count]
    return text[(first + np.arange(count)) % len(text)]


def _plant(haystack: Ids, depth: float, key: Ids, value: Ids) -> Ids:
    before = round(depth * len(haystack))
    return np.concatenate([haystack[:before], key, value, haystack[before:], key, value])


def _count(tokens: Ids, key: Ids) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(key))
    return int((windows == key).all(axis=1).sum())
