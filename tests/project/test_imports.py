"""The package's folders import downwards only, so that each can be read knowing nothing of those above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from launch import ROOT

PACKAGE = ROOT / "megatron_fope"
ROOMS = (
    "__main__",
    "tools",
    "training",
    "checkpoint",
    "arguments",
    "layers",
    "cpu",
    "kernels",
    "formula",
    "compat",
    "common",
)
"""What the package's root holds, from top to bottom: each imports only what is below it."""


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """The package's modules that a file imports: anywhere in it, or only when it is imported itself."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if inside_functions else tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name.partition(".")[0] == "megatron_fope":
                yield name


def room_of(module: str) -> str | None:
    """The entry of the package's root that a module belongs to; None: the root itself, which only exports."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_the_root_holds_these_rooms() -> None:
    found = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found == {"__init__", *ROOMS}


def test_rooms_import_downwards() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if room_of(module)
        and room_of(imported)
        and ROOMS.index(room_of(imported)) < ROOMS.index(room_of(module))
    ]
    assert upwards == []


def test_no_circles() -> None:
    """No module needs another one that needs it, when it is imported."""
    below = {module: set(imports(path, inside_functions=False)) for module, path in MODULES.items()}
    while leaves := {module for module, names in below.items() if not names & below.keys()}:
        for module in leaves:
            del below[module]
    assert sorted(below) == []
