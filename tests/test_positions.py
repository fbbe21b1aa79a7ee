"""Positions of every layout against the position a token has in one undivided sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fope import compat
from megatron_fope.errors import UserError
from megatron_fope.positions import inference_positions, local_positions, packed_positions, sequence_positions

SIZES = [1, 2, 3, 4, 8]


class Group:
    """A process group's two questions."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def zigzag(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Megatron's share of one rank: chunks ``rank`` and ``2 * size - 1 - rank`` of ``2 * size``."""
    chunks = whole.chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_context_parallel_ranks(size: int, chunk: int) -> None:
    whole = torch.arange(2 * size * chunk)
    for rank in range(size):
        expected = zigzag(whole, rank, size) if size > 1 else whole
        assert torch.equal(sequence_positions(whole.numel() // size, cp_rank=rank, cp_size=size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_packed_documents_start_at_zero(size: int) -> None:
    lengths = [2 * size * n for n in (1, 7, 3, 1, 20)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for rank in range(size):
        documents = [torch.arange(n) for n in lengths]
        expected = torch.cat([zigzag(d, rank, size) if size > 1 else d for d in documents])
        got = packed_positions(expected.numel(), cu_seqlens, cp_rank=rank, cp_size=size)
        assert torch.equal(got, expected)


# What the installed Megatron hands to every rank. --cp-comm-type (p2p, all_gather, a2a, a2a+p2p) is not a
# case of these tests because it comes later: the batch is cut before the model sees it, the same way for all,
# and Transformer Engine restores the order inside its attention, after queries and keys are rotated.


@pytest.fixture
def megatrons_share(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """``megatrons_share(positions, rank, size, cu_seqlens)``: the positions of one rank's tokens.

    The tokens of the batch are their own positions. The group is one of PyTorch's fakes, whose ranks exist
    without processes.
    """
    import torch.distributed as dist
    from megatron.core import utils
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(utils, "tex", SimpleNamespace(thd_get_partitioned_indices=partitioned_indices))
    monkeypatch.setattr(utils, "is_te_min_version", lambda *_, **__: True)

    def share(positions: torch.Tensor, rank: int, size: int, cu_seqlens: Any = None) -> torch.Tensor:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            batch: dict[str, Any] = {"tokens": positions[None], "labels": positions[None]}
            cut = utils.get_batch_on_this_cp_rank
            if cu_seqlens is not None and hasattr(utils, "get_thd_batch_on_this_cp_rank"):  # 0.17
                longest = cu_seqlens.diff().max()[None]
                batch, _ = utils.get_thd_batch_on_this_cp_rank(
                    batch, cu_seqlens, cu_seqlens, longest, cp_size=size, cp_rank=rank
                )
                return batch["tokens"][0]
            routing = {"is_hybrid_cp": False, "cp_group": dist.group.WORLD}
            if cu_seqlens is not None:
                batch |= {"cu_seqlens": cu_seqlens[None], "cu_seqlens_padded": None}
            return cut(batch, **compat.known_parameters(cut, routing))["tokens"][0]
        finally:
            dist.destroy_process_group()

    return share


def partitioned_indices(cu_seqlens: torch.Tensor, num_tokens: int, size: int, rank: int) -> torch.Tensor:
    """``thd_get_partitioned_indices`` of Transformer Engine, in words: half of a rank's share of a document
    comes from its front and the other half from the same distance to its end."""
    indices: list[int] = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        half = (end - start) // size // 2
        indices += range(start + rank * half, start + (rank + 1) * half)
        indices += range(end - (rank + 1) * half, end - rank * half)
    assert bounds[-1] == num_tokens
    return torch.tensor(indices, dtype=torch.int32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_sequences_as_megatron_cuts_them(
    size: int, chunk: int, megatrons_share: Callable[..., torch.Tensor]
) -> None:
    whole = torch.arange(2 * size * chunk)
    for rank in range(size):
        expected = megatrons_share(whole, rank, size)
        got = local_positions(whole.numel() // size, cp_group=Group(rank, size))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", SIZES)
def test_packed_documents_as_megatron_cuts_them(
    size: int, megatrons_share: Callable[..., torch.Tensor]
) -> None:
    lengths = [2 * size * n for n in (3, 1, 1, 10, 7)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    whole = torch.cat([torch.arange(n) for n in lengths])
    params = packed(cu_seqlens_q=cu_seqlens)
    for rank in range(size):
        expected = megatrons_share(whole, rank, size, cu_seqlens)
        got = local_positions(whole.numel() // size, cp_group=Group(rank, size), packed_seq_params=params)
        assert torch.equal(got, expected)


def packed(**fields: Any) -> SimpleNamespace:
    """``PackedSeqParams`` of documents one after the other."""
    empty = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_q_padded", "cp_group", "local_cp_size"))
    return SimpleNamespace(**{"qkv_format": "thd", **empty, **fields})


def test_odd_packed_lengths_and_tokens_behind_the_last_document() -> None:
    cu_seqlens = torch.tensor([0, 400, 542, 711, 727, 752, 1270, 1426])
    expected = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])
    got = packed_positions(1500, cu_seqlens)
    assert torch.equal(got[:1426], expected)
    assert torch.equal(got[1426:], torch.arange(156, 156 + 74))


def test_padded_lengths_win_over_unpadded_ones() -> None:
    params = packed(cu_seqlens_q=torch.tensor([0, 3, 8]), cu_seqlens_q_padded=torch.tensor([0, 4, 12]))
    expected = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(local_positions(12, packed_seq_params=params), expected)
    params.cu_seqlens_q_padded = None
    assert torch.equal(local_positions(8, packed_seq_params=params), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "neither cu_seqlens_q nor cu_seqlens_q_padded"),
        ({"cu_seqlens_q": torch.tensor([[0, 3, 8]])}, "cu_seqlens_q has shape (1, 3)"),
        ({"cu_seqlens_q_padded": torch.tensor([0])}, "cu_seqlens_q_padded has shape (1,)"),
    ],
)
def test_missing_document_lengths_are_named(fields: dict[str, torch.Tensor], part: str) -> None:
    with pytest.raises(UserError) as error:
        local_positions(8, packed_seq_params=packed(**fields))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_per_sample_group_wins_over_the_layers() -> None:
    params = SimpleNamespace(qkv_format="sbhd", cp_group=Group(0, 2), local_cp_size=2)
    layer = Group(3, 4)
    own = local_positions(8, cp_group=layer, packed_seq_params=params)
    assert torch.equal(own, torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]))
    undivided = SimpleNamespace(qkv_format="sbhd", cp_group=None, local_cp_size=1)
    assert torch.equal(local_positions(8, cp_group=layer, packed_seq_params=undivided), torch.arange(8))
    plain = local_positions(8, cp_group=layer)
    assert torch.equal(plain, torch.arange(12, 20))


def test_per_sample_groups_of_packed_documents() -> None:
    """0.18 and later: one document per sample, on its own group."""
    cu_seqlens = torch.tensor([0, 16])
    own = packed(cu_seqlens_q=cu_seqlens, cp_group=Group(1, 2), local_cp_size=2)
    assert local_positions(8, cp_group=Group(3, 4), packed_seq_params=own).tolist() == list(range(4, 12))
    undivided = packed(cu_seqlens_q=cu_seqlens, local_cp_size=1)
    assert local_positions(16, cp_group=Group(3, 4), packed_seq_params=undivided).tolist() == list(range(16))


def test_static_inference_continues_behind_the_cache() -> None:
    context = SimpleNamespace(is_static_batching=lambda: True, sequence_len_offset=37)
    assert inference_positions(1, context).tolist() == [37]
    assert inference_positions(3, context).tolist() == [37, 38, 39]


def test_dynamic_inference_reads_the_device_copy_where_there_is_one() -> None:
    bookkeeping = torch.full((8,), -1)
    device_copy = torch.tensor([5, 0, 1, 2, 9, 0, 0, 0], dtype=torch.int32)
    new = SimpleNamespace(
        is_static_batching=lambda: False,
        token_to_pos_ids=bookkeeping,
        gpu_view=SimpleNamespace(token_to_pos_ids=device_copy),
    )
    old = SimpleNamespace(is_static_batching=lambda: False, token_to_pos_ids=device_copy)
    for context in (new, old):
        assert inference_positions(5, context).tolist() == [5, 0, 1, 2, 9]
