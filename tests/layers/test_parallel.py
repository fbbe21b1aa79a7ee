"""Packed documents, changing lengths and learnable coefficients under tensor and context parallelism.

The loss and every gradient of 4 ranks equal those of one rank that sees each document on its own, as an
ordinary sequence. Gradients are those that Megatron's own data-parallel wrapper and ``finalize_model_grads``
leave behind, the coefficients' among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch

pytestmark = [pytest.mark.launch, pytest.mark.ranks(4)]

TOLERANCE = 1e-5
"""Of the loss, and of every parameter's gradient relative to that gradient's norm."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model; what is left over is data parallelism."""

    tp: int = 1
    cp: int = 1
    sp: bool = False


LAYOUTS = {
    "one rank": Layout(),
    "TP2 SP": Layout(tp=2, sp=True),
    "TP4, 2 KV heads": Layout(tp=4),
    "TP4 SP, 2 KV heads": Layout(tp=4, sp=True),
    "CP2": Layout(cp=2),
    "CP4": Layout(cp=4),
    "TP2 SP CP2": Layout(tp=2, cp=2, sp=True),
}

DOCUMENTS = {"padded": (5, 17, 30, 8, 1), "unpadded": (8, 24, 16, 40)}
"""Lengths of packed documents. The second divide by 8, so that 4 context-parallel ranks need no padding."""

SEQUENCES = {1: (60, 84, 36), 2: (60, 84, 36), 4: (56, 40, 72)}
"""Lengths of ordinary sequences by context-parallel size, one after the other in one process."""


@dataclass
class Step:
    """What a training step left behind."""

    loss: float
    """Mean over the tokens of all ranks."""
    gradients: dict[str, Any]
    """Of the whole parameters, whatever the layout."""


# The model in a layout


@contextmanager
def initialized(layout: Layout) -> Iterator[None]:
    """Megatron's process groups for a layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, context_parallel_size=layout.cp
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def build(layout: Layout, spec: Any = None, *, separate_heads: bool = True, **overrides: Any) -> Any:
    """The model of the current process groups, with learnable coefficients."""
    return models.gpt(
        models.fope_config(gain=1.0, learnable=True, separate_heads=separate_heads),
        spec=spec,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        calculate_per_token_loss=True,
        **overrides,
    )


def load(model: Any, weights: dict[str, Any]) -> None:
    """Give a model its share of whole weights."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[name]
            dim = sharded_dimension(parameter)
            parameter.copy_(whole if dim is None else whole.chunk(size, dim)[rank])


def sharded_dimension(parameter: Any) -> int | None:
    """Along which dimension tensor-parallel ranks share a parameter."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


# Data


@dataclass
class Batch:
    """One rank's share of a batch; the loss counts where ``mask`` is 1."""

    tokens: Any
    labels: Any
    mask: Any
    positions: Any
    packed: Any = None


def document(length: int, seed: int) -> tuple[Any, Any]:
    """Tokens and labels of a document, ``[length]`` each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (length + 1,), generator=generator)
    return ids[:-1], ids[1:]


def share(length: int, rank: int, size: int) -> list[int]:
    """Which tokens of a sequence a context-parallel rank holds: chunks ``rank`` and ``2 size - 1 - rank``."""
    if size == 1:
        return list(range(length))
    chunk = length // (2 * size)
    assert chunk * 2 * size == length
    return [c * chunk + i for c in (rank, 2 * size - 1 - rank) for i in range(chunk)]


def ordinary(length: int, group: Any = None, *, seed: int = 0, batch: int = 1) -> Batch:
    """A rank's share of sequences of one length."""
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    held = share(length, rank, size)
    pairs = [document(length, seed + i) for i in range(batch)]
    tokens, labels = (torch.stack(part)[:, held] for part in zip(*pairs, strict=True))
    positions = torch.tensor(held).expand_as(tokens)
    return Batch(tokens, labels, torch.ones_like(tokens, dtype=torch.float32), positions)


def packed(lengths: tuple[int, ...], group: Any, *, multiple: int) -> Batch:
    """A rank's share of packed documents, each padded to a multiple.

    Both kinds of lengths are given where documents are padded, the one kind where they are not.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    rank, size = group.rank(), group.size()
    padded = [-(-length // multiple) * multiple for length in lengths]
    parts: list[tuple[Any, Any, Any]] = []
    for seed, (length, whole) in enumerate(zip(lengths, padded, strict=True)):
        tokens, labels = document(length, seed)
        filler = torch.full((whole - length,), 7)
        mask = torch.cat((torch.ones(length), torch.zeros(whole - length)))
        held = share(whole, rank, size)
        parts.append((torch.cat((tokens, filler))[held], torch.cat((labels, filler))[held], mask[held]))
    tokens, labels, mask = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    ends, padded_ends = (
        torch.tensor([0, *itertools.accumulate(ls)], dtype=torch.int32) for ls in (lengths, padded)
    )
    both = {"cu_seqlens_q_padded": padded_ends, "cu_seqlens_kv_padded": padded_ends}
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(padded),
        max_seqlen_kv=max(padded),
        **(both if padded != list(lengths) else {}),
    )
    # Documents start at 0, whatever position_ids say.
    return Batch(tokens, labels, mask, torch.full_like(tokens, 3), params)


# A training step


def step(model: Any, batches: list[Batch]) -> Step:
    """Forward and backward of some micro-batches, and what Megatron does to gradients afterwards."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    total, count = torch.zeros(()), torch.zeros((), dtype=torch.int)
    for batch in batches:
        output = ddp(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
        loss = (output * batch.mask).sum()
        loss.backward()
        total += loss.detach()
        count += batch.mask.sum().int()
    finalize_model_grads([ddp], count.clone())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for value in (total, count):
        torch.distributed.all_reduce(value, group=group)
    gradients = {name: whole_gradient(parameter) for name, parameter in model.named_parameters()}
    return Step(float(total / count), gradients)


def whole_gradient(parameter: Any) -> Any:
    """The gradient of a parameter as one rank would have it."""
    from megatron.core import parallel_state

    gradient = parameter.main_grad.clone()
    dim = sharded_dimension(parameter)
    if dim is None:
        return gradient
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(gradient) for _ in range(group.size())]
    torch.distributed.all_gather(parts, gradient, group=group)
    return torch.cat(parts, dim)


