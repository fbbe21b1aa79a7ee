"""The weights of clip, padding and series at every step of a gradual start."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.schedule import Schedule


def schedule(**settings: Any) -> Schedule:
    return Schedule.of(FoPEConfig.from_profile(**{"train_length": 64, "anneal_iters": 12} | settings))


def test_nothing_at_the_start_and_all_at_the_end() -> None:
    for order in ("together", "slowest-first", "slowest-last"):
        made = schedule(anneal_order=order, anneal_clip="2:8", anneal_padding="8:10", anneal_series="9:12")
        for step, value in ((-3, 0), (0, 0), (12, 1), (99, 1)):
            weights = made.weights(step, 5)
            assert weights.clip.tolist() == [value] * 5
            assert (weights.padding, weights.series) == (value, value)


def test_without_a_schedule_all_weights_are_one() -> None:
    assert schedule().is_plain
    weights = schedule().weights(3, 2)
    assert weights.clip.tolist() == [0.25, 0.25] and weights.padding == weights.series == 0.25


@pytest.mark.parametrize(
    ("order", "clip"),
    [
        ("together", [0.625] * 4),
        ("slowest-first", [0, 0.5, 1, 1]),
        ("slowest-last", [1, 1, 0.5, 0]),
    ],
)
def test_order(order: str, clip: list[float]) -> None:
    """Four pairs in eight steps, two steps each; the fifth step is the middle of the third pair."""
    made = schedule(anneal_order=order, anneal_clip="0:8", anneal_padding="8:12", anneal_series="4:12")
    weights = made.weights(5, 4)
    assert weights.clip.tolist() == clip and not made.is_plain
    assert (weights.padding, weights.series) == (0, 0.125)


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "0:13", "-1:4", "a:b", "1:2:3", "1.5:2", ":4"])
def test_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--fope-anneal-series is .*; allowed: FIRST:LAST, .* 12 of --fope"):
        schedule(anneal_series=text)
    with pytest.raises(UserError, match=r"--fope-anneal-order is 'sideways'; allowed: together"):
        schedule(anneal_order="sideways")


def test_which_pairs_lose_their_frequency() -> None:
    """The clipped ones and, in the paper's profile, those that are kept but have no series."""
    for settings, leaving in (
        ({"square": True}, range(12, 16)),
        ({}, range(8, 16)),
        ({"drop_clipped": False}, range(12, 16)),
        ({"clip": False, "square": True}, range(16, 16)),
    ):
        geometry = Geometry(FoPEConfig.from_profile(train_length=4096, **settings), 32)
        assert geometry.leaving == leaving, settings
