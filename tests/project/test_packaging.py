"""The distributions that ``python -m build`` makes, and the wheel where nothing else of this project is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from launch import ROOT, TINY_MODEL, losses

from megatron_fope import __version__


def run(*words: str | Path, **options: str | Path) -> str:
    """Standard output and error of a command that succeeds, without this checkout on Python's path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist_and_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel is built from the source distribution, so that one lacks nothing that building needs."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    name = f"megatron_fope-{__version__}"
    return folder / f"{name}.tar.gz", folder / f"{name}-py3-none-any.whl"


def files(*folders: str, pattern: str = "*") -> set[str]:
    """Paths below the root of what the folders hold."""
    return {
        str(path.relative_to(ROOT))
        for folder in folders for path in (ROOT / folder).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip


def test_distributions_are_ready_for_an_index(sdist_and_wheel: tuple[Path, Path]) -> None:
    assert run(sys.executable, "-m", "twine", "check", "--strict", *sdist_and_wheel).count("PASSED") == 2


def test_the_wheel_holds_the_package_alone(sdist_and_wheel: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(sdist_and_wheel[1]).namelist()
    held = {name for name in names if not name.startswith(f"megatron_fope-{__version__}.dist-info/")}
    assert held == files("megatron_fope", pattern="*.py") | {"megatron_fope/py.typed"}


def test_the_source_distribution_holds_what_tests_and_documentation_need(
    sdist_and_wheel: tuple[Path, Path],
) -> None:
    with tarfile.open(sdist_and_wheel[0]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files(".ci", "docs", "examples", "megatron_fope", "patches", "tests") <= held
    assert held >= {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}


@pytest.mark.launch
def test_the_wheel_alone_trains(sdist_and_wheel: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which sees what is installed here except this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (site_packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    binaries = tmp_path / "venv" / "bin"
    install = ("install", "--quiet", "--no-deps", "--no-index", sdist_and_wheel[1])
    run(sys.executable, "-m", "pip", "--python", binaries / "python", *install)
    # Python reads no further .pth files in folders that a .pth file adds: editable installs stay out.
    installed = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    (site_packages / "installed.pth").write_text("\n".join(installed))

    place = run(
        binaries / "python", "-c", "import megatron_fope; print(megatron_fope.__file__)", cwd=tmp_path
    )
    assert Path(place.strip()).is_relative_to(site_packages)
    assert "prepare-data" in run(binaries / "megatron-fope", "--help", cwd=tmp_path)
    assert str(binaries) in run(binaries / "megatron-fope", "env", cwd=tmp_path)
    fope = ("--position-embedding-type", "fope")
    log = run(binaries / "megatron-fope", "--cpu", "pretrain", *TINY_MODEL, *fope, cwd=tmp_path)
    assert "> FoPE" in log and len(losses(log)) == 3, log[-3000:]
