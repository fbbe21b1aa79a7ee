"""The launch scripts for long contexts: what they print is what Megatron accepts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from example_scripts import EXAMPLES, error, parse, printed, site
from forks import Launcher

LENGTH = 131072
MODELS = {
    "dense_8b": {"TP": 4, "PP": 1, "CP": 8, "EP": 1, "nodes": 4, "layers": 32, "base": 500000},
    "dense_70b": {"TP": 8, "PP": 4, "CP": 8, "EP": 1, "nodes": 32, "layers": 80, "base": 500000},
    "moe_8x7b": {"TP": 4, "PP": 2, "CP": 8, "EP": 8, "nodes": 8, "layers": 32, "base": 1000000},
}
VARIANTS: dict[str, dict[str, str]] = {
    "real": {},
    "mock": {"MOCK": "1", "CHECKPOINT": "", "DATA_PATH": "", "TOKENIZER": ""},
    "annealed": {"START": "function-preserving", "ANNEAL_ITERS": "200"},
    "base": {"ROTARY_BASE": "8000000", "SEQ_LENGTH": "65536", "GLOBAL_BATCH_SIZE": "64"},
    "rope": {"POSITION": "rope"},
}


def path(model: str) -> str:
    """A script below ``examples/``."""
    return f"context_extension/{model}.sh"


@pytest.fixture(scope="module")
def outcomes(
    here: dict[str, str], launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What Megatron says to every command."""
    cases = {
        f"{model} {name}": printed(path(model), **(here | variables))
        for model in MODELS
        for name, variables in VARIANTS.items()
    }
    slurm = ("slurm.sh", str(EXAMPLES / path("dense_70b")), "--seed", "3")
    cases["slurm"] = printed(*slurm, **(here | {"SLURM_NNODES": "64"}))
    cases["packed"] = printed(
        path("dense_8b"), **(here | {"PACKED": "1", "DATA_PATH": here["DATA_PATH"].split()[1] + ".bin"})
    )
    cases["typo"] = printed(path("dense_8b"), "--recompute-granulrity", "full", **here)
    cases["cpu"] = printed(path("moe_8x7b"), **(here | VARIANTS["mock"] | {"CPU": "1", "SEQ_LENGTH": "256"}))
    return parse(launcher, tmp_path_factory.mktemp("parsed"), cases)


@pytest.mark.launch
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_megatron_accepts_the_command(
    model: str, variant: str, here: dict[str, str], outcomes: dict[str, Any]
) -> None:
    found, sizes = outcomes[f"{model} {variant}"], MODELS[model]
    assert found["code"] is None and found["error"] is None, (found["stderr"], found["error"])
    args = found["args"]
    length = 65536 if variant == "base" else LENGTH
    position = "rope" if variant == "rope" else "fope"
    assert args["seq_length"] == args["max_position_embeddings"] == length
    assert args["rotary_base"] == (8000000 if variant == "base" else sizes["base"])
    assert args["position_embedding_type"] == position and not args["create_attention_mask_in_dataloader"]
    assert args["recompute_granularity"] == "full" and args["bf16"]
    assert args["num_layers"] == sizes["layers"] and args["world_size"] == sizes["nodes"] * 8
    layout = {
        "TP": args["tensor_model_parallel_size"],
        "PP": args["pipeline_model_parallel_size"],
        "CP": args["context_parallel_size"],
        "EP": args["expert_model_parallel_size"],
    }
    assert layout == {name: sizes[name] for name in layout} and args["sequence_parallel"]
    assert args["mock_data"] == (variant == "mock")
    assert args["pretrained_checkpoint"] == (None if variant == "mock" else here["CHECKPOINT"])
    folder = f"out/context_extension/{model}-{position}/checkpoints"
    assert args["load"] == args["save"] == folder, "the same command resumes"
    if variant == "rope":
        return
    assert args["fope_train_length"] == length
    starts = {"mock": None, "annealed": "function-preserving"}
    assert args["fope_start_from_rope"] == starts.get(variant, "immediate")
    assert args["fope_anneal_iters"] == (200 if variant == "annealed" else 0)
    assert bool(args["fope_change_rotary_base"]) == (variant == "base")


@pytest.mark.launch
def test_other_commands(outcomes: dict[str, Any]) -> None:
    slurm = outcomes["slurm"]["args"]
    assert slurm["world_size"] == 512 and slurm["data_parallel_size"] == 2 and slurm["seed"] == 3
    assert slurm["exit_signal_handler"] and slurm["num_layers"] == 80
    packed = outcomes["packed"]
    if all(map(find_spec, ("datasets", "transformers"))):
        assert packed["args"]["sft"] and packed["args"]["calculate_per_token_loss"], packed["stderr"]
    else:  # the last check, after Megatron's
        assert packed["code"] == 2 and "error: --sft needs " in packed["stderr"]
    cpu = outcomes["cpu"]["args"]
    assert (cpu["num_layers"], cpu["num_experts"], cpu["context_parallel_size"]) == (2, 8, 2)


@pytest.mark.launch
def test_the_check_can_fail(outcomes: dict[str, Any]) -> None:
    assert outcomes["typo"]["code"] == 2 and "--recompute-granulrity" in outcomes["typo"]["stderr"]


@pytest.mark.parametrize(
    "model,variables,message",
    [
        ("dense_8b", {"CHECKPOINT": ""}, "CHECKPOINT is not set; requires "),
        ("dense_8b", {"CHECKPOINT": "/nowhere"}, "CHECKPOINT is '/nowhere', which is not a folder made by"),
        ("dense_70b", {"DATA_PATH": ""}, "DATA_PATH is not set; requires "),
        ("moe_8x7b", {"TOKENIZER": ""}, "TOKENIZER is not set; requires "),
        ("dense_8b", {"MASTER_ADDR": ""}, "MASTER_ADDR is not set; requires "),
        ("dense_8b", {"NNODES": "3"}, "TP x PP x CP is 4 x 1 x 8 = 32, but NNODES x GPUS_PER_NODE is 3 x 8"),
    ],
)
def test_mistakes(model: str, variables: dict[str, str], message: str, tmp_path: Path) -> None:
    assert error(path(model), **(site(tmp_path) | variables)).startswith(message)


def test_words_stay_words(here: dict[str, str]) -> None:
    assert printed(path("dense_8b"), "--wandb-exp-name", "a b; c", **here)[-2:] == [
        "--wandb-exp-name",
        "a b; c",
    ]
