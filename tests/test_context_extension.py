"""The launch scripts for long contexts: what they print is what Megatron accepts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

FOLDER = ROOT / "examples" / "context_extension"
LENGTH = 131072
SITE = {"CHECKPOINT": "base", "DATA_PATH": "0.5 a 0.5 b", "TOKENIZER": "tokenizer", "MASTER_ADDR": "node0"}
MODELS = {
    "dense_8b": {"TP": 4, "PP": 1, "CP": 8, "EP": 1, "nodes": 4, "layers": 32},
    "dense_70b": {"TP": 8, "PP": 4, "CP": 8, "EP": 1, "nodes": 32, "layers": 80},
    "moe_8x7b": {"TP": 4, "PP": 2, "CP": 8, "EP": 8, "nodes": 8, "layers": 32},
}
VARIANTS: dict[str, dict[str, str]] = {
    "real": {},
    "mock": {"MOCK": "1", "CHECKPOINT": "", "DATA_PATH": "", "TOKENIZER": ""},
    "annealed": {"START": "function-preserving", "ANNEAL_ITERS": "200"},
    "base": {"ROTARY_BASE": "8000000", "SEQ_LENGTH": "65536", "GLOBAL_BATCH_SIZE": "64"},
}


def script(name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with these variables and no others of its own."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    command = ["bash", str(FOLDER / f"{name}.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def printed(name: str, *flags: str, **variables: str) -> list[str]:
    """The launch command that ``DRY_RUN=1`` prints, the last line."""
    done = script(name, *flags, **(SITE | {"DRY_RUN": "1"} | variables))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def ranks_and_flags(command: list[str]) -> dict[str, Any]:
    """What torchrun makes of a command."""
    ranks = 1
    for flag in ("--nproc-per-node", "--nnodes"):
        ranks *= int(command[command.index(flag) + 1])
    assert command[command.index("-m") : command.index("-m") + 2] == ["-m", "megatron_fope"]
    return {"ranks": ranks, "flags": command[command.index("pretrain") + 1 :]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which Megatron sees a checkpoint until it loads it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(base: str) -> dict[str, Any]:
    """What Megatron's parser and validation say to every command, on the CPU, in one process."""
    cases = {
        f"{model} {name}": ranks_and_flags(printed(model, **({"CHECKPOINT": base} | variables)))
        for model in MODELS
        for name, variables in VARIANTS.items()
    }
    cases["slurm"] = ranks_and_flags(
        printed("slurm", str(FOLDER / "dense_70b.sh"), "--seed", "3", SLURM_NNODES="64", CHECKPOINT=base)
    )
    cases["packed"] = ranks_and_flags(printed("dense_8b", PACKED="1", CHECKPOINT=base))
    cases["typo"] = ranks_and_flags(printed("dense_8b", "--recompute-granulrity", "full", CHECKPOINT=base))
    cases["nodes"] = ranks_and_flags(printed("dense_8b", NNODES="3", CHECKPOINT=base))
    cases["cpu"] = ranks_and_flags(printed("moe_8x7b", CPU="1", SEQ_LENGTH="256", **VARIANTS["mock"]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "scripts" / "parse_commands.py")],
        input=json.dumps(cases),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.sh")))
def test_syntax(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.launch
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_megatron_accepts_the_command(model: str, variant: str, base: str, outcomes: dict[str, Any]) -> None:
    found, sizes = outcomes[f"{model} {variant}"], MODELS[model]
    assert found["code"] is None and found["error"] is None, (found["stderr"], found["error"])
    args = found["args"]
    length = 65536 if variant == "base" else LENGTH
    assert args["seq_length"] == args["fope_train_length"] == args["max_position_embeddings"] == length
    assert args["rotary_base"] == (8000000 if variant == "base" else 500000)
    assert args["position_embedding_type"] == "fope" and not args["create_attention_mask_in_dataloader"]
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
    assert args["pretrained_checkpoint"] == (None if variant == "mock" else base)
    assert args["load"] == args["save"] == f"out/{model}/checkpoints", "the same command resumes"
    starts = {"mock": None, "annealed": "function-preserving"}
    assert args["fope_start_from_rope"] == starts.get(variant, "immediate")
    assert args["fope_anneal_iters"] == (200 if variant == "annealed" else 0)
    assert bool(args["fope_change_rotary_base"]) == (variant == "base")


@pytest.mark.launch
def test_other_commands(outcomes: dict[str, Any]) -> None:
    slurm = outcomes["slurm"]["args"]
    assert slurm["world_size"] == 512 and slurm["data_parallel_size"] == 2 and slurm["seed"] == 3
    assert slurm["exit_duration_in_mins"] == 1380 and slurm["num_layers"] == 80
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
    assert (
        outcomes["nodes"]["code"] == 2
        and "takes 32 ranks, but WORLD_SIZE is 24" in outcomes["nodes"]["stderr"]
    )


@pytest.mark.parametrize(
    "name,flags,removed,message",
    [
        ("dense_8b", [], "CHECKPOINT", "dense_8b.sh: error: CHECKPOINT is not set; allowed: "),
        ("dense_70b", [], "DATA_PATH", "dense_70b.sh: error: DATA_PATH is not set; allowed: "),
        ("moe_8x7b", [], "TOKENIZER", "moe_8x7b.sh: error: TOKENIZER is not set; allowed: "),
        ("dense_8b", [], "MASTER_ADDR", "dense_8b.sh: error: MASTER_ADDR is not set; allowed: "),
        ("slurm", [], "", "slurm.sh: error: the first argument is ''; allowed: "),
        ("slurm", [str(FOLDER / "dense_8b.sh")], "", "slurm.sh: error: SLURM_JOB_ID is not set; allowed: "),
    ],
)
def test_missing_variables(name: str, flags: list[str], removed: str, message: str) -> None:
    done = script(name, *flags, **{key: value for key, value in SITE.items() if key != removed})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_words_stay_words() -> None:
    assert printed("dense_8b", "--wandb-exp-name", "a b; c")[-2:] == ["--wandb-exp-name", "a b; c"]


@pytest.mark.parametrize("iteration,requeued", [(400, True), (1000, False)])
def test_an_unfinished_job_goes_back_into_the_queue(iteration: int, requeued: bool, tmp_path: Path) -> None:
    commands = {
        "srun": 'mkdir -p "${TRACKER%/*}"; echo $ITERATION > "$TRACKER"; echo "$MASTER_ADDR $@"',
        "scontrol": '[[ $1 == show ]] && printf "node7\\nnode8\\n" || echo "scontrol $@"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "TRACKER": str(tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt"),
        "ITERATION": str(iteration),
        "SLURM_JOB_ID": "17",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    done = script("slurm", str(FOLDER / "dense_8b.sh"), "--seed", "3", **(SITE | job))
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(f"node7 --kill-on-bad-exit=1 bash {FOLDER / 'dense_8b.sh'} --seed 3\n")
    assert ("scontrol requeue 17" in done.stdout) == requeued
