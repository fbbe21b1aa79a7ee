"""FoPE with frozen coefficients sends exactly what RoPE sends."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bench import communication
from forks import Launcher

LAYOUTS = ("TP2 SP CP2 distributed optimizer", "PP2 DP2 distributed optimizer")


@pytest.mark.launch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_coefficients_add_no_communication(layout: str, launcher: Launcher, tmp_path: Path) -> None:
    ranks, flags = communication.LAYOUTS[layout]
    result, log = tmp_path / "result.json", tmp_path / "log"
    code, text = launcher.call(communication.worker, "cpu", str(result), flags.split(), log=log, nproc=ranks)
    assert code == 0, text[-6000:]
    volumes = json.loads(result.read_text())
    assert volumes["different"] == []
    assert volumes["rope"] == volumes["fope"]
    seen = set(volumes["rope"])
    if layout.startswith("TP2"):
        assert {"allgather_base", "reduce_scatter_base", "allreduce"} <= seen
    else:
        assert {"send", "recv", "allreduce"} <= seen
    assert any(name.startswith("reduce_scatter_tensor") for name in seen), "the distributed optimizer's"
    # Learnable ones are parameters: more bytes to reduce, and over TP ranks calls of their own.
    calls, size = (
        sum(volumes["fope learnable"][name][i] - volumes["fope"][name][i] for name in volumes["fope"])
        for i in (0, 1)
    )
    assert size > 0 and (calls > 0) == layout.startswith("TP2")


@pytest.mark.launch
def test_measured_under_torchrun() -> None:
    volumes = communication.measure("DP2")
    assert volumes["different"] == [] and volumes["rope"] == volumes["fope"] != {}


class AllReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_counting(one_rank: None) -> None:
    """Every spelling, both directions, and the larger of input and output."""

    def step() -> None:
        x = torch.ones(4, requires_grad=True)
        AllReduceBackward.apply(x).sum().backward()
        dist.all_gather_into_tensor(torch.empty(6), torch.empty(6))
        dist.all_reduce(torch.ones(3, dtype=torch.bfloat16), async_op=True).wait()
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))

    assert communication.count(step) == Counter(
        {("allreduce", 16): 1, ("allreduce", 6): 1, ("allgather_base", 24): 1}
    )


def test_one_call_more_on_one_rank_is_found() -> None:
    def rank(*fope: tuple[str, int]) -> dict[str, Counter]:
        return {"rope": Counter([("allreduce", 8), ("send", 4)]), "fope": Counter(fope)}

    same = rank(("allreduce", 8), ("send", 4))
    assert communication._differences([same, same]) == set()
    assert communication._differences([same, rank(("allreduce", 8), ("send", 4), ("send", 4))]) == {"send"}
    assert communication._differences([same, rank(("allreduce", 12), ("send", 4))]) == {"allreduce"}
    assert communication._differences([same, rank(("send", 4))]) == {"allreduce"}
    with pytest.raises(RuntimeError, match="no collective was seen"):
        communication._differences([{"rope": Counter(), "fope": Counter()}])
