"""One basis serves all layers, in memory for one, and a new step never gets that of the step before."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.kernels.cache import VersionedCache
from megatron_fope.layers import embedding
from megatron_fope.layers.embedding import FourierEmbedding

TOKENS, LAYERS = 6, 6


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a basis is made; the cache is empty."""
    monkeypatch.setattr(embedding, "BASES", VersionedCache())
    calls: list[int] = []
    real = functional.fourier_basis
    monkeypatch.setattr(functional, "fourier_basis", lambda *args: calls.append(1) or real(*args))
    return calls


def layers(count: int = LAYERS, **settings: Any) -> list[FourierEmbedding]:
    config = SimpleNamespace(kv_channels=16, num_query_groups=1)
    fope = FoPEConfig.from_profile(**{"train_length": 64} | settings)
    return [FourierEmbedding(config, fope, layer=number) for number in range(1, count + 1)]


def rotate(module: FourierEmbedding, tokens: int = TOKENS, **arguments: Any) -> Tensor:
    query, key = (torch.ones(tokens, 1, heads, 16, requires_grad=True) for heads in (2, 1))
    return module(query, key, **arguments)[0]


def packed(lengths: Tensor) -> dict[str, Any]:
    empty = dict.fromkeys(("cu_seqlens_q_padded", "cp_group", "local_cp_size"))
    return {"packed_seq_params": SimpleNamespace(qkv_format="thd", cu_seqlens_q=lengths, **empty)}


def saved(modules: list[FourierEmbedding], **arguments: Any) -> dict[int, Tensor]:
    """Bases that autograd keeps for the backward passes, by address."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for module in modules:
            rotate(module, **arguments).sum().backward()
    return found


@pytest.mark.parametrize("arguments", [{}, packed(torch.tensor([0, 2, TOKENS]))], ids=["plain", "packed"])
@pytest.mark.parametrize("exact", [False, True])
def test_all_layers_keep_the_same_two_tensors(
    exact: bool, arguments: dict[str, Any], built: list[int]
) -> None:
    bases = saved(layers(exact_angles=exact), **arguments)
    assert len(bases) == 2 and len(built) == 1
    assert {basis.dtype for basis in bases.values()} == {torch.float32}


@pytest.mark.parametrize("what", ["documents", "lengths"])
def test_only_the_basis_of_the_moment_is_kept(what: str) -> None:
    (module,) = layers(1)
    kept: list[weakref.ref[Tensor]] = []
    for number in range(1, 6):
        if what == "documents":
            bases = saved([module], **packed(torch.tensor([0, number, TOKENS])))
        else:
            bases = saved([module], tokens=number + 1)
        kept += map(weakref.ref, bases.values())
        del bases
    gc.collect()
    assert sum(ref() is not None for ref in kept) == 2


def test_models_do_not_drive_each_other_out(built: list[int]) -> None:
    """A teacher and a student, for example."""
    models = [layers(2), layers(2, train_length=48)]
    for _ in range(3):
        for module in (*models[0], *models[1]):
            rotate(module)
    assert len(built) == 2


class Dynamic:
    """The positions of a dynamic batch, in the same memory in every step."""

    def __init__(self) -> None:
        self.token_to_pos_ids = torch.zeros(TOKENS, dtype=torch.long)
        self.numbers = None if self.token_to_pos_ids.is_inference() else self.token_to_pos_ids.numpy()

    def is_static_batching(self) -> bool:
        return False

    def step(self, number: int) -> dict[str, Any]:
        self.token_to_pos_ids.copy_(torch.arange(TOKENS) * (number + 1))
        return {"inference_context": self}


class Uncounted(Dynamic):
    """Written by a kernel that PyTorch knows nothing of."""

    def step(self, number: int) -> dict[str, Any]:
        self.numbers[:] = torch.arange(TOKENS) * (number + 1)
        return {"inference_context": self}


class Static:
    sequence_len_offset = 0

    def is_static_batching(self) -> bool:
        return True

    def step(self, number: int) -> dict[str, Any]:
        self.sequence_len_offset = 5 * number
        return {"inference_context": self}


class StaticGraph(Static):
    """The offset in one tensor, as in a layer whose graph is replayed."""

    def __init__(self) -> None:
        self.offset = torch.zeros(1, dtype=torch.int32)

    def step(self, number: int) -> dict[str, Any]:
        self.offset.fill_(5 * number)
        return super().step(number) | {"sequence_len_offset": self.offset}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [Dynamic, Uncounted, Static, StaticGraph])
def test_inference_makes_one_basis_per_step(kind: type, mode: Any, built: list[int]) -> None:
    modules = layers()
    if kind is Uncounted and mode is torch.inference_mode:
        context = kind()  # made before, so that its memory can be written to here
    with mode():
        if kind is not Uncounted or mode is torch.no_grad:
            context = kind()
        for number in range(4):
            arguments = context.step(number)
            before = len(built)
            found = [rotate(module, **arguments) for module in modules]
            assert len(built) == before + 1, number
            for module, result in zip(modules, found, strict=True):
                embedding.BASES.clear()
                assert torch.equal(result, rotate(module, **arguments)), number


@pytest.mark.parametrize("kind", [Dynamic, Static, StaticGraph])
def test_a_step_between_two_layers_is_noticed(kind: type) -> None:
    """Nobody does that, except tests of single layers."""
    first, second = layers(2)
    context = kind()
    rotate(first, **context.step(1))
    after = rotate(second, **context.step(2))
    embedding.BASES.clear()
    assert torch.equal(after, rotate(second, **context.step(2)))


def test_training_after_inference() -> None:
    """What inference mode made must serve autograd."""
    first, second = layers(2)
    with torch.inference_mode():
        rotate(first, **Static().step(0))
        rotate(first)
    rotate(second).sum().backward()


def test_threads_with_other_lengths() -> None:
    modules = layers()
    expected = {n: [rotate(module, n) for module in modules] for n in range(1, 5)}
    failures: list[Any] = []

    def work(tokens: int) -> None:
        try:
            for _ in range(50):
                for module, alone in zip(modules, expected[tokens], strict=True):
                    assert torch.equal(rotate(module, tokens), alone)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
