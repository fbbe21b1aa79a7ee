"""Starts from RoPE are from the RoPE that this Megatron computes, whatever the flags say."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch
from trainer import FOPE, SHARP, Run, Trainer

from megatron_fope import FoPEConfig
from megatron_fope.arguments.rope import Scalable, check_same_rope, rope_of
from megatron_fope.common.errors import UserError

LONG = ("--fope-train-length", "1000000")
"""Clips nothing: there the start clip-only is RoPE."""

YARN = ("--rotary-scaling-factor", "4", "--yarn-original-max-position-embeddings", "16")
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "llama3, a factor that Megatron drops": (
        "rope",
        ("--use-rope-scaling", "--rope-scaling-factor", "32", "--seq-length", "2048", "--num-layers", "1",
         "--max-position-embeddings", "2048", "--micro-batch-size", "1", "--global-batch-size", "1"),
        ("--use-rope-scaling", "--rope-scaling-factor", "32", "--seq-length", "2048", "--num-layers", "1",
         "--max-position-embeddings", "2048", "--micro-batch-size", "1", "--global-batch-size", "1"),
    ),
    "interpolated": (
        "rope",
        ("--rotary-seq-len-interpolation-factor", "4"),
        ("--rotary-seq-len-interpolation-factor", "4"),
    ),
    "interpolated, FoPE's flags": (
        "rope",
        ("--rotary-seq-len-interpolation-factor", "4"),
        ("--fope-scaling", "linear", "--fope-scaling-factor", "4"),
    ),
    "interleaved": ("rope", ("--rotary-interleaved",), ("--rotary-interleaved",)),
    "YaRN": (
        "yarn",
        YARN,
        ("--fope-scaling", "yarn", "--fope-scaling-factor", "4", "--fope-original-length", "16",
         "--fope-attention-scaling", "1.1386294361119891"),
    ),
}  # fmt: skip
"""Position embedding type, flags of the RoPE model, flags of FoPE."""


@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_the_rope_models(name: str, trainer: Trainer) -> None:
    kind, before, flags = CASES[name]
    rope = trainer.run(f"{name}, rope", "--position-embedding-type", kind, *SHARP, *before)
    expected = rope.curve()[3]

    def start(way: str, *more: str) -> Run:
        return trainer.run(
            f"{name}, {way}", *FOPE, *SHARP, "--fope-start-from-rope", way, *flags, *more,
            "--load", str(rope.folder), "--ckpt-step", "2", save=False,
        )  # fmt: skip

    preserved = start("function-preserving", "--fope-anneal-iters", "1000000")
    assert preserved.curve()[3] == pytest.approx(expected, abs=2e-6)
    assert start("clip-only", *LONG).curve()[3] == pytest.approx(expected, abs=2e-6)
    identity = ("--fope-init", "eye", "--no-fope-clip", "--no-fope-drop-clipped")
    assert start("immediate", *identity).curve()[3] == pytest.approx(expected, abs=2e-6)


def batched(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def arguments(**changes: Any) -> argparse.Namespace:
    values = {
        "position_embedding_type": "rope",
        "kv_channels": 16,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "yarn_original_max_position_embeddings": None,
        "yarn_beta_fast": None,
        "yarn_beta_slow": None,
        "yarn_correction_range_round_to_int": None,
    }
    return argparse.Namespace(**values | changes)


LATENT = {"multi_latent_attention": True, "qk_pos_emb_head_dim": 16}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama3": (
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        "use --fope-scaling llama3 --fope-scaling-factor 8.0 --fope-original-length 8192",
    ),
    "interpolated": (
        {"rotary_seq_len_interpolation_factor": 4},
        "use --fope-scaling linear --fope-scaling-factor 4.0",
    ),
    "YaRN": (
        {
            "position_embedding_type": "yarn",
            "rotary_scaling_factor": 4.0,
            "yarn_original_max_position_embeddings": 16,
        },
        "use --fope-scaling yarn --fope-scaling-factor 4.0 --fope-original-length 16",
    ),
    "YaRN of latent attention": (
        {**LATENT, "rope_type": None, "rotary_scaling_factor": 40.0},
        "use --fope-scaling yarn --fope-scaling-factor 40.0 --fope-original-length 4096",
    ),
    "a part of the head": ({"rotary_percent": 0.5}, "FoPE rotates the whole head"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("may_scale", ["never", "unscaled", "any"])
def test_other_frequencies(name: str, may_scale: Scalable) -> None:
    """The line says what to do, and with that the start is accepted."""
    changes, advice = REFUSED[name]
    stored = arguments(**changes)
    args = arguments(position_embedding_type="fope", **(LATENT if "latent" in name else {}))
    config = FoPEConfig.from_profile(train_length=64)
    with pytest.raises(UserError) as error:
        check_same_rope(args, stored, config, "there", may_scale=may_scale)
    message = str(error.value)
    assert advice in message and "\n" not in message
    if "use --fope" in message:
        words = message.partition("use ")[2].split()
        given = {flag.removeprefix("--fope-").replace("-", "_"): value for flag, value in batched(words)}
        kinds = {field.name: field.type for field in dataclasses.fields(config)}
        read = {"int": int, "float": float, "str": str}
        right = {name: read[kinds[name]](value) for name, value in given.items()}
        right = dataclasses.replace(config, **right)
        assert check_same_rope(args, stored, right, "there")


def test_a_scaling_that_is_asked_for() -> None:
    """A start at once may change any frequencies, one that preserves a function those of an unscaled model,
    the clip alone none."""
    args, stored = arguments(position_embedding_type="fope"), arguments()
    longer = FoPEConfig.from_profile(train_length=64, scaling="linear", scaling_factor=2.0)
    scaled = arguments(rotary_seq_len_interpolation_factor=4)
    assert not check_same_rope(args, stored, longer, "there", may_scale="any")
    assert not check_same_rope(args, stored, longer, "there", may_scale="unscaled")
    assert not check_same_rope(args, scaled, longer, "there", may_scale="any")
    with pytest.raises(UserError, match="use --fope-scaling none"):
        check_same_rope(args, stored, longer, "there")
    with pytest.raises(UserError, match=r"use --fope-scaling linear --fope-scaling-factor 4\.0"):
        check_same_rope(args, scaled, longer, "there", may_scale="unscaled")


def test_hybrid_models() -> None:
    """Their RoPE has no scaling, and interleaved it is no rotation."""
    plain = rope_of(arguments(hybrid_layer_pattern="*-"))
    scaled = rope_of(arguments(hybrid_layer_pattern="*-", use_rope_scaling=True))
    assert torch.equal(plain.angles, scaled.angles)
    assert not torch.equal(plain.angles, rope_of(arguments(use_rope_scaling=True)).angles)
    with pytest.raises(UserError, match="hybrid models"):
        rope_of(arguments(hybrid_layer_pattern="*-", rotary_interleaved=True))
