"""What CUDA graphs, offloading and compilation rely on: no value is read back, nothing depends on data.

No GPU is needed to prove it: PyTorch tags every operation that reads a value or makes a shape out of one, and
its fake tensors have a device and no values.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fope import compat
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.kernels import cache
from megatron_fope.layers import embedding, positions
from megatron_fope.layers.embedding import FourierEmbedding

TOKENS, KV_HEADS, HEAD_DIM = 24, 2, 16


class NoReadBack(TorchDispatchMode):
    """Fails on operations whose result on the host, or whose shape, depends on values."""

    FORBIDDEN = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not self.FORBIDDEN & set(func.tags), f"{func} depends on values"
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_the_check_notices() -> None:
    x = torch.arange(3)
    for read in (lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x.nonzero(), lambda: x[x > 1]):
        with pytest.raises(AssertionError, match="depends on values"), NoReadBack():
            read()


def module(device: str, **settings: Any) -> FourierEmbedding:
    config = SimpleNamespace(kv_channels=HEAD_DIM, num_query_groups=KV_HEADS)
    fope = FoPEConfig.from_profile(train_length=48, **settings)
    return FourierEmbedding(config, fope, layer=1).to(device)


def queries_and_keys(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.ones(TOKENS, 1, heads, HEAD_DIM, device=device, requires_grad=True)
        for heads in (2 * KV_HEADS, KV_HEADS)
    )


def packed(device: str, ranks: int = 1, **fields: Any) -> dict[str, Any]:
    """``PackedSeqParams`` of two documents on so many context-parallel ranks."""
    empty = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_q_padded", "cp_group", "local_cp_size"))
    lengths = torch.tensor([0, 8, ranks * TOKENS], dtype=torch.int32).to(device)
    params = {"qkv_format": "thd", **empty, "cu_seqlens_q": lengths, **fields}
    return {"packed_seq_params": SimpleNamespace(**params)}


class Group:
    """The second of two ranks."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


GROUP = Group()


def dynamic(device: str) -> dict[str, Any]:
    ids = torch.arange(TOKENS).to(device)
    view = SimpleNamespace(token_to_pos_ids=ids)
    context = SimpleNamespace(is_static_batching=lambda: False, token_to_pos_ids=ids, gpu_view=view)
    return {"inference_context": context}


def static(device: str) -> dict[str, Any]:
    context = SimpleNamespace(is_static_batching=lambda: True, sequence_len_offset=37)
    return {"inference_context": context}


CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda device: {},
    "context parallel": lambda device: {"cp_group": GROUP},
    "packed": packed,
    "packed, padded, context parallel": lambda device: {
        **packed(device, 2, cu_seqlens_q_padded=torch.tensor([0, 12, 2 * TOKENS]).to(device)),
        "cp_group": GROUP,
    },
    "packed, own group": lambda device: packed(device, 2, cp_group=GROUP, local_cp_size=2),
    "static batching": static,
    "static batching, offset in a tensor": lambda device: {
        **static(device),
        "sequence_len_offset": torch.full((3,), 37, dtype=torch.int32).to(device),
    },
    "dynamic batching": dynamic,
    "position ids": lambda device: {"position_ids": torch.arange(TOKENS).add(3)[None].to(device)},
}


