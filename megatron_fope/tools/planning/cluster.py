"""The machines of a plan. Imports nothing heavy: bad input is told at once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fope.common.errors import UserError

GPUS = {"a100-40gb": 39, "a100": 79, "l40s": 44, "h100": 79, "h200": 139, "b200": 178}
"""GiB that CUDA reports for a GPU, rounded down."""

_MOST = 1_000_000


@dataclass(frozen=True)
class Cluster:
    """How many GPUs there are, and what each holds.

    Raises:
        UserError: a size outside what is allowed.
    """

    gpus: int
    gpu_memory: float
    """GiB (2^30 bytes) of a GPU."""
    gpus_per_node: int = 8
    margin: float = 0.1
    """Share of a GPU's memory that a plan leaves free for what it does not count."""

    def __post_init__(self) -> None:
        for flag, number in (("--gpus", self.gpus), ("--gpus-per-node", self.gpus_per_node)):
            if not 1 <= number <= _MOST:
                raise UserError(f"{flag} is {number}; allowed: 1 to {_MOST}")
        if not 0 < self.gpu_memory <= _MOST:
            raise UserError(f"--gpu-memory is {self.gpu_memory:g}; allowed: more than 0 to {_MOST} (GiB)")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus is {self.gpus}; allowed: a multiple of the {self.gpus_per_node} --gpus-per-node"
            )
        if not 0 <= self.margin < 1:
            raise UserError(f"--margin is {self.margin:g}; allowed: 0 to less than 1")

    @property
    def usable(self) -> float:
        """Bytes that a rank may use."""
        return self.gpu_memory * 2**30 * (1 - self.margin)

    def crosses_nodes(self, span: int) -> bool:
        """Whether a group that spans so many consecutive ranks leaves its node."""
        return span > self.gpus_per_node


def memory_of(gpu: str) -> float:
    """GiB of a GPU by its name.

    Raises:
        UserError: unknown name.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu is {gpu!r}; allowed: {', '.join(GPUS)} (or use --gpu-memory in GiB)")
    return GPUS[gpu]
