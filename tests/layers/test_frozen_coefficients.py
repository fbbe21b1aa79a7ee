"""Buffers that are written back between forward and backward, as Megatron does between its graph captures.

Its ``create_fwd_graph`` saves a layer's buffers before it warms up and captures, and writes all of them back,
unchanged, before ``create_bwd_graph`` captures the backward pass.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_fixtures import interpreter  # noqa: F401
from torch import Tensor

from megatron_fope.formula.config import FoPEConfig
from megatron_fope.kernels import cache, launch
from megatron_fope.layers import anneal, embedding
from megatron_fope.layers.embedding import FourierEmbedding

TOKENS, KV_HEADS, HEAD_DIM = 12, 2, 16
PACKED = SimpleNamespace(
    qkv_format="thd",
    cu_seqlens_q=torch.tensor([0, 5, TOKENS], dtype=torch.int32),
    cu_seqlens_q_padded=None,
    cp_group=None,
    local_cp_size=None,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "normalized": {"normalize": True, "init": "identity"},
    "one matrix for all heads": {"separate_heads": False},
    "one basis": {"separate_basis": False},
    "exact angles": {"exact_angles": True},
    "temperature": {"attention_scaling": 1.1},
    "shared by layers": {"profile": "intern-s1-pro"},
    "learnable": {"learnable": True},
    "annealed": {"anneal_iters": 4},
    "annealed, learnable": {"anneal_iters": 4, "learnable": True},
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BASES", cache.VersionedCache())
    monkeypatch.setattr(launch, "TABLES", cache.VersionedCache())


def layer(number: int = 1, **settings: Any) -> FourierEmbedding:
    config = SimpleNamespace(kv_channels=HEAD_DIM, num_query_groups=KV_HEADS)
    return FourierEmbedding(config, FoPEConfig.from_profile(**{"train_length": 48} | settings), layer=number)


def write_back(module: torch.nn.Module) -> None:
    for buffer in module.buffers():
        buffer.copy_(buffer.clone())


def gradients(module: FourierEmbedding, *, written: bool, packed: Any = None) -> list[Tensor]:
    """Of query, key and parameters."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(TOKENS, 1, heads, HEAD_DIM, generator=generator).requires_grad_()
        for heads in (2 * KV_HEADS, KV_HEADS)
    )
    rotated = module(query, key, packed_seq_params=packed)
    if written:
        write_back(module)
    leaves = [query, key, *module.parameters()]
    return [*torch.autograd.grad([x.square().sum() for x in rotated], leaves)]


@pytest.mark.parametrize("packed", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("name", SETTINGS)
def test_writing_buffers_back_does_no_harm(
    name: str, path: str, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anneal, "_progress", anneal._Progress(start=0, completed=1))
    module = layer(backend=path, **SETTINGS[name])
    expected = gradients(module, written=False, packed=packed)
    for _ in range(2):
        for a, b in zip(gradients(module, written=True, packed=packed), expected, strict=True):
            assert torch.equal(a, b)


# Tables of layers that share ----------------------------------------------------------------------------


def shared_layers(count: int = 4) -> list[FourierEmbedding]:
    return [layer(n, profile="intern-s1-pro", backend="triton") for n in range(1, count + 1)]


def capture(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    """Pretend to be in a capture; nothing may be read then."""
    monkeypatch.setattr(cache, "is_capturing", lambda: capturing)


def test_graphs_of_all_layers_share_one_pair_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = shared_layers()
    built = []
    real = launch.functional.fourier_tables
    monkeypatch.setattr(
        launch.functional, "fourier_tables", lambda *args, **kw: built.append(1) or real(*args, **kw)
    )
    expected = [gradients(module, written=False) for module in layers]
    for _ in range(2):  # graphs of two micro-batches
        for module, before in zip(layers, expected, strict=True):
            capture(monkeypatch, True)
            after = gradients(module, written=True)
            capture(monkeypatch, False)
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(built) == len(launch.TABLES) == 1
    assert [gradients(m, written=False)[0].equal(e[0]) for m, e in zip(layers, expected, strict=True)]
    assert len(built) == 1, "afterwards they are read again, found equal, and the tables still serve"


@pytest.mark.parametrize("capturing", [False, True])
def test_loading_makes_new_tables(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = shared_layers(2)
    before = gradients(first, written=False)
    state = {name: value * 2 for name, value in first.state_dict().items() if torch.is_tensor(value)}
    first.load_state_dict(state, strict=False)
    capture(monkeypatch, capturing)
    loaded = gradients(first, written=False)
    assert not torch.equal(loaded[0], before[0])
    assert torch.equal(gradients(second, written=False)[0], before[0]), "the others stay what they are"


def test_a_write_outside_of_graphs_makes_new_tables() -> None:
    first, second = shared_layers(2)
    before = gradients(first, written=False)[0]
    first.sin_coef.mul_(2)
    assert not torch.equal(gradients(first, written=False)[0], before)
    assert torch.equal(gradients(second, written=False)[0], before)


def test_threads_share_tables_without_harm() -> None:
    """Bases come and go in all of them; a graph's tables stay."""
    (module,) = shared_layers(1)
    generator = torch.Generator().manual_seed(1)
    coefficients = tuple(torch.randn(2, 3, 3, generator=generator) for _ in range(2))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(400):
                bases = (torch.full((2, 3), number), torch.full((2, 3), number))
                for _ in range(3):
                    found = launch.TABLES.get(
                        tuple(t.data_ptr() for t in bases),
                        lambda bases=bases: bases,
                        sources=coefficients,
                        owners=bases,
                    )
                    assert torch.equal(found[0], bases[0])
        except BaseException as error:
            failures.append(error)

    gradients(module, written=False)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(launch.TABLES) <= 4
