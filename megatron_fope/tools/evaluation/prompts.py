"""Token sequences with something to find: passkeys, needles in a haystack and associative recall.

Everything is built from token ids, so it fits any tokenizer, and no text has to be cut or joined. A sequence
of ``length`` tokens ends with the query and, behind it, the answer: a model that reads the whole sequence
predicts the answer's tokens from the positions just before them (teacher forcing), and has found it when its
most likely token is right at all of them.

Random numbers come from the generator that is passed in and from nothing else. These functions need numpy
only. Passkeys are those of Mohtashami and Jaggi (arXiv 2305.16300), associative recall follows the
multi-query form of Arora et al. (arXiv 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fope.common.errors import UserError

Ids = NDArray[np.int64]

_TRIES = 100
"""How often a key is drawn again because the haystack holds it by chance."""


def make_passkey(
    length: int,
    depth: float,
    rng: np.random.Generator,
    *,
    filler: Sequence[int],
    marker: Sequence[int],
    value_ids: Sequence[int],
    value_tokens: int = 5,
) -> tuple[Ids, slice]:
    """A short text repeated over and over, somewhere in it a marker and a random value; the marker asks.

    Args:
        length: tokens in all.
        depth: where the marker stands, 0 at the beginning, 1 right before the query.
        rng: draws the value.
        filler: the text to repeat.
        marker: tokens in front of the value and again in the query; the same in every sequence.
        value_ids: ids that values are drawn from.
        value_tokens: length of the value.

    Returns:
        The sequence, ``[length]``, and where the answer is in it.

    Raises:
        UserError: the length does not hold marker, value, query and answer; or there is no choice of values.
    """
    marker = np.asarray(marker, dtype=np.int64)
    room = _room(length, depth, len(marker), value_tokens)
    value = _values(rng, value_ids, value_tokens)
    haystack = np.resize(np.asarray(filler, dtype=np.int64), room)
    return _plant(haystack, depth, marker, value)


def make_needle(
    length: int,
    depth: float,
    rng: np.random.Generator,
    *,
    haystack: Sequence[int],
    key_ids: Sequence[int],
    value_ids: Sequence[int],
    key_tokens: int = 8,
    value_tokens: int = 5,
) -> tuple[Ids, slice]:
    """A piece of a text with a random key and its random value in it; the key asks.

    Args:
        length: tokens in all.
        depth: where the key stands, 0 at the beginning, 1 right before the query.
        rng: draws the piece of text, the key and the value.
        haystack: the text, read in a circle when it is shorter than needed.
        key_ids: ids that keys are drawn from.
        value_ids: ids that values are drawn from.
        key_tokens: length of the key.
        value_tokens: length of the value.

    Returns:
        The sequence, ``[length]``, and where the answer is in it. The key occurs in it twice: with its value
        and as the query.

    Raises:
        UserError: the length does not hold key, value, query and answer; there is no choice of values; or
            the haystack holds every key that was tried.
    """
    room = _room(length, depth, key_tokens, value_tokens)
    text = _piece(np.asarray(haystack), room, rng)
    value = _values(rng, value_ids, value_tokens)
    for _ in range(_TRIES):
        key = rng.choice(np.asarray(key_ids, dtype=np.int64), key_tokens)
        tokens, answer = _plant(text, depth, key, value)
        if _count(tokens, key) == 2:
            return tokens, answer
    raise UserError(
        f"--key-tokens is {key_tokens} with {len(key_ids)} key ids: the data holds every key that was tried; "
        "use longer keys, or ids that the data does not hold"
    )


def make_recall(
    length: int,
    depth: float,
    rng: np.random.Generator,
    *,
    key_ids: Sequence[int],
    value_ids: Sequence[int],
    own_values: bool = False,
    haystack: Sequence[int] = (),
    pair_fraction: float = 1.0,
) -> tuple[Ids, slice]:
    """Many pairs of a key and its value, one token each; one key that occurred once asks at the end.

    The other keys occur as often as it takes to fill the sequence, each always with the same value.

    Args:
        length: tokens in all.
        depth: where the pair that is asked for stands, 0 at the beginning, 1 right before the query.
        rng: draws the values of all keys, their order, the pieces of text and the key that asks.
        key_ids: the keys, at least 2, none of them in the haystack.
        value_ids: ids that values are drawn from.
        own_values: every key draws from values of its own, see :func:`draw_pairs`.
        haystack: text between the pairs, read in a circle; empty: pairs only.
        pair_fraction: part of the tokens, in (0, 1], that belongs to pairs; the rest is the haystack's.

    Returns:
        The sequence, ``[length]``, and where the answer is in it (one token).

    Raises:
        UserError: the length does not hold pair, query and answer; or there are too few keys or values.
    """
    keys, values = draw_pairs(rng, key_ids, value_ids, own_values=own_values)
    asked = rng.integers(len(keys))
    others = np.delete(np.arange(len(keys)), asked)
    room = _room(length, depth, 1, 1)
    before = round(depth * room)
    parts = [
        mix_pairs(size, rng, keys[others], values[others], haystack=haystack, pair_fraction=pair_fraction)
        for size in (before, room - before)
    ]
    pair = np.array([keys[asked], values[asked]])
    return np.concatenate([parts[0], pair, parts[1], pair]), slice(length - 1, length)


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


def _room(length: int, depth: float, key_tokens: int, value_tokens: int) -> int:
    """Tokens of haystack in a sequence that holds key and value twice."""
    if not 0 <= depth <= 1:
        raise UserError(f"--depths is {depth:g}; allowed: numbers from 0 to 1")
    needed = 2 * (key_tokens + value_tokens)
    if length < needed:
        raise UserError(
            f"--lengths is {length}; allowed: at least {needed}, to hold a key of {key_tokens} and a "
            f"value of {value_tokens} tokens twice"
        )
    return length - needed


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


def _plant(haystack: Ids, depth: float, key: Ids, value: Ids) -> tuple[Ids, slice]:
    before = round(depth * len(haystack))
    tokens = np.concatenate([haystack[:before], key, value, haystack[before:], key, value])
    return tokens, slice(len(tokens) - len(value), len(tokens))


def _count(tokens: Ids, key: Ids) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(key))
    return int((windows == key).all(axis=1).sum())
