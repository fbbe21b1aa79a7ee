"""Core attention of the CPU runtime: fused, unfused, packed and cut by context parallelism."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fope.common.errors import UserError
from megatron_fope.cpu import attention

# --- Positions and masks ------------------------------------------------------------------------------


def test_zigzag_positions() -> None:
    assert attention.zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert attention.zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    with pytest.raises(UserError, match="10 tokens"):
        attention.zigzag_positions(10, 2, 0)


def test_packed_zigzag_positions_cut_each_document() -> None:
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert attention.packed_zigzag_positions(cu_seqlens, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert attention.packed_zigzag_positions(cu_seqlens, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_mask_of_a_pack_is_the_masks_of_its_documents(window: tuple[int, int] | None) -> None:
    lengths = [3, 1, 5]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = attention.attention_mask(torch.arange(9), 9, causal=True, window=window, cu_seqlens=cu_seqlens)
    blocks = [
        attention.attention_mask(torch.arange(n), n, causal=True, window=window)[0, 0].logical_not()
        for n in lengths
    ]
    assert torch.equal(packed[0, 0].logical_not(), torch.block_diag(*blocks).bool())


# --- Attention ----------------------------------------------------------------------------------------


def _module(cp_size: int = 1, *, unfused: bool = False, layer_number: int | None = None) -> SimpleNamespace:
    """What :func:`attention.general_attention` uses of a ``DotProductAttention``.

    Args:
        cp_size: context-parallel ranks.
        unfused: as with ``--attention-backend unfused``.
        layer_number: of a layer under ``--apply-query-key-layer-scaling``.
    """
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    return SimpleNamespace(
        config=SimpleNamespace(
            context_parallel_size=cp_size,
            sequence_parallel=True,
            attention_backend=AttnBackend.unfused if unfused else AttnBackend.auto,
            softmax_type="learnable",
        ),
        pg_collection=SimpleNamespace(),
        attn_mask_type=AttnMaskType.causal,
        scale_mask_softmax=FusedScaleMaskSoftmax(
            input_in_fp16=False,
            input_in_bf16=False,
            attn_mask_type=AttnMaskType.causal,
            scaled_masked_softmax_fusion=False,
            mask_func=attention_mask_func,
            softmax_in_fp32=True,
            scale=layer_number,
        ),
        softmax_offset=None,
        softmax_scale=8**-0.5 / (layer_number or 1),
        attention_dropout=torch.nn.Dropout(0.0),
    )


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention on ``[S, B, H, D]`` with grouped keys and values, written out."""
    heads = query.size(2) // key.size(2)
    key, value = (tensor.repeat_interleave(heads, dim=2) for tensor in (key, value))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def _tensors(num_tokens: int, batch: int, value_width: int = 8) -> list[torch.Tensor]:
    """Query, key and value of 4 heads and 2 groups: slices of one tensor, as in Megatron."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(num_tokens, batch, 2, 24 + value_width, generator=generator, dtype=torch.float64)
    query, key, value = numbers.requires_grad_().split([16, 8, value_width], dim=3)
    return [query.reshape(num_tokens, batch, 4, 8), key, value]


def _packed(boundaries: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32),
        cu_seqlens_q_padded=None,
        cp_group=None,
        local_cp_size=None,
    )


def _assert_same(actual: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """The same numbers, and the same gradients of something that weights them differently."""
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), inputs, retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(actual_gradients, expected_gradients)


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.fixture(params=[False, True], ids=["fused", "unfused"])
def unfused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways, and a failure if the other one runs."""
    other = "attention_mask" if not request.param else "fused_attention"

    def wrong(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{other} is called")

    monkeypatch.setattr(attention, other, wrong)
    return request.param


@pytest.mark.parametrize("layer_number", [None, 3])
@pytest.mark.parametrize("value_width", [4, 8, 12])
def test_causal_attention(unfused: bool, value_width: int, layer_number: int | None) -> None:
    tensors = _tensors(12, 2, value_width)
    module = _module(unfused=unfused, layer_number=layer_number)
    actual = attention.general_attention(module, *tensors, None, None)
    _assert_same(actual, _reference(*tensors), tensors)


@pytest.mark.parametrize("boundaries", [[0, 5, 6, 12], [0, 5, 5, 12], [0, 5, 9]])
def test_packed_attention_equals_attention_per_document(unfused: bool, boundaries: list[int]) -> None:
    """An empty document changes nothing; what is behind the last one is a document of its own."""
    tensors = _tensors(12, 1)
    flat = [tensor.squeeze(1) for tensor in tensors]
    actual = attention.general_attention(_module(unfused=unfused), *flat, None, _packed(boundaries))
    documents = [(a, b) for a, b in itertools.pairwise(sorted({*boundaries, 12}))]
    expected = torch.cat([_reference(*(x[a:b] for x in tensors)).squeeze(1) for a, b in documents])
    _assert_same(actual, expected, tensors)


def _context_parallel(
    monkeypatch: pytest.MonkeyPatch, full: list[torch.Tensor], boundaries: list[int] | None, unfused: bool
) -> torch.Tensor:
    """Two ranks' attention in natural order; one process plays both: the gather concatenates their parts."""
    cp_size, num_tokens = 2, full[0].size(0)
    module = _module(cp_size, unfused=unfused)
    packed = None
    if boundaries is None:
        held = [attention.zigzag_positions(num_tokens, cp_size, rank) for rank in range(cp_size)]
    else:
        packed = _packed(boundaries)
        held = [
            attention.packed_zigzag_positions(packed.cu_seqlens_q, cp_size, rank) for rank in range(cp_size)
        ]
    local = [[tensor[positions] for tensor in full] for positions in held]
    parts = iter([local[rank][i] for _ in range(cp_size) for i in (1, 2) for rank in range(cp_size)])
    monkeypatch.setattr(
        "megatron.core.tensor_parallel.mappings.gather_from_sequence_parallel_region",
        lambda tensor, group: torch.cat([_like(next(parts), tensor) for _ in range(cp_size)]),
    )
    outputs = []
    for rank in range(cp_size):
        module.pg_collection.cp = SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank)
        tensors = local[rank] if packed is None else [tensor.squeeze(1) for tensor in local[rank]]
        out = attention.general_attention(module, *tensors, None, packed)
        outputs.append(out if packed is None else out.unsqueeze(1))
    return torch.cat(outputs).index_select(0, torch.cat(held).argsort())


