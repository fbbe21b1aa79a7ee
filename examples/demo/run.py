"""RoPE against FoPE on real text, from nothing to a picture: ``make demo``.

Prepares the Python standard library's own source, trains a RoPE and a FoPE twin with two tensor-parallel
ranks through Megatron's training loop, and evaluates both checkpoints at 0.5 to 16 times the training length.
Needs no GPU and no download.

Environment variables:
    DEMO_ITERS   training iterations of 2048 tokens (default 1000)
    DEMO_LENGTH  training length in tokens (default 128)
    DEMO_OUT     output folder (default out/demo)
    DEMO_GPU=1   train on two GPUs instead of the CPU
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
import warnings
from importlib.metadata import version
from pathlib import Path

from megatron_fope.common.command_line import variable, whole
from megatron_fope.common.errors import exit_on_user_error
from megatron_fope.tools.data import prepare_data
from megatron_fope.tools.evaluation.perplexity_command import PerplexityOptions, evaluate_perplexity, table

with exit_on_user_error("demo"):
    ITERS = variable("DEMO_ITERS", "1000", whole(1))
    LENGTH = variable("DEMO_LENGTH", "128", whole(8))
OUT = Path(os.environ.get("DEMO_OUT", "out/demo"))
CPU = os.environ.get("DEMO_GPU") != "1"

# Megatron warns of every GPU library that is not there; of no interest here.
warnings.filterwarnings("ignore", category=UserWarning)

TOKENS_PER_ITER = 2048
MODEL = [
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "2"),
    *("--seq-length", str(LENGTH), "--max-position-embeddings", str(LENGTH)),
    *(
        "--normalization",
        "RMSNorm",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
    ),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--make-vocab-size-divisible-by", "128"),
]
TRAINING = [
    *("--tensor-model-parallel-size", "2"),
    *(
        "--micro-batch-size",
        str(TOKENS_PER_ITER // LENGTH),
        "--global-batch-size",
        str(TOKENS_PER_ITER // LENGTH),
    ),
    *("--train-iters", str(ITERS), "--lr", "2e-3", "--min-lr", "2e-4", "--lr-decay-style", "cosine"),
    *(
        "--lr-warmup-iters",
        str(ITERS // 20),
        "--weight-decay",
        "0.1",
        "--clip-grad",
        "1.0",
        "--adam-beta2",
        "0.95",
    ),
    *("--split", "99,1,0", "--eval-interval", str(ITERS), "--eval-iters", "8"),
    *("--log-interval", str(max(1, ITERS // 10)), "--save-interval", str(ITERS)),
]


def main() -> None:
    """Run the four steps; each prints what it does and how long it took."""
    start = time.time()
    OUT.mkdir(parents=True, exist_ok=True)

    step("1/4  preparing the Python standard library's source as byte tokens")
    data = prepare_data(
        sysconfig.get_paths()["stdlib"],
        OUT / "data" / "stdlib",
        include=["*.py"],
        exclude=["site-packages/*", "dist-packages/*", "*test*", "idlelib/*", "lib2to3/*"],
        holdout_fraction=0.05,
        on_bad_file="skip",
        overwrite=True,
        show_progress=False,
    )
    print(
        f"     {data.documents} files, {data.tokens / 1e6:.1f} million tokens, {data.heldout.tokens} held out"
    )

    for number, position in ((2, "rope"), (3, "fope")):
        step(f"{number}/4  training with --position-embedding-type {position}: {ITERS} iterations, 2 ranks")
        train(position, data.train.prefix, list(data.train_flags))

    step("4/4  evaluating both checkpoints on held-out files, at 0.5 to 16 times the training length")
    options = PerplexityOptions(
        checkpoints={"RoPE": OUT / "rope", "FoPE": OUT / "fope"},
        data_path=data.heldout.prefix,
        cpu=CPU,
        output=OUT / "report.json",
        picture=OUT / "length_generalization.png",
        title=f"Trained at {LENGTH} tokens, evaluated beyond",
    )
    report = evaluate_perplexity(options)
    facts = run_facts(time.time() - start)
    (OUT / "report.json").write_text(json.dumps({**report, "run": facts}, indent=2) + "\n")
    print(f"\nPerplexity per byte on held-out source, trained at {LENGTH} tokens:\n")
    print(table(report))
    print(f"\n{OUT / 'report.json'}  {OUT / 'length_generalization.png'}  ({facts['minutes']} minutes)")


def step(text: str) -> None:
    """Announce a step."""
    print(f"\n{datetime.datetime.now():%H:%M:%S}  {text}", flush=True)


def train(position: str, data_prefix: str, tokenizer_flags: list[str]) -> None:
    """Train one twin into ``OUT/<position>``; show the lines that matter, keep all of them in a log file."""
    log = OUT / f"{position}.log"
    checkpoint = OUT / position
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_fope", *(["--cpu"] if CPU else []), "pretrain"),
        *(*MODEL, *TRAINING, *tokenizer_flags),
        *("--data-path", data_prefix, "--data-cache-path", str(OUT / "data" / "cache")),
        *("--position-embedding-type", position),
        *("--save", str(checkpoint), "--tensorboard-dir", str(OUT / "tensorboard" / position)),
    ]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as log_file:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            log_file.write(line)
            if line.startswith("> FoPE"):
                print(f"     {line[2:]}", end="", flush=True)
            elif " lm loss: " in line and " iteration " in line:
                iteration, loss = (line.split(key)[1].split()[0] for key in (" iteration ", " lm loss: "))
                print(f"     iteration {iteration.rstrip('/'):>5}  loss {float(loss):.3f}", flush=True)
    if process.wait():
        sys.exit(f"training failed; see {log}")


def run_facts(seconds: float) -> dict[str, object]:
    """What made these numbers."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "command": "make demo",
        "iterations": ITERS,
        "commit": commit.stdout.strip() or None,
        "date": f"{datetime.date.today()}",
        "minutes": round(seconds / 60, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" if CPU else "2 GPUs",
        "versions": {name: version(name) for name in ("megatron-fope", "megatron-core", "torch")},
    }


if __name__ == "__main__":
    main()
