"""Bad input: refused before training with exit code 2 and one line that names the flag and what is allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_fope import cli, compat
from megatron_fope.errors import UserError
from megatron_fope.evaluation import command as evaluation

SCRIPT = Path(__file__).parent / "scripts" / "bad_input_cases.py"
PREFIX = "megatron-fope: error: "

FOPE = ("--position-embedding-type", "fope")
ROPE = ("--position-embedding-type", "rope")


@dataclass(frozen=True)
class Case:
    """A command line, and what its one line must start with and contain."""

    flags: tuple[str, ...]
    start: str
    parts: tuple[str, ...] = ()
    complete: bool = True
    """Add the flags that the CPU needs."""


def case(flags: str, start: str, *parts: str, position: tuple[str, ...] = FOPE, complete: bool = True) -> Case:
    return Case((*position, *flags.split()), start, parts, complete)


SETTINGS = {
    "unknown profile": case("--fope-profile papre", "--fope-profile is 'papre'", "paper, intern-s1-pro"),
    "gain zero": case("--fope-gain 0", "--fope-gain is 0.0", "greater than 0"),
    "gain negative": case("--fope-gain -0.3", "--fope-gain is -0.3", "greater than 0"),
    "gain not a number": case("--fope-gain nan", "--fope-gain is nan", "greater than 0"),
    "train length 1": case("--fope-train-length 1", "--fope-train-length is 1", "at least 2 tokens"),
    "train length 0": case("--fope-train-length 0", "--fope-train-length is 0", "at least 2 tokens"),
    "train length negative": case("--fope-train-length -64", "--fope-train-length is -64", "at least 2"),
    "no frequency left": case("--fope-train-length 6", "--fope-train-length is 6", "at least 7 tokens"),
    "no frequency left by the ratio": case(
        "--fope-floor-ratio 20", "--fope-train-length is 64", "20 cycle(s)", "at least 126 tokens"
    ),
    "floor ratio zero": case("--fope-floor-ratio 0", "--fope-floor-ratio is 0.0", "greater than 0"),
    "odd head dimension": case("--kv-channels 15", "--kv-channels", "is 15", "even number >= 4"),
    "head dimension too small": case("--kv-channels 2", "--kv-channels", "is 2", "even number >= 4"),
    "base": case("--rotary-base 1", "--rotary-base is 1.0", "greater than 1"),
    "unknown init": case("--fope-init zeros", "--fope-init is 'zeros'", "eye_xavier_norm", "xavier_uniform"),
    "unknown padding": case("--fope-padding 0,0", "--fope-padding is '0,0'", "1,1, 0,1"),
    "unknown scaling": case("--fope-scaling ntk", "--fope-scaling is 'ntk'", "none, pi, linear, yarn, llama3"),
    "yarn without original length": case(
        "--fope-scaling yarn --fope-scaling-factor 4", "--fope-original-length is 0", "before extension", "yarn"
    ),
    "llama3 without original length": case(
        "--fope-scaling llama3 --fope-scaling-factor 4", "--fope-original-length is 0", "llama3"
    ),
    "pi without original length": case("--fope-scaling pi", "--fope-original-length is 0", "pi"),
    "scaling factor below one": case(
        "--fope-scaling linear --fope-scaling-factor 0.5", "--fope-scaling-factor is 0.5", "at least 1"
    ),
    "too many frequencies": case("--fope-num-inv-freq 9", "--fope-num-inv-freq is 9", "1 to 8"),
    "no frequencies": case("--fope-num-inv-freq 0", "--fope-num-inv-freq is 0", "1 to 8"),
    "negative seed": case("--fope-seed -1", "--fope-seed is -1", "0 to 2^63 - 1"),
    "odd basis": case("--fope-basis-dim 33", "--fope-basis-dim is 33", "even"),
    "wide basis with square coefficients": case(
        "--fope-profile intern-s1-pro --fope-basis-dim 128", "--fope-basis-dim is 128", "--fope-profile paper"
    ),
    "attention scaling": case("--fope-attention-scaling 0", "--fope-attention-scaling is 0.0", "> 0"),
    "learnable and shared": case(
        "--fope-learnable --fope-profile intern-s1-pro", "--fope-learnable is given", "--no-fope-shared-layers"
    ),
    "fope flag with rope": case(
        "--fope-gain 0.3", "--fope-gain is 0.3", "--position-embedding-type is 'rope'", "fope", position=ROPE
    ),
    "fope switch without a position embedding type": case(
        "--no-fope-clip",
        "--fope-clip is False",
        "--position-embedding-type is 'learned_absolute'",
        "fope",
        position=(),
    ),
}

HOST_FLAGS = {
    "interleaved": case("--rotary-interleaved", "--rotary-interleaved is given", "leave it out"),
    "rotary percent": case("--rotary-percent 0.5", "--rotary-percent is 0.5", "1.0"),
    "multi-latent attention": case(
        "--multi-latent-attention", "--multi-latent-attention is given", "leave it out"
    ),
    "multimodal sections": case("--mrope-section 2 3 3", "--mrope-section is given", "leave it out"),
    "no transformer engine": case(
        "--transformer-impl transformer_engine",
        "--transformer-impl is transformer_engine",
        "pip install 'megatron-fope[te]'",
        "--transformer-impl local",
        complete=False,
    ),
    "masking between documents with context parallelism": case(
        "--dataloader-inter-document-masking --context-parallel-size 2",
        "--dataloader-inter-document-masking is given",
        "--context-parallel-size 2",
        "allowed: --context-parallel-size 1",
    ),
}

CHECKPOINTS = {
    "paper": {"flags": [*FOPE, "--fope-gain", "0.4"], "format": "torch"},
    "distributed": {"flags": [*FOPE, "--fope-gain", "0.4"], "format": "torch_dist"},
    "intern": {"flags": [*FOPE, "--fope-profile", "intern-s1-pro"], "format": "torch"},
    "rope": {"flags": [*ROPE], "format": "torch"},
}
FROM_CHECKPOINT = {
    "another train length": ("paper", "--fope-train-length 32", "--fope-train-length is 32", "64"),
    "another sequence length": ("paper", "--seq-length 128 --max-position-embeddings 128", "--fope-train-length is 128", "64"),
    "another head dimension": ("paper", "--kv-channels 32", "--kv-channels is 32", "16"),
    "another number of KV heads": ("paper", "--group-query-attention --num-query-groups 2", "--num-query-groups is 2", "4"),
    "fewer frequencies": ("paper", "--fope-num-inv-freq 2", "--fope-num-inv-freq is 2", "None"),
    "shared heads": ("paper", "--no-fope-separate-heads", "--fope-separate-heads is False", "True"),
    "another padding": ("paper", "--fope-padding 0,1", "--fope-padding is '0,1'", "'1,1'"),
    "another base": ("paper", "--rotary-base 20000", "--rotary-base is 20000.0", "10000.0"),
    "another profile": ("intern", "", "--fope-profile is 'paper'", "'intern-s1-pro'"),
    "another profile the other way round": (
        "paper",
        "--fope-profile intern-s1-pro",
        "--fope-profile is 'intern-s1-pro'",
        "'paper'",
    ),
    "torch_dist": ("distributed", "--fope-padding 0,1", "--fope-padding is '0,1'", "'1,1'"),
    "rope checkpoint": ("rope", "", "--position-embedding-type is 'fope'", "'rope'"),
}  # fmt: skip
INTO_OTHER_TYPES = {
    "fope checkpoint into rope": ("paper", ROPE, "--position-embedding-type is 'rope'", "'fope'"),
    "torch_dist into rope": ("distributed", ROPE, "--position-embedding-type is 'rope'", "'fope'"),
    "fope checkpoint into Megatron's default": (
        "paper",
        (),
        "--position-embedding-type is 'learned_absolute'",
        "'fope'",
    ),
}
WITH_CHECKPOINT_ARGUMENTS = {
    "rope checkpoint": ("rope", FOPE, "", "--position-embedding-type is 'fope'", "'rope'"),
    "fope checkpoint": ("paper", ROPE, "", "--position-embedding-type is 'rope'", "'fope'"),
    "another padding": ("paper", FOPE, "--fope-padding 0,1", "--fope-padding is '0,1'", "'1,1'"),
    "another train length": ("distributed", (), "--fope-train-length 32", "--fope-train-length is 32", "64"),
    "another number of frequencies": ("intern", (), "--fope-square --fope-no-clip", "", ""),
}
