"""Training on GPUs: Transformer Engine beside the local layers, FP8, CUDA graphs, context parallelism."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path

import pytest
from gpu_kit import needs_capability, needs_flash_attention, needs_gpu, needs_gpus, needs_transformer_engine
from launch import losses, torchrun

from megatron_fope.arguments.parser import megatron_parser, parse

ITERATIONS = 30
MODEL = shlex.split(
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --group-query-attention --num-query-groups 4 "
    "--kv-channels 64 --ffn-hidden-size 1536 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--seq-length 512 --max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 4 "
    "--attention-dropout 0 --hidden-dropout 0 --bf16 --lr 5e-4 --lr-warmup-iters 5 --clip-grad 1.0 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 1023 --position-embedding-type fope"
)


TRANSFORMER_ENGINE = ("--transformer-impl", "transformer_engine")
FP8 = (*TRANSFORMER_ENGINE, "--fp8-format", "hybrid", "--fp8-recipe")
GRAPHS = (*TRANSFORMER_ENGINE, "--te-rng-tracker", "--cuda-graph-impl")


def train(*flags: str, iterations: int = ITERATIONS, gpus: int = 1) -> tuple[list[float], str]:
    """Losses of every iteration, and the log."""
    command = ["-m", "megatron_fope", "pretrain", *MODEL, "--train-iters", str(iterations), *flags]
    done = torchrun(gpus, command, env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    return losses(done.stdout), done.stdout


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that both kinds of layers continue: they draw their first weights in different orders."""
    folder = tmp_path_factory.mktemp("start")
    train("--transformer-impl", "local", "--save", str(folder), "--save-interval", "2", iterations=2)
    return folder


def continued(start: Path, *flags: str, gpus: int = 1) -> list[float]:
    """Losses of a run from the common start; it prints that FoPE's layers are there."""
    load = ("--load", str(start), "--finetune", "--exit-on-missing-checkpoint")
    values, log = train(*load, *flags, gpus=gpus)
    assert "> FoPE: 4 attention layers: decoder 1-4" in log
    assert len(values) == ITERATIONS
    return values


def distance(ours: list[float], reference: list[float]) -> float:
    """Mean relative difference of two courses of the loss."""
    return statistics.mean(abs(a - b) / b for a, b in zip(ours, reference, strict=True))


@pytest.fixture(scope="module")
def local(start: Path) -> list[float]:
    """The local layers' losses."""
    return continued(start, "--transformer-impl", "local")


@needs_gpu
def test_triton_and_torch_train_alike(start: Path, local: list[float]) -> None:
    assert local[-1] < local[0]
    other = continued(start, "--transformer-impl", "local", "--fope-backend", "torch")
    assert distance(other, local) < 2e-3


@needs_transformer_engine
@pytest.mark.parametrize("back_end", [pytest.param("flash", marks=needs_flash_attention), "fused", "unfused"])
def test_transformer_engine_trains_like_the_local_layers(
    start: Path, local: list[float], back_end: str
) -> None:
    ours = continued(start, *TRANSFORMER_ENGINE, "--attention-backend", back_end)
    assert distance(ours, local) < 5e-3


@needs_transformer_engine
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@needs_capability(8, 9)
def test_fp8_step(start: Path, local: list[float], recipe: str) -> None:
    """FP8 is coarse: the course of the loss stays within 3 %, and it learns."""
    ours = continued(start, *FP8, recipe)
    assert ours[-1] < ours[0]
    assert distance(ours, local) < 3e-2


@needs_transformer_engine
@pytest.mark.parametrize("kind", ["local", "transformer_engine"])
def test_cuda_graphs_train_like_eager(start: Path, kind: str) -> None:
    eager = continued(start, *GRAPHS, "none")
    graphs = continued(start, *GRAPHS, kind)
    assert distance(graphs, eager) < 2e-3


@needs_transformer_engine
@needs_gpus(2)
@pytest.mark.parametrize("kind", ["p2p", "a2a", "all_gather"])
def test_context_parallelism_of_transformer_engine(start: Path, local: list[float], kind: str) -> None:
    flags = (*TRANSFORMER_ENGINE, "--context-parallel-size", "2", "--cp-comm-type", kind)
    assert distance(continued(start, *flags, gpus=2), local) < 5e-3


def test_megatron_knows_all_flags() -> None:
    """Also without a GPU: these runs have not gone out of date."""
    flags = [
        *MODEL,
        "--attention-backend",
        "fused",
        "--cp-comm-type",
        "a2a",
        *FP8,
        "delayed",
        *GRAPHS,
        "local",
        "--train-iters",
        "1",
    ]
    args = parse(megatron_parser("test"), flags)
    assert args.position_embedding_type == "fope"
