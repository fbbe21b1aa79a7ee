"""Every supported Megatron release but the installed one, which all other tests use: a smoke set.

``.ci/setup-env`` puts the wheels into folders of their own, where a launched process finds them first.
``MEGATRON_LM=/path/to/Megatron-LM`` adds that checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import ROOT, TINY_MODEL, losses, prepared_release, torchrun
from packaging.version import Version

from megatron_fope.compat import SUPPORTED_CHECKOUTS, SUPPORTED_MEGATRON, megatron_version

pytestmark = pytest.mark.launch

TRAINED = ("0.17.1", "0.18.2")
"""Releases besides the installed one that train through the flag."""
LAYER_SPEC_ONLY = "0.16.1"
"""Its wheel has no training loop."""
CHECKOUT = "MEGATRON_LM"

SCRIPTS = ROOT / "tests" / "scripts"
FOPE = ("--position-embedding-type", "fope")


@dataclass
class Release:
    """A Megatron to put in front of the installed one."""

    name: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        more = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT), *([more] if more else [])])}

    def train(self, *flags: str, nproc: int = 1) -> str:
        """Train the tiny model with the built-in pre-training; the log."""
        command = ["-m", "megatron_fope", "--cpu", "pretrain", *TINY_MODEL, *FOPE, *flags]
        done = torchrun(nproc, command, env=self.environment)
        assert done.returncode == 0, done.stdout[-6000:]
        self.check_what_ran(done.stdout)
        return done.stdout

    def script(self, name: str) -> dict[str, str | None]:
        """Run one of the scripts of checks: each check's traceback or None."""
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / name)],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        self.check_what_ran(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def check_what_ran(self, log: str) -> None:
        """Megatron warns about missing libraries, and each warning names the file that it comes from."""
        assert f"{self.folder}/megatron/core/" in log
        assert "site-packages/megatron/" not in log


def release(name: str) -> Release:
    """The release's folder."""
    if name == CHECKOUT:
        return Release(name, Path(os.environ[CHECKOUT]).resolve())
    folder = prepared_release(name)
    assert (folder / "megatron" / "__init__.py").is_file(), f"use make setup: {folder} lacks Megatron-Core"
    return Release(name, folder)


@dataclass
class Trained:
    """Four iterations of a release, saved after the second and the fourth."""

    release: Release
    log: str
    folder: Path

    def resume(self, *flags: str, nproc: int = 1) -> list[float]:
        """Losses of a run that continues after the second iteration."""
        start = ("--load", str(self.folder), "--ckpt-step", "2", "--train-iters", "4")
        return losses(self.release.train(*start, *flags, nproc=nproc))


@pytest.fixture(scope="module", params=[*TRAINED, *([CHECKOUT] if CHECKOUT in os.environ else [])])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    chosen, folder = release(request.param), tmp_path_factory.mktemp("release")
    log = chosen.train("--train-iters", "4", "--save", str(folder), "--save-interval", "2")
    return Trained(chosen, log, folder)


@pytest.fixture(scope="module")
def installed_losses() -> list[float]:
    """The same run on the installed release."""
    command = ["-m", "megatron_fope", "--cpu", "pretrain", *TINY_MODEL, *FOPE, "--train-iters", "4"]
    done = torchrun(1, command)
    assert done.returncode == 0, done.stdout[-6000:]
    return losses(done.stdout)


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


def test_registration(trained: Trained) -> None:
    outcomes = trained.release.script("registration_checks.py")
    assert len(outcomes) > 10
    assert {name: text for name, text in outcomes.items() if text is not None} == {}


def test_layer_spec_without_a_training_loop() -> None:
    """Real models, forward, backward and in inference, on the wheel that has ``megatron.core`` alone."""
    outcomes = release(LAYER_SPEC_ONLY).script("model_checks.py")
    assert len(outcomes) > 20
    assert {name: text for name, text in outcomes.items() if text is not None} == {}


def test_flag_without_a_training_loop_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fope", "--cpu", "pretrain", *TINY_MODEL, *FOPE],
        env=os.environ | release(LAYER_SPEC_ONLY).environment,
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
