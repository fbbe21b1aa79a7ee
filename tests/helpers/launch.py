"""Helpers of tests that start real Megatron training processes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).resolve().parents[2]

TINY_MODEL = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 "
    "--train-iters 3 --log-interval 1 --eval-iters 0 --eval-interval 100 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32 "
    "--attention-dropout 0 --hidden-dropout 0"
)
"""Flags of a model that trains in a second and whose losses do not depend on the parallel layout."""

LATENT = shlex.split(
    "--multi-latent-attention --rope-type rope --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 16 --v-head-dim 16 --num-query-groups 4"
)
"""Multi-latent attention for the tiny model; it has no groups: leave ``--group-query-attention`` out."""

_LOSS = re.compile(r"iteration +\d+/.*?\| lm loss: ([-+.\dEe]+|nan)")


def prepared_release(name: str) -> Path:
    """The folder in which ``.ci/setup-env`` puts ``megatron`` of a release besides the installed one."""
    return Path(sys.prefix) / "megatron-core" / name


def torchrun(
    nproc: int, argv: Sequence[str], env: dict[str, str] | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a command under ``torchrun`` on this machine, with this checkout importable.

    Args:
        nproc: number of processes.
        argv: what follows torchrun's own flags, e.g. ``["-m", "megatron_fope", "--cpu", "pretrain", ...]``.
        env: environment variables to add.
        timeout: seconds after which the run counts as hung.

    Returns:
        The finished process; ``stdout`` holds standard output and error of torchrun and of each rank in turn:
        written into one pipe, their lines would break each other.
    """
    port = free_port()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="torchrun-") as logs:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nproc-per-node", str(nproc), "--master-addr", "localhost", "--master-port", str(port)),
                *("--redirects", "3", "--log-dir", logs),
                *argv,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        ranks = [log.read_text(errors="replace") for log in sorted(Path(logs).rglob("std*.log"))]
    done.stdout = "".join([done.stdout, *ranks])
    return done


def losses(log: str) -> list[float]:
    """The training losses that Megatron logged, in order.

    The second number after a start is the mean of the first two iterations: Megatron logs the first
    iteration of every run without clearing its sums.
    """
    return [float(value) for value in _LOSS.findall(log)]
