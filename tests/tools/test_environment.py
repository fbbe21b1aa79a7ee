"""``megatron-fope env`` in this environment and in others that are put together here."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_fope import __version__, compat
from megatron_fope.tools import environment


def env(*flags: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from megatron_fope.tools.cli import main; sys.exit(main(['env', *sys.argv[1:]]))"
    if path is not None:
        code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def here() -> dict:
    done = env("--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_installed(here: dict) -> None:
    packages = {package["name"]: package for package in here["packages"]}
    assert packages["torch"]["version"] == importlib.metadata.version("torch")
    assert here["megatron_fope"] == __version__ and here["support"].startswith("supported: Megatron-Core")
    for package in packages.values():
        assert package["version"] is not None or package["problem"], package
    assert len(here["gpus"]) == torch.cuda.device_count()


def test_what_megatron_uses(here: dict) -> None:
    """Read off Megatron itself, which says the same in its warnings."""
    packages = {package["name"]: package for package in here["packages"]}
    if packages["transformer-engine"]["version"] is None and packages["apex"]["version"] is None:
        assert here["backends"]["Adam"].startswith("PyTorch (a fallback")
        assert here["backends"]["gradient norm and clipping"].startswith("Megatron's own")
    assert set(here["backends"]) == {
        "Adam",
        "gradient norm and clipping",
        "norm of local layers",
        "gradient accumulation fusion",
        "FoPE's rotation",
    }


def test_another_apex_is_named(tmp_path: Path) -> None:
    """PyPI's project of that name would be found, and Megatron would fail inside it."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    done = env(path=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("apex ")]
    assert "not NVIDIA's apex" in line


def test_a_library_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(
        "raise OSError('libcudart.so.12: no such file')"
    )
    package = environment._PACKAGES["transformer-engine"]
    sys.path.insert(0, str(tmp_path))
    try:
        found = environment._package("transformer-engine", *package)
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
    assert found.problem == "cannot be imported: OSError: libcudart.so.12: no such file"


ERRORS = {
    "OSError('libcudart.so.12: no such file')": "OSError: libcudart.so.12: no such file",
    "RuntimeError('built for CUDA 11\\nand more')": "RuntimeError: built for CUDA 11",
    "AttributeError()": "AttributeError",
    "ImportError('undefined symbol: _ZN3c10')": "ImportError: undefined symbol: _ZN3c10",
    "ModuleNotFoundError('no einops', name='einops')": "ModuleNotFoundError: no einops",
    "SystemExit(3)": "SystemExit: 3",
}

BROKEN = """
import importlib, json, pathlib, sys
from megatron_fope.tools import environment

root, errors = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, (module, advice) in environment._PACKAGES.items():
    for number, error in enumerate(errors):
        for depth in range(module.count(".") + 1):  # the package itself, or the part of it that is used
            parts = module.split(".")
            folder = root / f"{name} {number} {depth}"
            for level in range(len(parts)):
                package = folder.joinpath(*parts[: level + 1])
                package.mkdir(parents=True)
                (package / "__init__.py").write_text(f"raise {error}" if level == depth else "")
            if name == "apex":
                (package / "optimizers.py").write_text("")
            sys.path.insert(0, str(folder))
            importlib.invalidate_caches()
            found[f"{name}, {error}, {depth}"] = environment._package(name, module, advice).problem
            sys.path.remove(str(folder))
            for loaded in [m for m in sys.modules if m.split(".")[0] == parts[0]]:
                del sys.modules[loaded]
print(json.dumps(found))
"""


def test_every_library_may_be_broken_in_every_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path), json.dumps(list(ERRORS))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= len(environment._PACKAGES) * len(ERRORS)
    for case, problem in found.items():
        assert problem == f"cannot be imported: {ERRORS[case.split(', ', 1)[1].rsplit(', ', 1)[0]]}", case


@pytest.mark.parametrize(
    ("library", "error", "code"),
    [
        ("transformer_engine", "OSError('libcudart.so.12: no such file')", 1),  # Megatron dies of it as well
        ("deepspeed", "RuntimeError('built for CUDA 11')", 0),  # Megatron does without
        ("torch", "OSError('libtorch.so: no such file')", 1),
    ],
)
def test_the_command_explains_a_broken_library(library: str, error: str, code: int, tmp_path: Path) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(f"print('noise')\nraise {error}")
    (tmp_path / library / "pytorch.py").write_text("")
    done = env(path=tmp_path)
    name, reason = library.replace("_", "-"), error.split("'")[1]
    assert "Traceback" not in done.stderr and "noise" not in done.stdout, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
    assert "cannot be imported" in line and reason in line
    (support,) = [line for line in done.stdout.splitlines() if line.startswith("support ")]
    assert done.returncode == code and (reason in support) is bool(code), support


@pytest.mark.parametrize(
    ("module", "name", "library"),
    [
        ("transformer_engine.pytorch.optimizers", "FusedAdam", "Transformer Engine"),
        ("transformer_engine_torch", "multi_tensor_l2norm", "Transformer Engine"),
        ("apex.optimizers", "FusedAdam", "apex"),
        ("amp_C", "multi_tensor_l2norm", "apex"),
        ("torch.optim.adamw", "AdamW", "PyTorch"),
        ("somewhere", "Adam", "unknown"),
    ],
)
def test_whose_optimizer(module: str, name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = type(name, (), {"__module__": module})
    fake = ModuleType("fake")
    fake.Adam, fake.l2_norm_impl, fake.LNImpl, fake._grad_accum_fusion_available = (
        chosen,
        chosen,
        chosen,
        True,
    )
    monkeypatch.setattr(compat.backends.importlib, "import_module", lambda wanted: fake)
    found = compat.chosen_libraries()
    assert found["Adam"] == found["gradient norm and clipping"] == library
    assert found["gradient accumulation fusion"] == "apex"
