"""The scripts of ``examples/pretrain``: Megatron accepts them, they run, they stop, resume and refuse."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from example_scripts import EXAMPLES, error, executable, fake_slurm, parse, printed, script
from forks import Launcher
from launch import losses

from megatron_fope.tools.cli import main
from megatron_fope.tools.ladder import execution


@dataclass(frozen=True)
class Model:
    """What a script has to ask for."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    gain: float
    length: int
    batch: int
    micro: int
    nodes: int
    layout: dict[str, int] = field(default_factory=dict)
    """Sizes that are not 1."""
    cpu: dict[str, int] = field(default_factory=dict)
    """The same with CPU=1."""


MODELS = {
    "gpt_60m": Model(8, 512, 2048, 8, 8, 0.3, 512, 1024, 64, 1),
    "gpt_180m": Model(8, 1024, 4096, 8, 8, 0.4, 512, 1024, 32, 1),
    "gpt_1.2b": Model(16, 2048, 8192, 16, 16, 0.6, 512, 1024, 8, 1),
    "dense_8b": Model(32, 4096, 14336, 32, 8, 0.6, 8192, 512, 1, 4, {"tensor": 2}, {"tensor": 2}),
    "dense_70b": Model(
        80, 8192, 28672, 64, 8, 0.6, 8192, 1024, 1, 32, {"tensor": 8, "pipeline": 4}, {"pipeline": 2}
    ),
    "moe_8x7b": Model(
        *(32, 4096, 14336, 32, 8, 0.6, 8192, 512, 1, 8),
        {"tensor": 2, "pipeline": 4, "expert": 8},
        {"expert": 2},
    ),
}
POSITIONS = ("rope", "fope")
CONTINUED = {"dense_8b": "rope", "dense_70b": "fope", "moe_8x7b": "fope"}
"""Scripts of ``context_extension/``, and which of their models' runs they continue."""
SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
}
MOCK = {"MOCK": "1", "MASTER_ADDR": "node0"}


def path(model: str) -> str:
    """A script below ``examples/``."""
    return f"pretrain/{model}.sh"


def layout(args: dict[str, Any]) -> dict[str, int]:
    """The parallel sizes that are not 1."""
    return {name: args[key] for name, key in SIZES.items() if args[key] > 1}


