"""Ways from a trained model to a four times longer context, compared: ``make extend``.

    python examples/extend/run.py {starts,growth}

``starts`` trains a RoPE and a FoPE model at a short length on source code and a recall task, and continues
them at four times that length in nine ways with the same tokens. ``growth`` does so for FoPE with a smaller
base: more frequencies are kept than there are outputs, and the rules of growth differ. Everything is
evaluated at 1 to 16 times the short length: loss, perplexity on held-out source, and how many answers are
found. Needs no GPU and no download.

Environment variables:
    EXTEND_LENGTH      length of the first training in tokens (default 128)
    EXTEND_ITERS       its iterations of 4096 tokens (default 800)
    EXTEND_MORE_ITERS  iterations of each continuation (default 200)
    EXTEND_SEEDS       seeds, separated by commas (default 1234,4321)
    EXTEND_JOBS        runs at a time, one CPU thread each (default: the number of cores)
    EXTEND_OUT         output folder (default out/extend)
    EXTEND_GPU=1       run on a GPU instead of the CPU
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import write_up

from megatron_fope.common.command_line import separated, variable, whole
from megatron_fope.common.errors import exit_on_user_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.results import facts

from megatron_fope.tools.data import prepare_data
from megatron_fope.tools.data.recall import make_recall_data
from megatron_fope.tools.evaluation.perplexity_command import PerplexityOptions, evaluate_perplexity
from megatron_fope.tools.evaluation.retrieval_command import RetrievalOptions, evaluate_retrieval

with exit_on_user_error("extend"):
    LENGTH = variable("EXTEND_LENGTH", "128", whole(8))
    ITERS = variable("EXTEND_ITERS", "800", whole(1))
    MORE_ITERS = variable("EXTEND_MORE_ITERS", "200", whole(1))
    SEEDS = variable("EXTEND_SEEDS", "1234,4321", separated(whole(1)))
    JOBS = variable("EXTEND_JOBS", str(os.cpu_count() or 1), whole(1))
STUDIES = ("starts", "growth")
STUDY = sys.argv[1] if sys.argv[1:] else "starts"
OUT = Path(os.environ.get("EXTEND_OUT", "out/extend")) / STUDY
CPU = os.environ.get("EXTEND_GPU") != "1"

FACTOR = 4
LONG = FACTOR * LENGTH
LENGTHS = [LENGTH * factor for factor in (1, 2, 4, 8, 16)]
TOKENS_PER_ITER = 4096
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 16
"""Prompts per length and depth."""
_LOSS = re.compile(r" iteration +(\d+)/.* lm loss: ([-+.\dEeNnAa]+)")

# Megatron warns of every GPU library that is not there; of no interest here.
warnings.filterwarnings("ignore", category=UserWarning)

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 128 --num-attention-heads 2 --ffn-hidden-size 352 --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    f"--hidden-dropout 0 --init-method-std 0.08 --max-position-embeddings {LENGTHS[-1]}"
)
TRAINING = shlex.split(
    "--weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --split 99,1,0 --eval-iters 1 --log-interval 1 "
    "--lr-decay-style cosine"
)


@dataclass(frozen=True)
class Way:
    """One way to continue."""

    name: str
    label: str
    base: str
    """Which model: ``rope`` or ``fope``."""
    flags: str


START = "--position-embedding-type fope --fope-start-from-rope"
GROW = "--position-embedding-type fope --fope-grow --fope-growth"
FROM_ROPE = (
    Way("rope", "RoPE", "rope", "--position-embedding-type rope"),
    Way(
        "yarn",
        "RoPE + YaRN",
        "rope",
        # A Fourier series of one term without a floor is RoPE; tests/formula/test_functional.py checks it.
        f"{START} --fope-init identity --fope-square --no-fope-clip --fope-pad-value 0,1 --fope-scaling yarn "
        f"--fope-scaling-factor {FACTOR} --fope-original-length {LENGTH} "
        f"--fope-attention-scaling {0.1 * math.log(FACTOR) + 1:.6f}",
    ),
    Way("immediate", "RoPE to FoPE, immediate", "rope", f"{START} immediate"),
    Way(
        "function-preserving",
        "RoPE to FoPE, function-preserving",
        "rope",
        f"{START} function-preserving --fope-anneal-iters {max(1, MORE_ITERS // 2)}",
    ),
    Way("clip-only", "RoPE, clip-only", "rope", f"{START} clip-only"),
)
FROM_FOPE = (
    Way("aligned", "FoPE, grown: aligned", "fope", f"{GROW} aligned"),
    Way("upstream", "FoPE, grown: upstream", "fope", f"{GROW} upstream"),
    Way("upstream-zeros", "FoPE, grown: upstream-zeros", "fope", f"{GROW} upstream-zeros"),
    Way(
        "not-grown", "FoPE, not grown", "fope", f"--position-embedding-type fope --fope-train-length {LENGTH}"
    ),
)
WAYS = FROM_FOPE if STUDY == "growth" else FROM_ROPE + FROM_FOPE
BASES = {kind: f"{kind[0].upper()}oPE at {LENGTH} only" for kind in ("rope", "fope")}
if STUDY == "growth":
    del BASES["rope"]
    # 14 frequencies and outputs at 128 tokens become 21 and 16 at 512, with heads of 64 channels.
    MODEL += ["--rotary-base", "1000"]
LABELS = {f"base-{base}": label for base, label in BASES.items()} | {way.name: way.label for way in WAYS}


@dataclass(frozen=True)
class Data:
    """Datasets of the study."""

    text: str
    heldout: str
    recall: dict[int, str]
    """By document length."""
    flags: list[str]
    """Megatron's flags for the tokenizer."""


