"""Run a Megatron training script, unmodified, with FoPE registered."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError


def run_script(path: str, arguments: list[str], *, cpu: bool = False) -> None:
    """Run a script as ``python path arguments`` would, with FoPE registered.

    The script's folder comes first on ``sys.path``, so a Megatron-LM checkout wins over the wheel.

    Args:
        path: a Python file, ``pretrain_gpt.py`` for example.
        arguments: its arguments.
        cpu: train on the CPU with gloo.

    Raises:
        UserError: the file is missing, or there is no GPU and ``cpu`` is not given.
    """
    if not Path(path).is_file():
        raise UserError(f"the training script is {path!r}; use an existing Python file")
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.argv = [path, *arguments]
    prepare(cpu=cpu, built_in=False)
    runpy.run_path(path, run_name="__main__")


def run_pretraining(
    arguments: list[str], *, cpu: bool = False, check: Callable[[Any], None] | None = None
) -> None:
    """GPT pre-training from the ``megatron-core`` wheel alone, with FoPE registered.

    Args:
        arguments: Megatron's arguments.
        cpu: train on the CPU with gloo.
        check: called with Megatron's arguments, as its parser makes them, before a model is built.

    Raises:
        UserError: there is no GPU and ``cpu`` is not given.
    """
    sys.argv = ["megatron-fope pretrain", *arguments]
    prepare(cpu=cpu)
    from megatron_fope.training import pretrain

    pretrain.main(check)


def prepare(*, cpu: bool, built_in: bool = True) -> None:
    """Everything between the command line and Megatron: device, process environment, registration.

    Args:
        cpu: install the CPU runtime; ``sys.argv`` then gets the flags that the CPU needs.
        built_in: the built-in training is used, not a script of Megatron-LM's.

    Raises:
        UserError: there is no GPU and ``cpu`` is not given, Megatron is not supported, or a checkout of it
            cannot compile its data helpers.
    """
    if not cpu and not {"-h", "--help"} & set(sys.argv):
        import torch  # before Megatron, whose import takes long and warns about missing libraries

        if not torch.cuda.is_available():
            raise UserError(
                "no CUDA device is visible; put --cpu in front of the script to train on the CPU with gloo"
            )
    from megatron_fope import compat

    compat.require_supported_megatron()
    if built_in:
        compat.require_built_in_training()
    if "RANK" not in os.environ:
        _single_process_environment()
    if cpu:
        from megatron_fope import cpu as cpu_runtime

        sys.argv[1:] = cpu_runtime.add_argument_defaults(sys.argv[1:])  # bad flags fail before slow imports
        cpu_runtime.enable()
    compat.prepare_dataset_helpers()
    from megatron_fope.training.registration import register

    register()


def _single_process_environment() -> None:
    """What ``torchrun`` would set for one process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**defaults, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        os.environ.setdefault(name, str(value))
