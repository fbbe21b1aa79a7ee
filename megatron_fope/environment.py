"""``megatron-fope env``: versions, GPUs and back ends of this environment, for bug reports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_fope import __version__, compat
from megatron_fope.errors import UserError

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
    "triton": ("triton", "comes with PyTorch for CUDA; needed for --fope-implementation triton"),
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
    """Look at the environment; imports Megatron, torch and what both use, and changes nothing."""
    import torch

    from megatron_fope import implementation

    packages = [_package(name, *facts) for name, facts in _PACKAGES.items()]
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    environment = Environment(
        megatron_fope=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cuda=f"PyTorch is built for {built}; {len(gpus) or 'no'} GPU{'' if len(gpus) == 1 else 's'} visible",
        gpus=gpus,
        packages=packages,
        support=_support(),
    )
    if next(p for p in packages if p.name == "megatron-core").version is not None:
        environment.backends = {p: _explained(x) for p, x in compat.chosen_libraries().items()}
        environment.backends["FoPE's rotation"] = str(
            implementation.choose("auto", implementation.current_device())
        )
    return environment


def render(environment: Environment) -> str:
    """The report as text."""
    width = 1 + max(map(len, [*_PACKAGES, *environment.backends]))
    lines = [
        f"{'megatron-fope':{width}} {environment.megatron_fope}",
        f"{'Python':{width}} {environment.python}",
        f"{'system':{width}} {environment.system}",
        f"{'GPU':{width}} {environment.cuda}",
        *(f"{'':{width}} {gpu}" for gpu in environment.gpus),
        "",
    ]
    for package in environment.packages:
        note = f" ({package.problem})" if package.problem else ""
        lines.append(f"{package.name:{width}} {package.version or 'not installed'}{note}")
    lines += ["", f"{'support':{width}} {environment.support}"]
    if environment.backends:
        lines += ["", "What runs here:"]
        lines += [f"{purpose:{width}} {library}" for purpose, library in environment.backends.items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 1 where training with FoPE cannot work."""
    with _quiet():
        environment = read_environment()
    text = json.dumps(dataclasses.asdict(environment), indent=2) if arguments.json else render(environment)
    print(text)
    return 0 if environment.support.startswith("supported") else 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what Megatron and PyTorch say about missing libraries when they are imported."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _package(name: str, module: str, advice: str) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        return Package(name, None, advice)
    if name == "megatron-core":
        return Package(name, str(compat.megatron_version()))
    if name == "apex" and importlib.util.find_spec("apex.optimizers") is None:
        return Package(name, version, "not NVIDIA's apex: Megatron cannot use it; pip uninstall apex")
    if name == "transformer-engine":  # the one that is often there and does not fit torch or CUDA
        try:
            importlib.import_module(module)
        except Exception as error:
            first = str(error).strip().splitlines()
            return Package(
                name, version, f"cannot be imported: {first[0] if first else type(error).__name__}"
            )
    return Package(name, version or "version unknown")


def _gpu(index: int) -> str:
    import torch

    facts: Any = torch.cuda.get_device_properties(index)
    return f"{index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"


def _support() -> str:
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


def _explained(library: str) -> str:
    if library in ("Transformer Engine", "apex", "unknown"):
        return library
    return f"{library} (a fallback: neither Transformer Engine nor NVIDIA's apex can be used)"
