"""How a run starts from a checkpoint: decided by both arguments, without loading anything."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_fope.checkpoint.start import FromRope, Grow, Resume, Start, decide
from megatron_fope.common.errors import UserError

ROPE: dict[str, Any] = {"position_embedding_type": "rope"}
SHORT = {"fope_train_length": 32}
START, GROW = {"fope_start_from_rope": "immediate"}, {"fope_grow": True}


def arguments(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "position_embedding_type": "fope",
        "seq_length": 64,
        "rotary_base": 10000,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "num_layers": 2,
        "finetune": False,
        "no_load_optim": False,
    }
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize(
    ("run", "stored", "kind"),
    [
        ({}, {}, Resume),
        (START | GROW, {}, Resume),
        (START, ROPE, FromRope),
        (START | GROW, ROPE, FromRope),
        (GROW, SHORT, Grow),
        (START | GROW, SHORT, Grow),
        (GROW | {"fope_gain": 0.4}, {}, Resume),
        ({}, SHORT, Resume),
        (ROPE, ROPE, None),
    ],
)
def test_kinds(run: dict[str, Any], stored: dict[str, Any], kind: type[Start] | None) -> None:
    start = decide(arguments(**run), arguments(**stored), "here")
    assert (None if start is None else type(start)) is kind


@pytest.mark.parametrize(("run", "stored"), [({}, ROPE), (GROW, ROPE), (ROPE, {}), (ROPE | START, {})])
def test_another_position_embedding(run: dict[str, Any], stored: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--position-embedding-type is .* but the checkpoint in here was"):
        decide(arguments(**run), arguments(**stored), "here")


@pytest.mark.parametrize(
    ("run", "stored", "message"),
    [
        ({}, SHORT, "--fope-train-length is 64, but the checkpoint in here was trained with 32; --fope-grow"),
        ({"fope_gain": 0.4, "fope_pad_value": "0,1"}, {}, "--fope-pad-value is '0,1'"),
        ({"fope_learnable": True}, {}, "--fope-learnable is True"),
        ({"kv_channels": 32}, {}, "--kv-channels is 32, but the checkpoint in here was trained with 16"),
        ({"num_attention_heads": 8}, {}, "--num-attention-heads is 8"),
        (GROW | {"rotary_base": 500}, SHORT, "--fope-change-rotary-base accepts the change"),
        (GROW | {"fope_learnable": True}, SHORT, "; use --finetune to accept that"),
        (
            GROW,
            SHORT | {"fope_anneal_iters": 4, "fope_anneal_start": 0},
            "the checkpoint in here holds a model whose start from RoPE is at 2 of 4 iterations; finish it",
        ),
        (START | {"rotary_base": 500}, ROPE, "--fope-change-rotary-base accepts the change"),
    ],
)
def test_refusals(run: dict[str, Any], stored: dict[str, Any], message: str) -> None:
    start = decide(arguments(**run), arguments(**stored), "here", iteration=2)
    assert start is not None
    with pytest.raises(UserError) as error:
        start.check()
    assert message in str(error.value)


def test_accepted() -> None:
    for run, stored in (({}, {}), (GROW, SHORT), ({"fope_learnable": True, "finetune": True}, {})):
        start = decide(arguments(**run), arguments(**stored), "here")
        assert start is not None
        start.check()


@pytest.mark.parametrize(
    ("run", "stored", "said"),
    [
        (START, {}, "--fope-start-from-rope has no effect: here holds coefficients, which are loaded"),
        (GROW, {}, "--fope-grow has no effect: here has train length 64 already"),
        (GROW, SHORT, "the coefficients grow (aligned) from train length 32 to 64"),
    ],
)
def test_notes(run: dict[str, Any], stored: dict[str, Any], said: str) -> None:
    start = decide(arguments(**run), arguments(**stored), "here")
    assert start is not None
    start.begin()
    (note,) = start.notes("here")
    assert note.startswith(said)


YARN = {"fope_scaling": "yarn", "fope_scaling_factor": 4.0, "fope_original_length": 16}
SLOWLY = {"fope_start_from_rope": "function-preserving", "fope_anneal_iters": 9}


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (START, "immediate changes what a trained model computes: with settings like these the loss of Smol"),
        (START | {"kv_channels": 64, "seq_length": 8192}, "from 1.80 to 6.38 in windows of 2048"),
        (START | {"fope_profile": "intern-s1-pro"}, "from 1.87 to 4.75 in windows of 2048"),
        (START | {"fope_square": True, "fope_pad_value": "0,1"}, "from 1.87 to 2.04 in windows of 2048"),
        (START | {"fope_drop_clipped": False}, "from 1.87 to 2.04 in windows of 2048"),
        (START, "--fope-start-from-rope function-preserving does not jump (docs/from-rope.md)"),
        (
            START | YARN,
            "; its frequencies are scaled by yarn (factor 4, from 16 tokens, sin and cos times 1)",
        ),
        (
            START | {"fope_clip": False, "fope_square": True},
            "immediate clips nothing here; only the noise of",
        ),
        ({"fope_start_from_rope": "clip-only"}, "clip-only changes what a trained model computes: with set"),
        (SLOWLY, "the start preserves the function: the first loss is the checkpoint's own"),
        (SLOWLY | YARN, "preserves the function of the checkpoint scaled by yarn (factor 4, from 16 tokens,"),
        (SLOWLY | YARN, "without YaRN's temperature, which would be --fope-attention-scaling 1.138629"),
    ],
)
def test_a_start_says_what_it_does_to_the_function(run: dict[str, Any], said: str) -> None:
    stored = {name: value for name, value in run.items() if not name.startswith("fope_")}
    start = decide(arguments(**run), arguments(**ROPE | stored), "here")
    assert start is not None
    start.check()
    start.begin()
    fresh, effect, *_ = start.notes("here")
    assert fresh.startswith("the coefficients are fresh (seed 123")
    assert said in effect and "\n" not in effect
