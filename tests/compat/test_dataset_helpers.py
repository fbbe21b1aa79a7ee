"""Megatron compiles its data helpers at start-up: with this interpreter, or one line says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_fope import UserError, compat

MAKEFILE = """\
CPPFLAGS += $(shell python3 -m pybind11 --includes)

LIBNAME = helpers_cpp
LIBEXT = $(shell python3-config --extension-suffix)

OUT = $(LIBNAME)$(LIBEXT)

default: $(OUT)

$(OUT): helpers.cpp
\techo "$(CPPFLAGS)" > $@
"""
"""Megatron's, without the compiler."""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a checkout keeps the helpers; ``python3`` on PATH is an interpreter without pybind11."""
    import megatron.core.datasets.utils as dataset_utils

    folder, other = tmp_path / "datasets", tmp_path / "bin"
    folder.mkdir()
    other.mkdir()
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "helpers.cpp").touch()
    for name in ("python3", "python3-config"):
        (other / name).write_text("#!/bin/sh\necho wrong\n")
        (other / name).chmod(0o755)
    monkeypatch.setattr(dataset_utils, "__file__", str(folder / "utils.py"))
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("flags", ["", "k", "-k -- OTHER=1"])
def test_made_with_this_interpreter(checkout: Path, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ``python3`` is first on PATH, also when a ``make`` started us; what is made is made once."""
    from megatron.core.datasets.utils import compile_helpers

    monkeypatch.setenv("MAKEFLAGS", flags)
    for _ in range(2):
        compat.prepare_dataset_helpers()
        subprocess.run(["make", "-C", str(checkout)], check=True)
        assert {path.name for path in checkout.iterdir()} == {
            "Makefile", "helpers.cpp", f"helpers_cpp{SUFFIX}"
        }  # fmt: skip
    made = (checkout / f"helpers_cpp{SUFFIX}").read_text()
    own = subprocess.run([sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True)
    assert made == own.stdout and "-I" in made
    assert os.environ["PATH"].split(os.pathsep).count(str(Path(sys.executable).parent)) == 1
    assert os.environ["MAKEFLAGS"].count("LIBEXT=") == 1
    compile_helpers()  # Megatron's own, which exits if it fails


@pytest.mark.parametrize(
    "name,said",
    [
        ("make", "make"),
        ("g++", "a C++ compiler"),
        ("pybind11", "pybind11 (pip install pybind11)"),
        ("Python.h", "the headers of Python (python3-dev)"),
    ],
)
def test_what_is_missing(name: str, said: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training; and only ``make`` is needed where the helpers are compiled already."""
    from megatron_fope.compat import data

    monkeypatch.delenv("CXX", raising=False)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda program: None if program == name else which(program))
    monkeypatch.setattr(data, "find_spec", lambda module: None if module == name else module)
    if name == "Python.h":
        monkeypatch.setattr(sysconfig, "get_path", lambda scheme: str(checkout))
    with pytest.raises(UserError) as refused:
        compat.prepare_dataset_helpers()
    assert str(refused.value) == (
        f"Megatron compiles its data helpers in {str(checkout)!r}, which requires {said}"
    )
    (checkout / f"helpers_cpp{SUFFIX}").touch()
    if name != "make":
        compat.prepare_dataset_helpers()


def test_nothing_to_make_in_a_wheel(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.datasets.utils as dataset_utils

    (checkout / "Makefile").unlink()
    monkeypatch.setattr(dataset_utils, "compile_helpers", dataset_utils.compile_helpers)
    path = os.environ["PATH"]
    compat.prepare_dataset_helpers()
    dataset_utils.compile_helpers()
    assert os.environ["PATH"] == path
