"""Positions of every layout against the position a token has in one undivided sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.layers import position_ids
from megatron_fope.layers.positions import (
    check_values,
    inference_positions,
    local_positions,
    packed_positions,
    sequence_positions,
)

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


def test_odd_packed_lengths_and_empty_documents() -> None:
    """Megatron repeats the last boundary to give the lists of all samples one length."""
    cu_seqlens = torch.tensor([0, 400, 542, 542, 711, 727, 752, 1270, 1426, 1426, 1426])
    expected = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])
    assert torch.equal(packed_positions(1426, cu_seqlens), expected)


GOOD = torch.tensor([0, 4, 12])
WRONG: dict[str, Callable[[], Any]] = {
    "document 0 of cu_seqlens has 7 tokens (0 to 7)": lambda: packed_positions(
        4, torch.tensor([0, 7]), cp_size=2
    ),
    "document 0 of cu_seqlens has 5 tokens (0 to 5)": lambda: packed_positions(
        6, torch.tensor([0, 5, 12]), cp_size=2
    ),
    "document 1 of cu_seqlens has 2 tokens (8 to 10)": lambda: packed_positions(
        8, torch.tensor([0, 8, 10, 16]), cp_rank=1, cp_size=2
    ),
    "document 1 of cu_seqlens has -2 tokens (6 to 4)": lambda: packed_positions(
        12, torch.tensor([0, 6, 4, 12])
    ),
    "document 0 of cu_seqlens starts at 4": lambda: packed_positions(8, torch.tensor([4, 8])),
    "document 0 of cu_seqlens starts at -4": lambda: packed_positions(8, torch.tensor([-4, 4, 8])),
    "document 1 of cu_seqlens, the last, ends at 12; requires ends from 0 to 14": lambda: packed_positions(
        14, GOOD
    ),
    "document 1 of cu_seqlens, the last, ends at 12; requires ends from 0 to 11": lambda: packed_positions(
        11, GOOD
    ),
    "document 1 of cu_seqlens, the last, ends at 12; requires ends from 0 to 24 tokens, every length a "
    "multiple of 4": lambda: packed_positions(12, GOOD, cp_size=2),
    "cu_seqlens is float32": lambda: packed_positions(12, GOOD.float()),
    "cu_seqlens is bool": lambda: packed_positions(12, GOOD > 0),
    "cu_seqlens is list": lambda: packed_positions(12, [0, 4, 12]),  # type: ignore[arg-type]
    "cu_seqlens has shape (1, 3)": lambda: packed_positions(12, GOOD[None]),
    "cu_seqlens has shape (1,)": lambda: packed_positions(12, GOOD[:1]),
    "cu_seqlens has shape (0,)": lambda: packed_positions(12, GOOD[:0]),
    "cp_rank is 2 of cp_size 2": lambda: packed_positions(6, GOOD, cp_rank=2, cp_size=2),
    "cp_rank is -1 of cp_size 2": lambda: sequence_positions(4, cp_rank=-1, cp_size=2),
    "cp_rank is 0 of cp_size 0": lambda: sequence_positions(4, cp_size=0),
    "cp_rank is 1 of cp_size 1": lambda: sequence_positions(4, cp_rank=1),
    "a context-parallel rank has 3 tokens": lambda: sequence_positions(3, cp_size=2),
    "a context-parallel rank has 5 tokens": lambda: local_positions(5, cp_group=Group(1, 2)),
    "num_tokens is -1": lambda: sequence_positions(-1),
    "offset is -1": lambda: sequence_positions(4, offset=-1),
    "local_cp_size is 2, but its cp_group has 1 ranks": lambda: local_positions(
        12, packed_seq_params=packed(cu_seqlens_q=GOOD, local_cp_size=2)
    ),
    "local_cp_size is 4, but its cp_group has 2 ranks": lambda: local_positions(
        6, packed_seq_params=packed(cu_seqlens_q=GOOD, local_cp_size=4, cp_group=Group(0, 2))
    ),
    "sequence_len_offset is [3, 4]; requires": lambda: inference_positions(
        1, STATIC, sequence_len_offset=torch.tensor([3, 4])
    ),
    "the inference context has 2 tokens; requires the 3": lambda: inference_positions(
        3, SimpleNamespace(is_static_batching=lambda: False, token_to_pos_ids=torch.tensor([1, 2]))
    ),
}
STATIC = SimpleNamespace(is_static_batching=lambda: True, sequence_len_offset=3)


@pytest.mark.parametrize("text", WRONG)
def test_wrong_layouts_are_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        WRONG[text]()
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_boundaries_are_accepted_exactly_when_they_make_documents(size: int) -> None:
    """Every pair of inner boundaries of a pack of ``12 * size`` tokens."""
    total, multiple = 12 * size, 1 if size == 1 else 2 * size
    for first, second in itertools.product(range(-1, total + 2), repeat=2):
        lengths = (first, second - first, total - second)
        good = all(n >= 0 and n % multiple == 0 for n in lengths)
        cu_seqlens = torch.tensor([0, first, second, total])
        if good:
            got = packed_positions(12, cu_seqlens, cp_rank=size - 1, cp_size=size)
            documents = [torch.arange(n) for n in lengths]
            cut = [zigzag(d, size - 1, size) if size > 1 and len(d) else d for d in documents]
            assert torch.equal(got, torch.cat(cut))
        else:
            with pytest.raises(UserError):
                packed_positions(12, cu_seqlens, cp_rank=size - 1, cp_size=size)


def test_values_on_a_gpu_are_checked_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device gets the check as one more kernel; nothing is read back."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "_assert_async", lambda *args: given.append(args))
    ok = SimpleNamespace(device=torch.device("cuda"), all=lambda: "all")
    check_values(ok, "message")  # type: ignore[arg-type]
    assert given == [("all", "message")]


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
        ({"cu_seqlens_q": torch.tensor([[0, 3, 8]])}, "cu_seqlens has shape (1, 3)"),
        ({"cu_seqlens_q_padded": torch.tensor([0])}, "cu_seqlens has shape (1,)"),
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


def test_on_a_gpu_position_ids_are_compared_where_nobody_says_that_they_are_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands for a GPU: nothing can be read there."""
    checks: list[str] = []
    monkeypatch.setattr(position_ids, "check_values", lambda ok, message: checks.append(message))

    def told(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
        checks.clear()
        return position_ids._ids_to_honour(model, {"position_ids": ids})

    def model(stages: int) -> SimpleNamespace:
        return SimpleNamespace(pg_collection=SimpleNamespace(pp=Group(0, stages), cp=Group(0, 1)))

    ids = torch.arange(4, device="meta").repeat(2, 1)
    assert told(model(1), ids) is ids, "a library's model: they may be anything"
    assert told(model(1), ids[:1].expand(2, -1)).shape == (1, 4)
    trained = model(1)
    position_ids.expect_plain_position_ids(trained)
    assert told(trained, ids) is None and "--reset-position-ids is not given" in checks[-1]
    assert told(trained, ids) is None and not checks, "only the first are compared"
    stage = model(2)
    for _ in range(2):
        assert told(stage, ids) is None and "pipeline parallelism" in checks[-1]


def test_pipeline_stages_refuse_position_ids_that_others_do_not_get() -> None:
    stage = SimpleNamespace(pg_collection=SimpleNamespace(pp=Group(0, 2), cp=Group(0, 1)))
    assert position_ids._ids_to_honour(stage, {"position_ids": torch.arange(4)[None]}) is None
    with pytest.raises(UserError, match="pipeline parallelism"):
        position_ids._ids_to_honour(stage, {"position_ids": torch.tensor([[0, 1, 0, 1]])})