def main() -> None:
    """Run the steps; each prints what it does."""
    if STUDY not in STUDIES:
        raise SystemExit(f"extend: error: the study is {STUDY!r}; allowed: {', '.join(STUDIES)}")
    start = time.time()
    OUT.mkdir(parents=True, exist_ok=True)
    step(f"1/4  data: the Python standard library's source as bytes, recall at {LENGTH} and {LONG} tokens")
    data = prepare()
    report: dict[str, Any] = {
        "command": "make extend",
        "study": STUDY,
        "train_length": LENGTH,
        "continued_length": LONG,
        "tokens": {"first": ITERS * TOKENS_PER_ITER, "continued": MORE_ITERS * TOKENS_PER_ITER},
        "seeds": SEEDS,
        "prompts": len(DEPTHS) * SAMPLES,
        "labels": LABELS,
        "flags": {way.name: way.flags for way in WAYS},
    }
    with ThreadPoolExecutor(JOBS) as pool:
        step(
            f"2/4  training at {LENGTH} tokens: {' and '.join(BASES)}, {len(SEEDS)} seeds, {ITERS} iterations"
        )
        firsts = [(base, seed) for seed in SEEDS for base in BASES]
        first_losses = list(pool.map(lambda one: train_base(*one, data), firsts))
        step(f"3/4  continuing at {LONG} tokens: {len(WAYS)} ways, {MORE_ITERS} iterations")
        continued = [(way, seed) for seed in SEEDS for way in WAYS]
        losses = list(pool.map(lambda one: train_way(*one, data), continued))
        step(f"4/4  evaluating at {', '.join(map(str, LENGTHS))} tokens")
        models = [(f"base-{base}", seed) for base, seed in firsts]
        models += [(way.name, seed) for way, seed in continued]
        results = list(pool.map(lambda one: evaluate(*one, data), models))
    report["models"] = [
        {"name": name, "seed": seed, "loss": loss, **result}
        for (name, seed), loss, result in zip(models, [*first_losses, *losses], results, strict=True)
    ]
    import torch

    torch.set_num_threads(1)
    report |= facts(torch.device("cpu" if CPU else "cuda"))
    report |= {"jobs": JOBS, "minutes": round((time.time() - start) / 60, 1)}
    (OUT / "report.json").write_text(json.dumps(report) + "\n")
    text = write_up.write(report, OUT)
    print(f"\n{text}\n{OUT}/report.json, results.md and three pictures  ({report['minutes']} minutes)")


