"""Every supported Megatron release but the installed one, which all other tests use: a smoke set.

``.ci/setup-env`` puts the wheels into folders of their own, where a launched process finds them first.
``MEGATRON_LM=/path/to/Megatron-LM`` adds that checkout.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
from forks import Launcher
from launch import ROOT, TINY_MODEL, losses, prepared_release
from packaging.version import Version

from megatron_fope.compat import SUPPORTED_CHECKOUTS, SUPPORTED_MEGATRON, megatron_version

pytestmark = pytest.mark.launch

TRAINED = ("0.17.1", "0.18.2")
"""Releases besides the installed one that train through the flag."""
LAYER_SPEC_ONLY = "0.16.1"
"""Its wheel has no training loop."""
CHECKOUT = "MEGATRON_LM"

WHICH_MEGATRON = """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("megatron."):
        print(getattr(module, "__file__", None))
sys.exit(0)
"""
FOPE = ("--position-embedding-type", "fope")


@dataclass
class Release:
    """A Megatron to put in front of the installed one."""

    name: str
    folder: Path
    launcher: Launcher
    """Its own fork server."""

    @property
    def environment(self) -> dict[str, str]:
        more = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT), *([more] if more else [])])}

    def train(self, log: Path, *flags: str, nproc: int = 1) -> str:
        """Train the tiny model with the built-in pre-training; the log."""
        command = ["--cpu", "pretrain", *TINY_MODEL, *FOPE, *flags]
        return self.launcher.output(nproc, command, log)

    def passes(self, config: pytest.Config, file: str) -> int:
        """Run a file of tests for ranks under this release; how many passed, where none may fail."""
        found = ranks.run(self.launcher, config, 1, ROOT / "tests" / file, [])
        reports = [report for reports in found.values() for report in reports]
        assert [f"{r.nodeid}:\n{r.longreprtext}" for r in reports if r.failed] == []
        return sum(report.when == "call" and report.passed for report in reports)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Release]]:
    """A release by its name; all tests of a release share its server."""
    log = tmp_path_factory.mktemp("releases") / "log"
    with contextlib.ExitStack() as stack:

        @functools.cache
        def release(name: str) -> Release:
            folder = Path(os.environ[CHECKOUT]).resolve() if name == CHECKOUT else prepared_release(name)
            assert (folder / "megatron").is_dir(), f"use make setup: {folder} lacks Megatron-Core"
            launcher = stack.enter_context(Launcher(folder))
            used = launcher.output(1, [], log, hook=WHICH_MEGATRON)
            assert f"{folder}/megatron/core/" in used and "site-packages/megatron/" not in used
            return Release(name, folder, launcher)

        yield release


@dataclass
class Trained:
    """Four iterations of a release, saved after the second and the fourth."""

    release: Release
    log: str
    folder: Path

    def resume(self, *flags: str, nproc: int = 1) -> list[float]:
        """Losses of a run that continues after the second iteration."""
        start = ("--load", str(self.folder), "--ckpt-step", "2", "--train-iters", "4")
        return losses(self.release.train(self.folder / "resumed.log", *start, *flags, nproc=nproc))


@pytest.fixture(scope="module", params=[*TRAINED, *([CHECKOUT] if CHECKOUT in os.environ else [])])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    releases: Callable[[str], Release],
) -> Trained:
    chosen, folder = releases(request.param), tmp_path_factory.mktemp("release")
    flags = ("--train-iters", "4", "--save", str(folder / "saved"), "--save-interval", "2")
    return Trained(chosen, chosen.train(folder / "log", *flags), folder / "saved")


@pytest.fixture(scope="module")
def installed_losses(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The same run on the installed release."""
    command = ["--cpu", "pretrain", *TINY_MODEL, *FOPE, "--train-iters", "4"]
    return losses(launcher.output(1, command, tmp_path_factory.mktemp("installed") / "log"))


def test_trains_with_fope(trained: Trained, installed_losses: list[float]) -> None:
    assert "> FoPE: profile paper, train length 64" in trained.log
    found = losses(trained.log)
    assert len(found) == 4 and found[-1] < found[0] - 0.3
    if trained.release.name in ("0.17.1", CHECKOUT):
        # 0.16 and 0.17 draw their initial weights in another order.
        assert found == pytest.approx(installed_losses, abs=0.1)
    else:
        assert found == installed_losses


def test_resuming_equals_going_on(trained: Trained) -> None:
    third, fourth = losses(trained.log)[2:]
    first, second = trained.resume()
    # See launch.losses: the second number after a start is the mean of two.
    assert first == third and 2 * second - first == pytest.approx(fourth, abs=3e-6)


def test_one_ranks_checkpoint_continues_on_two(trained: Trained) -> None:
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--exit-interval", "3")
    assert trained.resume(*layout, nproc=2) == pytest.approx([losses(trained.log)[2]], abs=1e-5)


@pytest.mark.parametrize("file", ["training/test_registration.py", "arguments/test_flags.py"])
def test_registration(file: str, trained: Trained, pytestconfig: pytest.Config) -> None:
    assert trained.release.passes(pytestconfig, file) > 10


@pytest.mark.parametrize(
    ("file", "at_least"), [("model", 15), ("spec", 4), ("mla", 4), ("tensors", 4), ("position_ids", 5)]
)
def test_layer_spec_without_a_training_loop(
    file: str, at_least: int, releases: Callable[[str], Release], pytestconfig: pytest.Config
) -> None:
    """Real models, forward, backward and in inference, on the wheel that has ``megatron.core`` alone."""
    assert releases(LAYER_SPEC_ONLY).passes(pytestconfig, f"layers/test_{file}.py") >= at_least


def test_flag_without_a_training_loop_is_refused(releases: Callable[[str], Release]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fope", "--cpu", "pretrain", *TINY_MODEL, *FOPE],
        env=os.environ | releases(LAYER_SPEC_ONLY).environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = [text for text in done.stderr.splitlines() if "error:" in text]
    assert done.returncode == 2 and line.startswith("megatron-fope: error: --position-embedding-type fope")
    assert "Megatron-Core 0.16.1" in line and ">=0.17" in line and "with_fope" in line


def test_every_release_is_covered() -> None:
    """The folders that are made, the releases tested here, and the supported range are the same."""
    made = (ROOT / ".ci" / "setup-env").read_text().split('other_releases="')[1].split('"')[0].split()
    assert made == [LAYER_SPEC_ONLY, *TRAINED]
    assert [name for name in TRAINED if Version(name) not in SUPPORTED_MEGATRON] == []
    assert Version(LAYER_SPEC_ONLY) in SUPPORTED_CHECKOUTS
    minors = {Version(name).minor for name in (LAYER_SPEC_ONLY, *TRAINED)} | {megatron_version().minor}
    assert {16, 17, 18} <= minors and megatron_version() in SUPPORTED_MEGATRON
