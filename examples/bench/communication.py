"""``bench communication``: collectives and bytes of a training step, RoPE against FoPE.

FoPE rotates what a rank already has, so frozen coefficients must not add a single call or byte. Learnable
ones are parameters: their gradients are reduced with all others, and over the tensor-parallel ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.table import markdown
from megatron_fope.common.errors import UserError, exit_on_user_error

MARKDOWN = "communication.md"
_EXAMPLES = Path(__file__).resolve().parents[1]
TP2, CP2, PP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "context", "pipeline-model"))
DISTRIBUTED = "--use-distributed-optimizer"

LAYOUTS: dict[str, tuple[int, str]] = {
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "CP2": (2, CP2),
    "DP2": (2, ""),
    "DP2 distributed optimizer": (2, DISTRIBUTED),
    "PP2": (2, PP2),
    "TP2 SP CP2 distributed optimizer": (4, f"{TP2} --sequence-parallel {CP2} {DISTRIBUTED}"),
    "PP2 DP2 distributed optimizer": (4, f"{PP2} {DISTRIBUTED}"),
}
"""Name to ranks and Megatron flags."""

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4 "
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion"
)

Volume = dict[str, list[int]]
"""``{collective: [calls, bytes]}``; bytes of the larger of input and output, summed over ranks."""


def measure(layout: str, *, cpu: bool = True) -> dict[str, Any]:
    """Count one training step of every twin in a layout.

    Args:
        layout: key of :data:`LAYOUTS`.
        cpu: use gloo on the CPU; otherwise the layout's number of GPUs.

    Returns:
        ``{"different": collectives in which RoPE and frozen FoPE differ on some rank, "rope": Volume,
        "fope": Volume, "fope learnable": Volume}``.

    Raises:
        UserError: the launch failed.
    """
    num_ranks, flags = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_ranks), "-m", "bench.communication"),
            *("cpu" if cpu else "cuda", str(result), *flags.split()),
        ]
        path = os.pathsep.join(filter(None, [str(_EXAMPLES), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
        if done.returncode or not result.is_file():
            sys.stderr.write(done.stdout[-2000:] + done.stderr[-6000:])
            raise UserError(f"the launch of {layout} with {num_ranks} ranks failed; its last output is above")
        return json.loads(result.read_text())


def run(layouts: list[str], out: Path, *, cpu: bool) -> int:
    """Measure layouts, print and write the table.

    Returns:
        The number of layouts in which frozen FoPE communicates other than RoPE does.
    """
    from bench import results

    rows, different = [], 0
    for layout in layouts:
        volumes = measure(layout, cpu=cpu)
        different += bool(volumes["different"])
        new = _rows(layout, volumes)
        print(*(" | ".join(row) for row in new), sep="\n", flush=True)
        rows += new
    header = ["layout", "collective", "RoPE", "FoPE, frozen", "the same", "FoPE, learnable"]
    text = f"""\
# Communication of a training step

`python examples/bench communication`, commit {results.commit()}: calls and bytes of one step of a small GPT,
summed over all ranks. "The same" compares every single call on every rank.

{markdown(header, rows, left=2)}
"""
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKDOWN).write_text(text)
    print(f"\n{text}")
    return different


def _rows(layout: str, volumes: dict[str, Any]) -> list[list[str]]:
    kinds = ("rope", "fope", "fope learnable")
    rows = []
    for name in sorted(set().union(*(volumes[kind] for kind in kinds))):
        rope, fope, learnable = (_show(volumes[kind].get(name, [0, 0])) for kind in kinds)
        same = "**no**" if name in volumes["different"] else "yes"
        rows.append([layout, name, rope, fope, same, learnable])
    return rows


def _show(volume: list[int]) -> str:
    calls, size = volume
    return f"{calls} calls, {size:,} B"


# One rank ---------------------------------------------------------------------------------------------


def count(function: Any) -> Counter[tuple[str, int]]:
    """Every collective that a function starts on this rank, in the forward and in the backward pass.

    Seen where torch hands a call to its process group, so that no spelling of it is missed.

    Returns:
        How often each ``(collective, bytes)`` occurred.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: Counter[tuple[str, int]] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if "c10d" in func.namespace:
                name = func.name().partition("::")[2].strip("_")
                seen[name, max(map(_bytes, args), default=0)] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return seen


def _bytes(argument: Any) -> int:
    import torch
    from torch.utils._pytree import tree_leaves

    return sum(x.numel() * x.element_size() for x in tree_leaves(argument) if isinstance(x, torch.Tensor))


def worker(device: str, result: str, flags: list[str]) -> None:
    """Count all twins on this rank; rank 0 writes the sum over ranks."""
    from bench.twins import KINDS, Twin, initialize
    from megatron_fope import compat

    initialize([*MODEL.split(), *compat.null_tokenizer_flags(128), *flags], cpu=device == "cpu")
    import torch

    counted = {}
    for kind in KINDS:
        twin = Twin(kind)
        twin.step()  # the first step also creates what later ones reuse
        counted[kind] = count(twin.step)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, counted)
    if torch.distributed.get_rank() == 0:
        report: dict[str, Any] = {"different": sorted(_differences(everyone))}
        for kind in KINDS:
            volume: Volume = {}
            for rank in everyone:
                for (name, size), calls in rank[kind].items():
                    entry = volume.setdefault(name, [0, 0])
                    entry[0] += calls
                    entry[1] += calls * size
            report[kind] = volume
        Path(result).write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _differences(everyone: list[dict[str, Counter[tuple[str, int]]]]) -> set[str]:
    """Collectives that a rank started another number of times, or with other sizes, in the FoPE twin."""
    if not any(rank["rope"] for rank in everyone):
        raise RuntimeError("no collective was seen at all: this torch calls them differently")
    different = set()
    for rank in everyone:
        for key in rank["rope"].keys() | rank["fope"].keys():
            if rank["rope"][key] != rank["fope"][key]:
                different.add(key[0])
    return different


if __name__ == "__main__":
    with exit_on_user_error():
        worker(sys.argv[1], sys.argv[2], sys.argv[3:])
