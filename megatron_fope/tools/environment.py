"""``megatron-fope env``: versions, GPUs and back ends of this environment, for bug reports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import sys
from dataclasses import dataclass, field
from typing import Any

from megatron_fope import __version__, compat
from megatron_fope.common.errors import UserError
from megatron_fope.common.log import quiet_imports

_PACKAGES = {
    "torch": ("torch", ""),
    "megatron-core": ("megatron.core", ""),
    "transformer-engine": (
        "transformer_engine.pytorch",
        "pip install 'megatron-fope[te]'; for --transformer-impl transformer_engine, Megatron's default",
    ),
    "apex": (
        "apex",
        "optional, from github.com/NVIDIA/apex; the apex on PyPI is another project",
    ),
    "triton": ("triton", "comes with PyTorch for CUDA; needed for --fope-backend triton"),
    "flash-attn": ("flash_attn", "optional"),
    "mamba-ssm": ("mamba_ssm", "optional, for Mamba layers of hybrid models"),
    "deepspeed": ("deepspeed", "optional"),
    "transformers": ("transformers", "pip install 'megatron-fope[hf]'; for Hugging Face tokenizers"),
    "tensorboard": ("tensorboard", "pip install 'megatron-fope[demo]'"),
    "matplotlib": ("matplotlib", "pip install 'megatron-fope[demo]'; for pictures"),
}
"""Distribution: the module to import, and what to do when it is missing."""


@dataclass
class Package:
    """One library."""

    name: str
    version: str | None
    """None: not installed."""
    problem: str = ""
    """Why it cannot be used, or how to get it."""

    def __str__(self) -> str:
        return (self.version or "not installed") + (f" ({self.problem})" if self.problem else "")


@dataclass
class Environment:
    """What ``megatron-fope env`` prints."""

    megatron_fope: str
    python: str
    system: str
    cuda: str
    """Of PyTorch's build, and whether a GPU is seen."""
    gpus: list[str]
    packages: list[Package]
    support: str
    """Whether this Megatron-Core is supported."""
    backends: dict[str, str] = field(default_factory=dict)
    """What Megatron and FoPE use, by purpose."""


def read_environment() -> Environment:
    """Look at the environment; imports every library of it, which may fail, and changes nothing."""
    packages = {name: _package(name, *facts) for name, facts in _PACKAGES.items()}
    broken = {name: p.problem for name, p in packages.items() if p.problem and p.version is not None}
    cuda, gpus = _cuda() if "torch" not in broken else ("unknown: PyTorch cannot be imported", [])
    environment = Environment(
        megatron_fope=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cuda=cuda,
        gpus=gpus,
        packages=list(packages.values()),
        support=_support(broken),
    )
    if environment.support.startswith("supported"):
        try:
            environment.backends = _backends()
        except Exception as error:
            environment.support = f"not supported: Megatron-Core cannot be imported: {_first_line(error)}"
    return environment


def render(environment: Environment) -> str:
    """The report as text."""
    rows = [
        ("megatron-fope", environment.megatron_fope),
        ("Python", environment.python),
        ("system", environment.system),
        ("GPU", environment.cuda),
        *(("", gpu) for gpu in environment.gpus),
        ("", ""),
        *((package.name, str(package)) for package in environment.packages),
        ("", ""),
        ("support", environment.support),
    ]
    if environment.backends:
        rows += [("", ""), ("What runs here:", ""), *environment.backends.items()]
    width = 1 + max(map(len, [*_PACKAGES, *environment.backends]))
    return "\n".join(f"{name:{width}} {text}".rstrip() for name, text in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 1 where training with FoPE cannot work."""
    with quiet_imports(), contextlib.redirect_stdout(io.StringIO()):
        environment = read_environment()
    text = json.dumps(dataclasses.asdict(environment), indent=2) if arguments.json else render(environment)
    print(text)
    return 0 if environment.support.startswith("supported") else 1


def _package(name: str, module: str, advice: str) -> Package:
    """Import the library, as a run would: one that is there may not fit PyTorch, CUDA or this machine."""
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(name)
    try:
        if name == "apex" and importlib.util.find_spec("apex.optimizers") is None:
            return Package(name, version, "not NVIDIA's apex: Megatron cannot use it; pip uninstall apex")
        importlib.import_module(module)
        if name == "megatron-core":
            version = str(compat.megatron_version())
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module}.".startswith(f"{missing}."):
            return Package(name, None, advice)
        return Package(name, version or "version unknown", f"cannot be imported: {_first_line(error)}")
    return Package(name, version or "version unknown")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def _cuda() -> tuple[str, list[str]]:
    """What PyTorch is built for, and the GPUs that it sees."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu: Any = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        gpus.append(f"{index}: {gpu.name}, {memory}, compute {gpu.major}.{gpu.minor}")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    visible = f"{len(gpus) or 'no'} GPU{'' if len(gpus) == 1 else 's'} visible"
    return f"PyTorch is built for {built}; {visible}", gpus


def _backends() -> dict[str, str]:
    from megatron_fope.kernels import backend

    found = compat.chosen_libraries()
    for purpose, library in found.items():
        if library not in ("Transformer Engine", "apex", "unknown"):
            found[purpose] += " (a fallback: neither Transformer Engine nor NVIDIA's apex can be used)"
    found["FoPE's rotation"] = str(backend.choose("auto", backend.current_device()))
    return found


def _support(broken: dict[str, str]) -> str:
    for name in ("torch", "megatron-core"):
        if name in broken:
            return f"not supported: {name} {broken[name]}"
    try:
        version = compat.require_megatron_core()
    except UserError as error:
        return f"not supported: {error}"
    if not compat.has_training_loop():
        return (
            f"supported: Megatron-Core {version}, the layer spec only (its wheel has no training loop; the "
            f"flag needs {compat.SUPPORTED_MEGATRON} or a checkout)"
        )
    return f"supported: Megatron-Core {version} (the range is {compat.SUPPORTED_CHECKOUTS})"
