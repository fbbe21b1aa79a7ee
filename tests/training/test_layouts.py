"""A few layouts of the big table (``make layouts``), a few iterations each, with the same limits."""

from __future__ import annotations

import pytest
from forks import Launcher
from layouts import LAYOUTS, Comparison, num_ranks

from megatron_fope import compat

pytestmark = pytest.mark.launch

ITERS = 4
SELECTED = (
    "TP2 SP CP2",
    "PP2 virtual-stages",
    "DP2 distributed-optimizer",
    "learnable TP4 SP",
    "packed CP2",
    "packed TP2 SP CP2",
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Comparison:
    return Comparison(tmp_path_factory.mktemp("layouts"), launcher, iters=ITERS)


@pytest.mark.parametrize("name", SELECTED)
def test_agrees_with_one_rank(name: str, comparison: Comparison) -> None:
    assert name in LAYOUTS
    if "packed" in name and compat.megatron_version().release < (0, 18):
        pytest.skip("the built-in pre-training reads packed documents from Megatron-Core 0.18 on")
    difference = comparison.difference(name)
    assert difference.agrees, difference


def test_the_table_covers_what_is_promised() -> None:
    assert len(LAYOUTS) == len(set(LAYOUTS))
    single = [name for name in LAYOUTS if "bf16" not in name]
    assert len(single) >= 24 and 3 * (len(LAYOUTS) - len(single)) >= len(single)
    assert {num_ranks(name) for name in LAYOUTS} == {1, 2, 4, 8, 16}