@pytest.fixture(autouse=True)
def values_are_checked_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads them; these tests let it stand for a GPU."""
    monkeypatch.setattr(
        positions, "check_values", lambda ok, message, explain=None: torch._assert_async(ok.all(), message)
    )


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "BASES", cache.VersionedCache())


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_no_value_is_read(call: str, learnable: bool) -> None:
    """On the CPU with real values, forward and backward."""
    fope, (query, key) = module("cpu", learnable=learnable), queries_and_keys("cpu")
    arguments = CALLS[call]("cpu")
    with NoReadBack() as mode:
        torch.autograd.backward([x.sum() for x in fope(query, key, **arguments)])
    assert mode.seen > 10 and query.grad is not None


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    ("call", "device"), [*((call, "cuda") for call in CALLS), *((call, "cpu") for call in CALLS)]
)
def test_runs_without_values(call: str, learnable: bool, device: str) -> None:
    """Forward and backward on the CPU; forward on a GPU, where autograd would need a real one."""
    fope = module("cpu", learnable=learnable, backend="torch")
    with FakeTensorMode() as mode:
        for tensors in (fope._buffers, fope._parameters):
            for name, tensor in tensors.items():
                tensors[name] = mode.from_tensor(tensor).to(device).detach()
                tensors[name].requires_grad_(tensor.requires_grad)
        query, key = queries_and_keys(device)
        rotated = fope(query, key, **CALLS[call](device))
        assert [x.shape for x in rotated] == [query.shape, key.shape]
        assert all(x.device.type == device for x in rotated)
        if device == "cpu":
            torch.autograd.backward([x.sum() for x in rotated])
            assert query.grad is not None
        with pytest.raises(DataDependentOutputException):
            rotated[0].sum().item()


@pytest.mark.parametrize("call", CALLS)
def test_forward_registers_nothing(call: str) -> None:
    fope, (query, key) = module("cpu"), queries_and_keys("cpu")
    tensors = dict(fope.named_buffers()) | dict(fope.named_parameters())
    names, addresses = set(vars(fope)), {name: t.data_ptr() for name, t in tensors.items()}
    for _ in range(2):
        fope(query, key, **CALLS[call]("cpu"))
    assert set(vars(fope)) == names
    after = dict(fope.named_buffers()) | dict(fope.named_parameters())
    assert {name: t.data_ptr() for name, t in after.items()} == addresses


# CUDA graphs


def saved_bases(fope: FourierEmbedding, **arguments: Any) -> list[torch.Tensor]:
    """The sin and cos basis that a call saves for its backward pass."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fope(*queries_and_keys("cpu"), **arguments)
    bases = [t for t in saved if t.shape == (TOKENS, fope.inv_freq.numel())]
    assert len(bases) == 2
    return bases


def test_a_captured_graph_keeps_the_basis_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many other lengths come afterwards, their memory is not that of the graph."""
    fope = module("cpu")
    warm = saved_bases(fope)
    monkeypatch.setattr(cache, "is_capturing", lambda: True)
    captured = saved_bases(fope)
    assert [t.data_ptr() for t in captured] == [t.data_ptr() for t in warm]
    alive = [weakref.ref(t) for t in captured]
    del warm, captured
    monkeypatch.setattr(cache, "is_capturing", lambda: False)
    for length in range(1, 9):
        fope(*(t[:length] for t in queries_and_keys("cpu")))
    gc.collect()
    assert all(ref() is not None for ref in alive)


def test_a_graph_of_packed_documents_computes_its_positions_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay brings new lengths in the same memory, so nothing of the warm-up may be baked in."""
    fope, arguments = module("cpu"), packed("cpu")
    warm = saved_bases(fope, **arguments)
    assert saved_bases(fope, **arguments)[0] is warm[0], "outside a capture, layers share it"
    monkeypatch.setattr(cache, "is_capturing", lambda: True)
    captured = saved_bases(fope, **arguments)
    assert captured[0] is not warm[0] and torch.equal(captured[0], warm[0])


# Offloading


@pytest.mark.parametrize("arguments", [{}, packed("cpu")], ids=["plain", "packed"])
def test_fine_grained_offloading_leaves_the_basis_on_the_device(arguments: dict[str, Any]) -> None:
    """Asked of the installed Megatron, about the very tensors that autograd hands to its hooks."""
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    handler = object.__new__(offload.ChunkOffloadHandler)
    handler.min_offloaded_tensor_size = 1
    if hasattr(handler, "_can_manage_tensor_for_offload"):  # 0.19: asks for a CUDA tensor
        handler._can_manage_tensor_for_offload = lambda tensor: True
    assert handler.tensor_need_offloading_checker(torch.ones(4)), "would move what is not marked"
    for basis in saved_bases(module("cpu"), **arguments):
        assert not handler.tensor_need_offloading_checker(basis)


def test_marked_tensors_stay_themselves() -> None:
    tensor = torch.ones(2)
    assert compat.keep_on_device(tensor) is tensor