def _like(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A rank's part with the number of dimensions that the gathered tensor has."""
    return part if part.dim() == tensor.dim() else part.view(part.shape[0], *tensor.shape[1:])


@pytest.mark.parametrize("boundaries", [None, [0, 8, 12, 16]])
def test_context_parallel_attention_equals_one_rank(
    monkeypatch: pytest.MonkeyPatch, unfused: bool, boundaries: list[int] | None
) -> None:
    full = _tensors(16, 1)
    documents = itertools.pairwise(boundaries or [0, 16])
    expected = torch.cat([_reference(*(x[a:b] for x in full)) for a, b in documents])
    _assert_same(_context_parallel(monkeypatch, full, boundaries, unfused), expected, full)


@pytest.mark.parametrize("kind", ["causal", "packed", "context parallel"])
def test_fused_attention_makes_no_matrix_of_scores(
    monkeypatch: pytest.MonkeyPatch, unfused: bool, kind: str
) -> None:
    """Forward and backward: the largest tensor grows with the length, not with its square."""
    sizes = {}
    for num_tokens in (256, 512):
        full = _tensors(num_tokens, 1)
        with _Largest() as largest:
            if kind == "context parallel":
                out = _context_parallel(monkeypatch, full, None, unfused)
            else:
                packed = _packed([0, num_tokens // 2, num_tokens]) if kind == "packed" else None
                tensors = full if packed is None else [tensor.squeeze(1) for tensor in full]
                out = attention.general_attention(_module(unfused=unfused), *tensors, None, packed)
            out.sum().backward()
        sizes[num_tokens] = largest.numbers
    assert sizes[512] == (4 if unfused else 2) * sizes[256]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_dropout": torch.nn.Dropout(0.1)}, "attention dropout"),
        ({"softmax_offset": torch.zeros(4)}, "--softmax-type learnable"),
        ({"scale_mask_softmax": SimpleNamespace(window_size=(2, 0))}, "a sliding window"),
        ({"attn_mask_type": "padding"}, "a mask that is not causal"),
    ],
)
def test_what_the_fused_kernel_cannot_do(change: dict[str, Any], reason: str) -> None:
    module = _module()
    assert attention.why_unfused(module, None) is None
    vars(module).update(change)
    assert attention.why_unfused(module, None) == reason


def test_masks_and_evaluation() -> None:
    """Dropout is off in evaluation; a mask that comes with the batch is obeyed."""
    module = _module()
    assert "mask" in attention.why_unfused(module, torch.zeros(1, 1, 12, 12, dtype=torch.bool))
    module.attention_dropout = torch.nn.Dropout(0.1).eval()
    assert attention.why_unfused(module, None) is None

    tensors = _tensors(12, 1)
    hidden = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    hidden[..., :4] = True
    hidden[..., :4, :4] = False
    masked = attention.general_attention(module, *tensors, hidden, None)
    alone = _reference(*(tensor[4:] for tensor in tensors))
    torch.testing.assert_close(masked[4:], alone)
