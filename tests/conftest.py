"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from example_scripts import site
from forks import Launcher
from ranks import fork_server, pytest_runtest_protocol  # noqa: F401
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401
from trainer import Trainer

collect_ignore = ["serving"]
"""Tests that need environments of their own; make targets name their files."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that launch come first: the short ones then fill the gaps that are left between the processes."""
    launching = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in launching)


@pytest.fixture(scope="session")
def launcher(pytestconfig: pytest.Config) -> Launcher:
    """Training runs without a new import of Megatron for every one."""
    return fork_server(pytestconfig)


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Trainer:
    """Trains the tiny model on prepared text."""
    return Trainer(tmp_path_factory.mktemp("runs"), launcher)


@pytest.fixture(scope="module")
def model_parallel() -> Iterator[None]:
    """Megatron's process groups, all ranks data-parallel; for tests that run on ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a site; in CHECKPOINT, Megatron sees a checkpoint until it loads it."""
    return site(tmp_path_factory.mktemp("site"))