def assert_equal(actual: Step, expected: Step) -> None:
    assert abs(actual.loss - expected.loss) < TOLERANCE, (actual.loss, expected.loss)
    worst = {
        name: float((actual.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.gradients.items()
    }
    assert sum(name.endswith(("fope.sin_coef", "fope.cos_coef")) for name in worst) == 4
    wrong = {name: error for name, error in worst.items() if not error < TOLERANCE}
    assert not wrong, wrong


# References


class References:
    """Steps of one rank on separate, ordinary sequences, by the lengths of these."""

    def __init__(self, *all_lengths: tuple[int, ...], separate_heads: bool = True) -> None:
        self.separate_heads = separate_heads
        with initialized(Layout()):
            model = build(Layout(), separate_heads=separate_heads)
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.steps = {
                lengths: step(
                    self.model(Layout()), [ordinary(length, seed=i) for i, length in enumerate(lengths)]
                )
                for lengths in all_lengths
            }

    def model(self, layout: Layout) -> Any:
        """The same model in the current process groups."""
        model = build(layout, separate_heads=self.separate_heads)
        load(model, self.weights)
        return model


# Tests


@pytest.fixture(scope="module")
def references() -> References:
    """Steps with coefficients per head."""
    return References(*{*DOCUMENTS.values(), *SEQUENCES.values()})


@pytest.fixture(scope="module")
def shared() -> References:
    """Steps with one pair of coefficient matrices for all heads."""
    return References(DOCUMENTS["unpadded"], separate_heads=False)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, references: References, shared: References) -> Iterator[Layout]:
    """A layout, while Megatron's process groups are for it; the references have other groups."""
    with initialized(LAYOUTS[request.param]):
        yield LAYOUTS[request.param]


def test_sequences_of_changing_length(layout: Layout, references: References) -> None:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    lengths = SEQUENCES[layout.cp]
    batches = [ordinary(length, group, seed=i) for i, length in enumerate(lengths)]
    assert_equal(step(references.model(layout), batches), references.steps[lengths])


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_packed_documents(layout: Layout, references: References, kind: str) -> None:
    from megatron.core import parallel_state

    lengths = DOCUMENTS[kind]
    # Sequence parallelism cuts the tokens of a rank once more.
    multiple = 2 * layout.cp * (layout.tp if layout.sp else 1)
    batch = packed(lengths, parallel_state.get_context_parallel_group(), multiple=multiple)
    assert (batch.packed.cu_seqlens_q_padded is None) == (kind == "unpadded"), "both kinds are tested"
    assert_equal(step(references.model(layout), [batch]), references.steps[lengths])


@pytest.mark.parametrize("layout", ["TP2 SP CP2"], indirect=True)
def test_heads_share(layout: Layout, shared: References) -> None:
    test_packed_documents(layout, shared, "unpadded")


@pytest.mark.parametrize("layout", ["CP4"], indirect=True)
def test_per_sample_groups(layout: Layout, references: References) -> None:
    """Hybrid context parallelism: samples on 2, 2 and 4 of the ranks, and undivided ones."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    halves = [torch.distributed.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    rank = torch.distributed.get_rank()
    pair, whole = halves[rank // 2], parallel_state.get_context_parallel_group()
    lengths = SEQUENCES[4]
    alone = (DOCUMENTS["unpadded"], torch.distributed.get_rank())

    def on(group: Any, form: str, length: int, seed: int) -> Batch:
        batch = ordinary(length, group, seed=seed)
        ends = torch.tensor([0, length], dtype=torch.int32)
        batch.packed = PackedSeqParams(
            qkv_format=form,
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            local_cp_size=1 if group is None else group.size(),
            cp_group=group,
        )
        return batch

    for form in ("sbhd", "thd"):  # 0.17 sends the first, later releases the second
        half = rank // 2
        batches = [on(pair, form, lengths[half], half), on(whole, form, lengths[2], 2)]
        assert_equal(step(references.model(layout), batches), references.steps[lengths])
        undivided = [on(None, form, alone[0][rank], rank)]
        assert_equal(step(references.model(layout), undivided), references.steps[alone[0]])


@pytest.mark.parametrize("layout", ["CP4"], indirect=True)
def test_communication_types_arrive(layout: Layout) -> None:
    """``--cp-comm-type`` passes through our constructor to the core attention, as a word or per layer.

    It cannot matter to positions: the batch is cut before, and Transformer Engine restores the order inside.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    seen: list[str | None] = []
    spec = get_gpt_layer_local_spec()
    core = spec.submodules.self_attention.submodules
    original = getattr(core.core_attention, "module", core.core_attention)

    class Recorder(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs.get("cp_comm_type"))
            super().__init__(*args, **kwargs)

    core.core_attention = Recorder
    cases: dict[str, list[str]] = {kind: [kind] * 2 for kind in ("p2p", "all_gather", "a2a")}
    for given, expected in [*cases.items(), (["a2a", "p2p"], ["a2a", "p2p"])]:
        seen.clear()
        build(layout, spec, cp_comm_type=given)
        assert seen == expected, (given, seen)
    seen.clear()
    build(layout, spec, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2])
    assert seen == ["a2a+p2p"] * 2
