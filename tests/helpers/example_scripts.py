"""The programs of ``examples/``: loaded as modules, run; what Megatron's parser says to their commands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from forks import Launcher
from launch import ROOT
from megatron_arguments import validate_all

EXAMPLES = ROOT / "examples"


def load(name: str, *argv: str) -> ModuleType:
    """A Python program as a module, named relative to ``examples/``, as if called with these arguments."""
    path = EXAMPLES / name
    spec = spec_from_file_location("example_" + name.removesuffix(".py").replace("/", "_"), path)
    module = module_from_spec(spec)
    with (
        patch.object(sys, "argv", [str(path), *argv]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        patch.dict(sys.modules, {spec.name: module}),  # dataclasses look there
    ):
        spec.loader.exec_module(module)
    return module


def site(folder: Path) -> dict[str, str]:
    """Variables of a site, with files in ``folder`` that exist but hold nothing."""
    for name in ("a.bin", "a.idx", "b.bin", "b.idx", "base/latest_checkpointed_iteration.txt", "tokenizer/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("100")
    return {
        "CHECKPOINT": str(folder / "base"),
        "DATA_PATH": f"0.5 {folder / 'a'} 0.5 {folder / 'b'}",
        "TOKENIZER": str(folder / "tokenizer"),
        "MASTER_ADDR": "node0",
    }


def script(name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script, named relative to ``examples/``, with these variables and no others of its own."""
    environment = {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", str(EXAMPLES / name), *flags],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(name: str, *flags: str, **variables: str) -> list[str]:
    """The launch command that ``DRY_RUN=1`` prints, the last line."""
    done = script(name, *flags, DRY_RUN="1", **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def error(name: str, *flags: str, **variables: str) -> str:
    """The one line of a script that refuses to start, without the script's name."""
    done = script(name, *flags, **variables)
    assert done.returncode == 2 and done.stdout == "", (done.stdout, done.stderr)
    start = f"{Path(name).name}: error: "
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix(start).rstrip("\n")


def executable(file: Path, text: str) -> None:
    """A command for PATH."""
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)


def fake_slurm(folder: Path) -> dict[str, str]:
    """A job on one node whose ``srun`` runs the task here and writes its process id to ``task``."""
    executable(
        folder / "srun", f'[[ $1 == --kill-on-bad-exit=1 ]] && echo $$ > "{folder}/task" && exec "${{@:2}}"'
    )
    executable(
        folder / "scontrol",
        f'if [[ $1 == show ]]; then echo node7; else echo "$@" >> "{folder}/scontrol.log"; fi',
    )
    return {
        "PATH": os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"])),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node7",
    }  # fmt: skip


def ranks_and_flags(command: list[str]) -> dict[str, Any]:
    """What torchrun makes of a command."""
    ranks = 1
    for flag in ("--nproc-per-node", "--nnodes"):
        ranks *= int(command[command.index(flag) + 1])
    assert command[command.index("-m") : command.index("-m") + 2] == ["-m", "megatron_fope"]
    return {"ranks": ranks, "flags": command[command.index("pretrain") + 1 :]}


def parse(launcher: Launcher, folder: Path, commands: dict[str, list[str]]) -> dict[str, Any]:
    """What Megatron's parser and validation say to every command, on the CPU, in one process."""
    cases = {name: ranks_and_flags(command) for name, command in commands.items()}
    code, log = launcher.call(validate_all, cases, str(folder / "parsed"), log=folder / "parsed.log")
    assert code == 0, log[-4000:]
    return json.loads((folder / "parsed").read_text())