def step(text: str) -> None:
    """Announce a step."""
    print(f"\n{datetime.datetime.now():%H:%M:%S}  {text}", flush=True)


def prepare() -> Data:
    """Write the datasets."""
    text = prepare_data(
        sysconfig.get_paths()["stdlib"],
        OUT / "data" / "stdlib",
        include=["*.py"],
        exclude=["site-packages/*", "dist-packages/*", "*test*", "idlelib/*", "lib2to3/*"],
        holdout_fraction=0.05,
        on_bad_file="skip",
        overwrite=True,
        show_progress=False,
    )
    recall = {}
    for length, iterations in ((LENGTH, ITERS), (LONG, MORE_ITERS)):
        made = make_recall_data(
            OUT / "data" / f"recall{length}",
            length=length,
            documents=max(64, iterations * TOKENS_PER_ITER // length),
            text=text.train.prefix,
            overwrite=True,
        )
        recall[length] = made.train.prefix
    return Data(text.train.prefix, text.heldout.prefix, recall, list(made.train_flags))


def train_base(base: str, seed: int, data: Data) -> list[float]:
    """Train a model at the short length."""
    flags = ["--position-embedding-type", base, "--lr", "3e-3", "--min-lr", "6e-4"]
    return train(f"base-{base}", seed, LENGTH, ITERS, flags, data)


def train_way(way: Way, seed: int, data: Data) -> list[float]:
    """Continue a model at the long length; the optimizer starts afresh in all of them."""
    flags = [*way.flags.split(), "--lr", "6e-4", "--min-lr", "1e-4"]
    flags += ["--load", str(folder(f"base-{way.base}", seed)), "--finetune", "--exit-on-missing-checkpoint"]
    return train(way.name, seed, LONG, MORE_ITERS, flags, data)


def folder(name: str, seed: int) -> Path:
    """Where a model's checkpoint is."""
    return OUT / "models" / f"{name}-{seed}"


def train(name: str, seed: int, length: int, iterations: int, flags: list[str], data: Data) -> list[float]:
    """Train one model.

    Returns:
        The loss of every iteration.
    """
    save, batch = folder(name, seed), str(max(1, TOKENS_PER_ITER // length))
    save.parent.mkdir(parents=True, exist_ok=True)
    log = save.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "megatron_fope", *(["--cpu"] if CPU else []), "pretrain"),
        *(*MODEL, *TRAINING, *flags, *data.flags, "--seed", str(seed), "--seq-length", str(length)),
        *("--micro-batch-size", batch, "--global-batch-size", batch, "--train-iters", str(iterations)),
        *("--lr-warmup-iters", str(iterations // 20), "--eval-interval", str(iterations)),
        *("--data-path", "1", data.text, "1", data.recall[length]),
        *("--data-cache-path", str(OUT / "data" / f"cache-{name}-{seed}")),
        *("--save", str(save), "--save-interval", str(iterations)),
    ]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    losses = [float(value) for _, value in _LOSS.findall(log.read_text())]
    if done.returncode or len(losses) != iterations:
        raise SystemExit(f"extend: error: training of {name} failed; see {log}")
    print(f"     {name} (seed {seed})  loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}", flush=True)
    return losses


def evaluate(name: str, seed: int, data: Data) -> dict[str, Any]:
    """Perplexity on held-out source and recall of one model, by length."""
    common: dict[str, Any] = {"checkpoints": {name: folder(name, seed)}, "lengths": LENGTHS, "cpu": CPU}
    text = evaluate_perplexity(PerplexityOptions(data_path=data.heldout, tokens=1 << 14, **common))
    found = evaluate_retrieval(
        RetrievalOptions(data_path=data.recall[LENGTH], depths=DEPTHS, samples=SAMPLES, **common)
    )
    print(f"     {name} (seed {seed}) evaluated", flush=True)
    return {
        "perplexity": {str(row["length"]): row["perplexity"] for row in text["checkpoints"][name]["results"]},
        "recall": [
            {key: row[key] for key in ("length", "depth", "accuracy")}
            for row in found["checkpoints"][name]["results"]
        ],
    }


if __name__ == "__main__":
    main()
