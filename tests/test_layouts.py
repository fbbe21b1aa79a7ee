"""A few rows of ``make layouts`` in every test run: other layouts, the same losses and gradient norms."""

from __future__ import annotations

import pytest
from layouts import LAYOUTS, MODELS, WAYS, Comparison, num_ranks

NAMES = ["TP2 SP CP2", "PP2 virtual-stages", "packed CP2", "learnable TP4", "MoE DP2 EP2"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(tmp_path_factory.mktemp("layouts"), iters=4)


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_layout_equals_one_rank(name: str, comparison: Comparison) -> None:
    difference = comparison.difference(name)
    assert difference.agrees, difference


def test_the_table_covers_what_is_promised() -> None:
    assert len(LAYOUTS) == len(set(LAYOUTS)) and set(NAMES) <= set(LAYOUTS)
    assert all(set(name.split()) <= set(MODELS | WAYS) for name in LAYOUTS)
    single = [name for name in LAYOUTS if "bf16" not in name]
    assert len(single) >= 24 and 3 * (len(LAYOUTS) - len(single)) >= len(single)
    assert {num_ranks(name) for name in LAYOUTS} == {1, 2, 4}
