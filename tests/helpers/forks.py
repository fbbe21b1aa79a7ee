"""Real training runs that share one import of Megatron, which takes longer than training a tiny model.

A server process imports everything once and forks the ranks of every run; each rank then does what
``python -m megatron_fope`` does under ``torchrun``. Runs do not see each other: what one changes in its
processes, a patch of Megatron for example, ends with them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ports import free_port

ROOT = Path(__file__).resolve().parents[2]


class Launcher:
    """Starts runs in a server process; a context manager.

    Args:
        megatron: a folder with another Megatron than the installed one.
    """

    def __init__(self, megatron: Path | None = None) -> None:
        self._megatron = megatron

    def __enter__(self) -> Launcher:
        folders = (self._megatron, ROOT, ROOT / "examples", os.environ.get("PYTHONPATH"))
        path = os.pathsep.join(str(folder) for folder in folders if folder)
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def run(
        self, nproc: int, argv: list[str], log: Path, *, hook: str = "", timeout: float = 300.0
    ) -> tuple[int, str]:
        """Run ``python -m megatron_fope <argv>`` on a number of ranks.

        When one rank fails, the others get a second to say something and are then killed, as under torchrun.

        Args:
            nproc: number of ranks.
            argv: ``["--cpu", "pretrain", ...]``.
            log: file for the output of all ranks.
            hook: Python that every rank executes first.
            timeout: seconds after which the run counts as hung.

        Returns:
            The first exit code that is not 0 (negative: a signal), else 0; and the output.
        """
        return self.call(_command, argv, hook, nproc=nproc, log=log, timeout=timeout)

    def call(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        log: Path,
        nproc: int = 1,
        timeout: float = 300.0,
    ) -> tuple[int, str]:
        """Call a function on every rank, as :meth:`run` runs a command; its result is the exit code.

        Args:
            function: of a module that the server can import.
            *arguments: what ``pickle`` can hold.
            log: file for the output of all ranks.
            nproc: number of ranks.
            timeout: seconds after which the call counts as hung.
        """
        call = pickle.dumps((function.__module__, function.__name__, arguments)).hex()
        request = {"call": call, "nproc": nproc, "log": str(log), "timeout": timeout}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server died"
        return json.loads(answer)["code"], log.read_text(errors="replace")

    def output(self, nproc: int, argv: list[str], log: Path, *, hook: str = "") -> str:
        """What :meth:`run` logs when it must succeed."""
        code, text = self.run(nproc, argv, log, hook=hook)
        assert code == 0, text[-6000:]
        return text


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    import_megatron()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"code": _run(**request)}), file=answers, flush=True)


def import_megatron() -> None:
    """Turn the CPU runtime on and import what a rank will need, also what Megatron imports while it runs."""
    from megatron_fope import cpu

    cpu.add_argument_defaults([])
    cpu.enable()
    import megatron_fope.layers.spec

    with contextlib.suppress(ImportError):  # the wheel of 0.16 has no training loop
        import megatron.core.tokenizers.text  # noqa: F401

        import megatron_fope.training.pretrain
        import megatron_fope.training.registration  # noqa: F401

        _fork_managers()


def _fork_managers() -> None:
    """Fork the process that collects the results of Megatron's checkpoint writers: it imports nothing."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    spawned = filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = functools.partial(spawned, mp_mode="fork")


def _command(argv: list[str], hook: str) -> int:
    exec(hook, {"__name__": "hook"})
    from megatron_fope.tools.cli import main

    return main(argv)


def _run(call: str, nproc: int, log: str, timeout: float) -> int:
    module, name, arguments = pickle.loads(bytes.fromhex(call))

    def action() -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return run_ranks(nproc, action, Path(log), timeout=timeout)


def run_ranks(nproc: int, action: Callable[[], Any], log: Path, *, timeout: float) -> int:
    """Fork ranks that all do the same, in an environment like torchrun's.

    Args:
        nproc: number of ranks.
        action: what each does; its result, if a number, is the exit code.
        log: file for the output of all ranks.
        timeout: seconds after which they are killed.

    Returns:
        The first exit code that is not 0 (negative: a signal), else 0.
    """
    port = free_port()
    with open(log, "wb") as output:
        ranks = [_fork(rank, nproc, port, action, output.fileno()) for rank in range(nproc)]
        return _wait(ranks, time.monotonic() + timeout)


def _fork(rank: int, nproc: int, port: int, action: Callable[[], Any], output: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()  # killing a rank's group reaches the writers that it started
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(line_buffering=True)  # whole lines: all ranks write into one file
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    numbers: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
    }
    for name, value in {**numbers, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        os.environ[name] = str(value)
    code: Any = 1
    try:
        code = action() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(ranks: list[int], deadline: float) -> int:
    """Exit code of the run; nothing that a rank has started outlives it."""
    running, code = set(ranks), 0
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                code = code or os.waitstatus_to_exitcode(status)
                _kill_group(pid)  # Megatron's checkpoint writers are processes of their own
        if code:
            deadline = min(deadline, time.monotonic() + 1.0)
        if running and time.monotonic() > deadline:
            code = code or 124
            for pid in running:
                _kill_group(pid)
        time.sleep(0.02)
    return code


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
