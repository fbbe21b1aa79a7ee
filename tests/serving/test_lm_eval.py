"""lm_eval finds with an export what Megatron computes; ``make test-lm-eval``, with ``.venv-lm-eval``."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import LONG, byte_tokenizer, make_exports, reference
from forks import Launcher
from launch import ROOT
from torch import Tensor
from trainer import Trainer

PACKAGES = ROOT / ".venv-lm-eval"
TASKS = Path(__file__).with_name("tasks")
NAMES = ["paper, dense", "intern-s1-pro, experts"]
GENERATED, END = 16, 256
# Contexts within the trained length of 64 tokens and far beyond it, each with 40 more tokens.
CONTEXTS, CONTINUATION = (20, 100, LONG - 40), 40


def texts() -> list[Tensor]:
    """Bytes of English, ``[context + continuation]`` each."""
    text = torch.tensor(list((ROOT / "CONTRIBUTING.md").read_text().encode("ascii", "ignore")))
    return [text[: context + CONTINUATION] for context in CONTEXTS]


@pytest.fixture(scope="module", params=NAMES)
def samples(
    request: pytest.FixtureRequest, trainer: Trainer, launcher: Launcher, tmp_path_factory: Any
) -> tuple[list[float], dict[str, list[Any]]]:
    """Megatron's log-likelihoods of the continuations, and what lm_eval says of every text."""
    assert (PACKAGES / "lm_eval").is_dir(), f"lm_eval is not in {PACKAGES}; use make test-lm-eval"
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = byte_tokenizer(folder / "tokenizer")
    contexts = [text[:-CONTINUATION] for text in texts()]
    made = make_exports(
        [request.param], trainer, launcher, folder, prompts=contexts, generated=GENERATED, tokenizer=tokenizer
    )[request.param]
    likelihoods, documents = [], []
    whole = reference(launcher, made.checkpoint, texts(), 0, folder)
    for (text, logits, _), (context, _, generated) in zip(whole, torch.load(made.reference), strict=True):
        chosen = logits.log_softmax(-1)[:-1].gather(1, text[1:, None])[:, 0]
        likelihoods.append(chosen[-CONTINUATION:].sum().item())
        answer = bytes(itertools.takewhile(lambda token: token != END, generated.tolist()))
        documents.append(
            {
                "context": bytes(context.tolist()).decode(),
                "continuation": bytes(text[-CONTINUATION:].tolist()).decode(),
                "generated": answer.decode(errors="replace"),
            }
        )
    (folder / "texts.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "lm_eval",
                "run",
                "--model",
                "hf",
                "--device",
                "cpu",
                "--batch_size",
                "1",
            ),
            *("--model_args", f"pretrained={made.folder},trust_remote_code=True,dtype=float32"),
            *("--include_path", str(TASKS), "--tasks", "tiny_likelihood,tiny_generation"),
            *("--output_path", str(folder / "out"), "--log_samples"),
        ],
        env=os.environ
        | {
            "PYTHONPATH": str(PACKAGES),
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found = {}
    for name in ("tiny_likelihood", "tiny_generation"):
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = sorted(lines, key=lambda line: line["doc_id"])
    return likelihoods, found


@pytest.mark.launch
def test_likelihoods(samples: tuple[list[float], dict[str, list[Any]]]) -> None:
    expected, found = samples
    values = [float(line["resps"][0][0][0]) for line in found["tiny_likelihood"]]
    print(f"log-likelihoods {values}; Megatron's {expected}")
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.launch
def test_generation(samples: tuple[list[float], dict[str, list[Any]]]) -> None:
    _, found = samples
    for line in found["tiny_generation"]:
        assert line["resps"][0][0] == line["doc"]["generated"] and line["exact_match"] == 1.0
        assert line["doc"]["generated"]
