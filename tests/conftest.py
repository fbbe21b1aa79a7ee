"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forks import Launcher
from trainer import Trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Trains the tiny model on prepared text, without a new import of Megatron for every run."""
    with Launcher() as launcher:
        yield Trainer(tmp_path_factory.mktemp("runs"), launcher)