@pytest.fixture(scope="module")
def outcomes(
    here: dict[str, str], launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What Megatron says to every command."""
    cases = {
        f"{model} {position}": printed(path(model), **(here | {"POSITION": position}))
        for model in MODELS
        for position in POSITIONS
    }
    cases["long"] = printed(path("gpt_180m"), SEQ_LENGTH="1024", **MOCK)
    cases["context"] = printed(path("dense_70b"), SEQ_LENGTH="65536", GLOBAL_BATCH_SIZE="128", **MOCK)
    cases["layout"] = printed(path("moe_8x7b"), NNODES="4", TP="1", PP="2", EP="4", ETP="2", **MOCK)
    cases["bytes"] = printed(path("gpt_60m"), "--seed", "3", **(here | {"TOKENIZER": "bytes"}))
    cases["minutes"] = printed(
        "slurm.sh", str(EXAMPLES / path("dense_8b")), SLURM_JOB_END_TIME=str(int(time.time()) + 7200), **MOCK
    )
    cases["typo"] = printed(path("gpt_60m"), "--tensor-modl-parallel-size", "1", **MOCK)
    return parse(launcher, tmp_path_factory.mktemp("parsed"), cases)


@pytest.mark.launch
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_megatron_accepts_the_command(name: str, position: str, outcomes: dict[str, Any]) -> None:
    found, model = outcomes[f"{name} {position}"], MODELS[name]
    assert found["code"] is None and found["error"] is None, (found["stderr"], found["error"])
    args = found["args"]
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    assert [args[key] for key in shape] == [
        *(model.layers, model.hidden, model.ffn, model.heads, model.hidden // model.heads)
    ]
    assert (args["num_query_groups"] if args["group_query_attention"] else model.heads) == model.groups
    assert args["seq_length"] == model.length and args["global_batch_size"] == model.batch
    assert args["micro_batch_size"] == model.micro
    assert args["world_size"] == 8 * model.nodes and layout(args) == model.layout
    assert args["position_embedding_type"] == position and not args["mock_data"]
    assert args["min_lr"] == pytest.approx(args["lr"] / 10) and args["lr_warmup_fraction"] < 1
    assert args["save"] == args["load"] == f"out/pretrain/{name}-{position}/checkpoints"
    if position == "fope":
        assert args["fope_gain"] == model.gain and args["fope_train_length"] == model.length


@pytest.mark.launch
def test_other_commands(outcomes: dict[str, Any]) -> None:
    args = {name: found["args"] for name, found in outcomes.items() if name != "typo"}
    assert (args["long"]["global_batch_size"], args["long"]["micro_batch_size"]) == (512, 16)
    assert args["long"]["fope_train_length"] == 1024
    assert layout(args["context"]) == {"tensor": 8, "pipeline": 4, "context": 8}
    assert layout(args["layout"]) == {"pipeline": 2, "expert": 4}
    assert args["layout"]["expert_tensor_parallel_size"] == 2 and args["layout"]["world_size"] == 32
    assert args["bytes"]["tokenizer_type"] == "NullTokenizer" and args["bytes"]["seed"] == 3
    assert 108 <= args["minutes"]["exit_duration_in_mins"] <= 110 and args["minutes"]["exit_signal_handler"]
    assert outcomes["typo"]["code"] == 2 and "--tensor-modl-parallel-size" in outcomes["typo"]["stderr"]


def test_the_papers_warmup_is_10000_iterations() -> None:
    command = printed(path("gpt_60m"), **MOCK)
    fraction, iterations = (
        float(command[command.index(flag) + 1]) for flag in ("--lr-warmup-fraction", "--train-iters")
    )
    assert round(fraction * iterations) == 10000
    assert iterations * 1024 * 512 == pytest.approx(10e9, rel=1e-4)


@pytest.mark.parametrize("name", sorted(str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.sh")))
def test_every_script_parses_and_is_in_a_readme(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    folders = (EXAMPLES, (EXAMPLES / name).parent)
    readmes = [folder / "README.md" for folder in folders if (folder / "README.md").exists()]
    named = re.compile(rf"`([\w/]+/)?{re.escape(Path(name).name)}`")
    assert any(named.search(readme.read_text()) for readme in readmes)


@pytest.mark.parametrize(
    "name,variables,message",
    [
        ("gpt_60m", {"DATA_PATH": ""}, "DATA_PATH is not set; requires what Megatron's --data-path takes"),
        ("gpt_60m", {"DATA_PATH": "/no/data"}, "DATA_PATH: /no/data.bin or /no/data.idx does not exist"),
        ("gpt_60m", {"TOKENIZER": ""}, "TOKENIZER is not set; requires a folder of a Hugging Face tokenizer"),
        ("gpt_60m", {"TOKENIZER": "/no/tokenizer"}, "TOKENIZER: /no/tokenizer does not exist"),
        ("dense_8b", {"MASTER_ADDR": ""}, "MASTER_ADDR is not set; requires the name of the first node"),
        ("dense_8b", {"POSITION": "alibi"}, "POSITION is 'alibi'; allowed: rope or fope"),
        ("dense_8b", {"NNODES": "two"}, "NNODES is 'two'; allowed: a whole number, 1 or more"),
        ("dense_8b", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is '0'; allowed: a whole number, 1 or more"),
        ("dense_8b", {"MOCK": "yes"}, "MOCK is 'yes'; allowed: 1 or 0"),
        (
            "dense_8b",
            {"TP": "4", "CP": "16"},
            "TP x PP x CP is 4 x 1 x 16 = 64, but NNODES x GPUS_PER_NODE is 4 x 8 = 32 GPUs; allowed: ",
        ),
        ("dense_70b", {"PP": "3", "NNODES": "3"}, "PP is 3; allowed: divisors of the model's 80 layers"),
        ("dense_8b", {"TP": "3", "NNODES": "3"}, "TP is 3; allowed: divisors or multiples of the "),
        ("dense_8b", {"CP": "4", "SEQ_LENGTH": "4100"}, "SEQ_LENGTH is 4100; allowed: multiples of 8"),
        ("dense_8b", {"EP": "2"}, "EP is 2 and ETP is 1, but the model has no experts; allowed: 1"),
        ("moe_8x7b", {"EP": "3"}, "EP is 3; allowed: divisors of the model's 8 experts"),
        (
            "moe_8x7b",
            {"NNODES": "2"},
            "EP x ETP x PP is 8 x 1 x 4 = 32, but NNODES x GPUS_PER_NODE is 2 x 8 = 16 GPUs; allowed: ",
        ),
        (
            "dense_8b",
            {"GLOBAL_BATCH_SIZE": "100"},
            "GLOBAL_BATCH_SIZE is 100; allowed: multiples of MICRO_BATCH_SIZE x 16 data-parallel replicas",
        ),
        ("evaluate", {}, "CHECKPOINTS is not set; requires folders made by --save"),
        ("evaluate", {"CHECKPOINTS": "A=/no/run"}, "CHECKPOINTS: /no/run is not a folder made by --save"),
        ("evaluate", {"CHECKPOINTS": "A={base}", "DATA_PATH": ""}, "DATA_PATH is not set; requires a held"),
        ("evaluate", {"CHECKPOINTS": "{base}", "DATA_PATH": "/no/x"}, "DATA_PATH: /no/x.bin or /no/x.idx do"),
    ],
)  # fmt: skip
def test_mistakes(name: str, variables: dict[str, str], message: str, here: dict[str, str]) -> None:
    given = {key: value.replace("{base}", here["CHECKPOINT"]) for key, value in variables.items()}
    assert error(path(name), **(here | given)).startswith(message)
    if name != "evaluate":  # a dry run says the same
        assert error(path(name), **(here | given | {"DRY_RUN": "1"})).startswith(message)


def test_fewer_gpus_than_asked_for(tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", 'echo "GPU 0: H100"; echo "GPU 1: H100"')
    found = error(path("gpt_60m"), PATH=f"{tmp_path}:{os.environ['PATH']}", **MOCK)
    assert found == "GPUS_PER_NODE is 8, but this machine has 2 GPUs"


@dataclass(frozen=True)
class Finished:
    """A run of what a script prints with CPU=1."""

    log: str
    checkpoints: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> dict[str, Finished]:
    """Every script with CPU=1, a RoPE twin of the 8B model, and three of them continued at 256 tokens."""
    found: dict[str, Finished] = {}

    def run(name: str, script_path: str, *, save: bool, **variables: str) -> None:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        command = printed(script_path, OUT=str(folder), CPU="1", **MOCK, **variables)
        assert command[command.index("--nproc-per-node") + 1] == "2"
        argv = command[command.index("megatron_fope") + 1 :]
        if not save:  # the writers of a checkpoint take longer than the training
            at = argv.index("--save")
            del argv[at : at + 2]
        found[name] = Finished(launcher.output(2, argv, folder / "log"), folder / "checkpoints")

    for name in MODELS:
        run(f"{name} fope", path(name), save=name == "gpt_60m" or CONTINUED.get(name) == "fope")
    run("dense_8b rope", path("dense_8b"), save=True, POSITION="rope")
    for name, position in CONTINUED.items():
        variables = {"CHECKPOINT": str(found[f"{name} {position}"].checkpoints), "SEQ_LENGTH": "256"}
        run(f"{name} continued", f"context_extension/{name}.sh", save=False, **variables)
    return found


@pytest.mark.launch
@pytest.mark.parametrize("name", MODELS)
def test_every_script_trains_scaled_down(name: str, runs: dict[str, Finished]) -> None:
    log = runs[f"{name} fope"].log
    assert len(losses(log)) == 4 and all(4.5 < loss < 6.5 for loss in losses(log)), log[-4000:]
    assert f"gain {MODELS[name].gain:g}" in log and "train length 128 tokens" in log
    for size, number in MODELS[name].cpu.items():
        assert re.search(rf"{SIZES[size]} \.+ {number}\n", log), f"{size} on the CPU"


@pytest.mark.launch
def test_the_twins_differ_in_the_position_embedding_only(runs: dict[str, Finished]) -> None:
    logs = {position: runs[f"dense_8b {position}"].log for position in POSITIONS}
    assert "> FoPE: profile" in logs["fope"] and "> FoPE: profile" not in logs["rope"]
    counts = [re.findall(r"number of parameters.*: (\d+)", log) for log in logs.values()]
    assert counts[0] == counts[1] and counts[0]
    assert losses(logs["rope"])[0] != losses(logs["fope"])[0]


@pytest.mark.launch
@pytest.mark.parametrize("name", CONTINUED)
def test_a_trained_model_is_continued_at_a_longer_length(name: str, runs: dict[str, Finished]) -> None:
    """The scripts of both folders fit each other: shape, rotary base, another layout."""
    log = runs[f"{name} continued"].log
    if CONTINUED[name] == "rope":
        assert "the coefficients are fresh (seed 1234)" in log and "is a RoPE model" in log
    else:
        assert "the coefficients grow (aligned) from train length 128 to 256" in log
    assert "train length 256 tokens" in log and len(losses(log)) == 4


SCALED = {
    "gpus": "2",
    "num-layers": "2",
    "hidden-size": "64",
    "ffn-hidden-size": "128",
    "num-attention-heads": "4",
    "num-query-groups": "2",
    "kv-channels": "16",
    "tensor-model-parallel-size": "1",
    "overlap-grad-reduce": "false",
    "overlap-param-gather": "false",
    "tokenizer-type": '"NullTokenizer"',
    "tokenizer-model": "false\nvocab-size = 255",
    "data-path": "false\nmock-data = true",
    "context-parallel-size": "2",
    "global-batch-size": "2",
    "train-iters": "2",
}
"""What a ladder's keys become on two processes of a CPU; all other lines stay as they are shipped."""


@pytest.mark.launch
@pytest.mark.parametrize("ladder", [str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.toml")])
def test_every_ladder_trains_scaled_down(
    ladder: str,
    runs: dict[str, Finished],
    launcher: Launcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the 8B model's RoPE checkpoint, to the last iteration of the last stage."""
    text = (EXAMPLES / ladder).read_text()
    for key, value in SCALED.items():
        text, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert count, key
    for shipped, scaled in ((8192, 128), (32768, 256), (131072, 512)):
        assert f"seq-length = {shipped}\n" in text
        text = text.replace(f"seq-length = {shipped}\n", f"seq-length = {scaled}\n")
    (tmp_path / "ladder.toml").write_text(text)
    site = {"CHECKPOINT": str(runs["dense_8b rope"].checkpoints), "OUT": str(tmp_path / "out")}
    for name, value in (site | {"MASTER_ADDR": "a", "TOKENIZER": "t", "DATA_PATH": "d"}).items():
        monkeypatch.setenv(name, value)
    logs = []

    def call(argv: list[str]) -> int:
        words = ["--cpu", *argv[argv.index("megatron_fope") + 1 :]]
        code, log = launcher.run(2, words, tmp_path / f"log{len(logs)}")
        logs.append(log)
        return code

    monkeypatch.setattr(execution, "_call", call)
    assert main(["ladder", str(tmp_path / "ladder.toml"), "--run"]) == 0, logs[-1][-4000:]
    assert [len(losses(log)) for log in logs] == [2] * text.count("\n[[stage]]\n")


def test_no_file_of_the_examples_is_forgotten() -> None:
    """Every script is one of those that the tests run."""
    trained = {*map(path, MODELS), *(f"context_extension/{name}.sh" for name in CONTINUED)}
    others = {"pretrain/evaluate.sh", "slurm.sh", "common.sh", "models.sh"}
    assert {str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.sh")} == trained | others


@pytest.mark.launch
def test_evaluation(runs: dict[str, Finished], tmp_path: Path) -> None:
    folder = str(runs["gpt_60m fope"].checkpoints)
    variables = {"LENGTHS": "64,256", "SAMPLES": "2", "MOCK": "1", "CPU": "1", "OUT": str(tmp_path)}
    flags = ("--tokens-per-batch", "2048")
    dry = script(path("evaluate"), *flags, CHECKPOINTS=f"A={folder} {folder}", DRY_RUN="1", **variables)
    assert [line.split()[1] for line in dry.stdout.splitlines()] == [
        *("make-recall-data", "evaluate-perplexity", "evaluate-retrieval")
    ]
    both = f" --checkpoint A={folder} --checkpoint {folder} "
    assert dry.stdout.count(both) == 2 and not list(tmp_path.iterdir())

    done = script(path("evaluate"), *flags, CHECKPOINTS=f"FoPE={folder}", **variables)
    assert done.returncode == 0, (done.stdout, done.stderr)
    results = json.loads((tmp_path / "perplexity.json").read_text())["checkpoints"]["FoPE"]["results"]
    assert [row["length"] for row in results] == [64, 256]
    assert all(50 < row["perplexity"] < 500 for row in results)
    rows = list(csv.DictReader((tmp_path / "retrieval.csv").open()))
    assert {row["length"] for row in rows} == {"64", "256"}
    assert {row["checkpoint"] for row in rows} == {"FoPE"}


@pytest.mark.launch
def test_a_job_is_told_to_stop_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    """TERM to the task of a node, as SLURM sends it: saved, requeued, resumed, finished, not requeued."""
    task, log = tmp_path / "task", tmp_path / "job.log"
    variables = (
        MOCK | fake_slurm(tmp_path) | {"CPU": "1", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    )
    job = ["bash", str(EXAMPLES / "slurm.sh"), str(EXAMPLES / path("gpt_60m")), "--eval-iters", "0"]
    job += ["--train-iters", "4000"]
    with log.open("w") as output:
        process = subprocess.Popen(
            job, env=variables | {"HOME": str(tmp_path)}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while " iteration        3/" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.1)
            os.kill(int(task.read_text()), signal.SIGTERM)
            assert process.wait(timeout=120) == 0, log.read_text()[-4000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    saved = int((tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < 4000
    assert f"slurm.sh: iteration {saved} of 4000; back into the queue" in log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"

    end = ["--train-iters", str(saved + 2), "--override-opt_param-scheduler"]
    done = subprocess.run(
        [*job, *end], env=variables | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    iterations = [int(n) for n in re.findall(r" iteration +(\d+)/", done.stdout)]
    assert iterations == [saved + 1, saved + 2]
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
