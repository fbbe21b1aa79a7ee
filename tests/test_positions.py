"""Positions of every layout against the position a token has in one undivided sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_fope.positions import inference_positions, local_positions, packed_positions, sequence_positions


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


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_context_parallel_ranks(size: int) -> None:
    whole = torch.arange(48)
    for rank in range(size):
        expected = zigzag(whole, rank, size) if size > 1 else whole
        assert torch.equal(sequence_positions(48 // size, cp_rank=rank, cp_size=size), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_documents_start_at_zero(size: int) -> None:
    lengths = [2 * size * n for n in (1, 7, 3, 1, 20)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for rank in range(size):
        documents = [torch.arange(n) for n in lengths]
        expected = torch.cat([zigzag(d, rank, size) if size > 1 else d for d in documents])
        got = packed_positions(expected.numel(), cu_seqlens, cp_rank=rank, cp_size=size)
        assert torch.equal(got, expected)


def test_odd_packed_lengths_and_tokens_behind_the_last_document() -> None:
    cu_seqlens = torch.tensor([0, 400, 542, 711, 727, 752, 1270, 1426])
    expected = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])
    got = packed_positions(1500, cu_seqlens)
    assert torch.equal(got[:1426], expected)
    assert torch.equal(got[1426:], torch.arange(156, 156 + 74))


def test_padded_lengths_win_over_unpadded_ones() -> None:
    params = SimpleNamespace(
        qkv_format="thd",
        cp_group=None,
        local_cp_size=None,
        cu_seqlens_q=torch.tensor([0, 3, 8]),
        cu_seqlens_q_padded=torch.tensor([0, 4, 12]),
    )
    expected = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(local_positions(12, packed_seq_params=params), expected)
    params.cu_seqlens_q_padded = None
    assert torch.equal(local_positions(8, packed_seq_params=params), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]))


def test_per_sample_group_wins_over_the_layers() -> None:
    params = SimpleNamespace(qkv_format="sbhd", cp_group=Group(0, 2), local_cp_size=2)
    layer = Group(3, 4)
    own = local_positions(8, cp_group=layer, packed_seq_params=params)
    assert torch.equal(own, torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]))
    undivided = SimpleNamespace(qkv_format="sbhd", cp_group=None, local_cp_size=1)
    assert torch.equal(local_positions(8, cp_group=layer, packed_seq_params=undivided), torch.arange(8))
    plain = local_positions(8, cp_group=layer)
    assert torch.equal(plain, torch.arange(12, 20))


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
