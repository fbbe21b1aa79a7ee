"""The CPU runtime: its flags, its attention, and that parallel layouts train alike."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import Launcher
from launch import ROOT, TINY_MODEL, losses

from megatron_fope import cpu
from megatron_fope.common.errors import UserError
from megatron_fope.cpu import attention

# --- Flags --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``add_argument_defaults`` sets environment variables; undo that after each test."""
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_missing_flags_are_appended() -> None:
    argv = ["program", "--num-layers", "2"]
    completed = cpu.add_argument_defaults(argv)
    assert argv == ["program", "--num-layers", "2"]
    assert completed[:3] == argv
    assert completed[completed.index("--distributed-backend") + 1] == "gloo"
    assert completed[completed.index("--transformer-impl") + 1] == "local"
    assert "--use-cpu-initialization" in completed
    assert not any("dropout" in word for word in completed)


@pytest.mark.parametrize(
    "given", [["--transformer-impl", "local"], ["--transformer-impl=local"], ["--no-rope-fusion"]]
)
def test_given_flags_are_kept(given: list[str]) -> None:
    completed = cpu.add_argument_defaults(given)
    flag = given[0].partition("=")[0]
    assert [word.partition("=")[0] for word in completed].count(flag) == 1
    assert cpu.add_argument_defaults(completed) == completed


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--transformer-impl", "transformer_engine"], ["--transformer-impl transformer_engine", "local"]),
        (["--transformer-impl=transformer_engine"], ["--transformer-impl transformer_engine", "local"]),
        (["--distributed-backend", "nccl"], ["--distributed-backend nccl", "gloo"]),
        (["--distributed-backend", "gloo", "--distributed-backend", "nccl"], ["nccl", "gloo"]),
        (["--fp8-format", "hybrid"], ["--fp8-format hybrid"]),
        (["--cuda-graph-impl", "local"], ["--cuda-graph-impl local", "none"]),
        (["--enable-cuda-graph"], ["--enable-cuda-graph"]),
        (["--use-megatron-fsdp", "--save", "out"], ["--save", "--use-megatron-fsdp"]),
        (["--attention-backend", "flash"], ["--attention-backend flash", "local"]),
    ],
)
def test_impossible_flags_are_refused_in_one_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        cpu.add_argument_defaults(["program", *argv, "--bf16"])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_environment_is_only_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    cpu.add_argument_defaults([])
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize("set_before", ["1", None])
@pytest.mark.parametrize("flag", ["--use-megatron-fsdp", "--use-torch-fsdp2"])
def test_environment_with_fsdp(flag: str, set_before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asserts another value than 1 there."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if set_before is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    completed = cpu.add_argument_defaults([flag])
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert ("--no-gradient-reduce-div-fusion" in completed) == ("megatron" in flag)


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; before = torch.cuda.current_stream, torch.Tensor.cuda; import megatron_fope.cpu, sys; "
        "assert (torch.cuda.current_stream, torch.Tensor.cuda) == before; "
        "assert not any(name.startswith('megatron.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


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


def _module(cp_size: int = 1) -> SimpleNamespace:
    """What :func:`attention.general_attention` uses of a ``DotProductAttention``."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    return SimpleNamespace(
        config=SimpleNamespace(context_parallel_size=cp_size, sequence_parallel=True),
        pg_collection=SimpleNamespace(),
        attn_mask_type=AttnMaskType.causal,
        scale_mask_softmax=FusedScaleMaskSoftmax(
            input_in_fp16=False,
            input_in_bf16=False,
            attn_mask_type=AttnMaskType.causal,
            scaled_masked_softmax_fusion=False,
            mask_func=attention_mask_func,
            softmax_in_fp32=True,
            scale=None,
        ),
        softmax_offset=None,
        softmax_scale=8**-0.5,
        attention_dropout=torch.nn.Identity(),
    )


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's causal attention on ``[S, B, H, D]``, with grouped keys and values."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return context.permute(2, 0, 1, 3).flatten(2)


def _tensors(num_tokens: int, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_tokens, batch, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]


def test_packed_attention_equals_attention_per_document() -> None:
    query, key, value = _tensors(12, 1)
    boundaries = [0, 5, 6, 12]
    packed = SimpleNamespace(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor(boundaries, dtype=torch.int32),
        cu_seqlens_q_padded=None,
        cp_group=None,
        local_cp_size=None,
    )
    flat = (tensor.squeeze(1) for tensor in (query, key, value))
    actual = attention.general_attention(_module(), *flat, None, packed)
    expected = torch.cat(
        [_reference(query[a:b], key[a:b], value[a:b]).squeeze(1) for a, b in itertools.pairwise(boundaries)]
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("boundaries", [None, [0, 8, 12, 16]])
def test_context_parallel_attention_equals_one_rank(
    monkeypatch: pytest.MonkeyPatch, boundaries: list[int] | None
) -> None:
    cp_size, num_tokens = 2, 16
    full = _tensors(num_tokens, 1)
    module = _module(cp_size)
    packed = None
    if boundaries is None:
        held = [attention.zigzag_positions(num_tokens, cp_size, rank) for rank in range(cp_size)]
        expected = _reference(*full)
    else:
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        held = [attention.packed_zigzag_positions(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
        expected = torch.cat([_reference(*(x[a:b] for x in full)) for a, b in itertools.pairwise(boundaries)])
        packed = SimpleNamespace(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_q_padded=None,
            cp_group=None,
            local_cp_size=None,
        )

    # One process plays all ranks: the gather is a concatenation of what the ranks hold.
    local = [[tensor[positions] for tensor in full] for positions in held]
    parts = iter([local[rank][i] for _ in range(cp_size) for i in (1, 2) for rank in range(cp_size)])
    monkeypatch.setattr(
        "megatron.core.tensor_parallel.mappings.gather_from_sequence_parallel_region",
        lambda tensor, group: torch.cat([_like(next(parts), tensor) for _ in range(cp_size)]),
    )
    actual = torch.empty_like(expected)
    for rank in range(cp_size):
        module.pg_collection.cp = SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank)
        tensors = local[rank] if packed is None else [tensor.squeeze(1) for tensor in local[rank]]
        out = attention.general_attention(module, *tensors, None, packed)
        actual[held[rank]] = out if packed is None else out.unsqueeze(1)
    torch.testing.assert_close(actual, expected)

    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), full, retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), full)
    torch.testing.assert_close(actual_gradients, expected_gradients)


def _like(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A rank's part with the number of dimensions that the gathered tensor has."""
    return part if part.dim() == tensor.dim() else part.view(part.shape[0], *tensor.shape[1:])


# --- Training -----------------------------------------------------------------------------------------

ROPE = ("--position-embedding-type", "rope")
Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def train(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains the tiny model on a number of ranks with more flags; the losses."""
    folder = tmp_path_factory.mktemp("logs")

    def run(nproc: int, *flags: str) -> list[float]:
        return losses(launcher.output(nproc, ["--cpu", "pretrain", *TINY_MODEL, *flags], folder / "log"))

    return run


@pytest.fixture(scope="module")
def start(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that start a run from common weights: pipeline stages seed theirs differently."""
    folder = str(tmp_path_factory.mktemp("start"))
    train(
        1,
        *ROPE,
        "--save",
        folder,
        "--save-interval",
        "1",
        "--train-iters",
        "1",
        "--no-save-optim",
        "--no-save-rng",
    )
    return (*ROPE, "--load", folder, "--finetune")


@pytest.fixture(scope="module")
def one_rank(train: Train, start: tuple[str, ...]) -> list[float]:
    """Losses of one rank."""
    values = train(1, *start)
    assert len(values) == 3
    assert values[2] < values[0]
    return values


@pytest.mark.launch
@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--context-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
    ids=["tp-sp", "cp", "pp-vpp", "dp-distopt"],
)
def test_layouts_train_alike(
    num_ranks: int, layout: str, train: Train, start: tuple[str, ...], one_rank: list[float]
) -> None:
    assert train(num_ranks, *start, *layout.split()) == pytest.approx(one_rank, abs=1e-5)


@pytest.mark.launch
def test_distributed_optimizer_resumes_exactly(train: Train, tmp_path: Path) -> None:
    common = (*ROPE, "--bf16", "--use-distributed-optimizer", "--train-iters", "5")
    whole = train(2, *common)
    train(2, *common, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2")
    resumed = train(2, *common, "--load", str(tmp_path))
    assert len(resumed) == 3
    # See launch.losses: the second number after a start is a mean.
    assert [resumed[0], resumed[2]] == pytest.approx([whole[2], whole[4]], abs=2e-6)


def test_losses_are_read_from_the_log() -> None:
    line = (
        " [2026-01-01 00:00:00] iteration        2/       3 | consumed samples: 8 | lm loss: 5.5E+00 | x: 1 |"
    )
    assert losses(f"noise\n{line}\n validation loss at iteration 2 | lm loss value: 4.0E+00 |") == [5.5]
