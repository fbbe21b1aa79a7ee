"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from example_scripts import site
from forks import Launcher
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401
from trainer import Trainer


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Training runs without a new import of Megatron for every one."""
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Trainer:
    """Trains the tiny model on prepared text."""
    return Trainer(tmp_path_factory.mktemp("runs"), launcher)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a site; in CHECKPOINT, Megatron sees a checkpoint until it loads it."""
    return site(tmp_path_factory.mktemp("site"))
