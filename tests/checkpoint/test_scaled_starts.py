"""A function-preserving start from an unscaled checkpoint at a longer context: it begins at the scaled model.

"That model" is what Megatron computes when it continues the same checkpoint with its own flags and, where
the export has a family, what transformers computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Launcher
from launch import LATENT
from megatron_logits import megatron_logits
from trainer import FOPE, SHARP, Run, Trainer

from megatron_fope.tools.conversion.converter import convert
from megatron_fope.tools.huggingface.exporting import export

pytestmark = pytest.mark.launch

PRESERVING = ("--fope-start-from-rope", "function-preserving", "--fope-anneal-iters", "1000000")
LONGER = ("--seq-length", "256", "--max-position-embeddings", "256")
LLAMA = ("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", *SHARP)
OF_2048 = (
    *("--num-layers", "1", "--seq-length", "2048", "--max-position-embeddings", "2048"),
    *("--micro-batch-size", "1", "--global-batch-size", "1"),
)
TEMPERATURE = "1.1386294361119891"
YARN = ("--rotary-scaling-factor", "4", "--yarn-original-max-position-embeddings", "64")
OUR_YARN = (
    *("--fope-scaling", "yarn", "--fope-scaling-factor", "4", "--fope-original-length", "64"),
    *("--fope-attention-scaling", TEMPERATURE),
)
FAMILIES: dict[str, tuple[str, ...]] = {
    "GQA": LLAMA,
    "qk-norm": (*LLAMA, "--qk-layernorm"),
    "MLA": (*SHARP, *LATENT, "--rotary-scaling-factor", "4"),
    "one layer": (*SHARP, *OF_2048),
}
CASES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "YaRN, GQA": ("GQA", "yarn", (*LONGER, *YARN), (*LONGER, *OUR_YARN)),
    "YaRN, qk-norm": ("qk-norm", "yarn", (*LONGER, *YARN), (*LONGER, *OUR_YARN)),
    "YaRN, MLA": (
        "MLA",
        "rope",
        (*LONGER, "--rope-type", "yarn"),
        (*LONGER, *OUR_YARN, "--fope-original-length", "4096"),
    ),
    "interpolated": (
        "GQA",
        "rope",
        (*LONGER, "--rotary-seq-len-interpolation-factor", "4"),
        (*LONGER, "--fope-scaling", "pi", "--fope-original-length", "64"),
    ),
    "llama3": (
        "one layer",
        "rope",
        ("--use-rope-scaling",),
        ("--fope-scaling", "llama3", "--fope-scaling-factor", "8", "--fope-original-length", "8192"),
    ),
}
"""Family, position embedding type and flags of the scaled model in Megatron, flags of FoPE."""


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> dict[str, Run]:
    """An unscaled RoPE model of each family."""
    return {
        name: _of(trainer, name).run(f"scaled {name}", "--position-embedding-type", "rope", *flags)
        for name, flags in FAMILIES.items()
    }


def _of(trainer: Trainer, family: str) -> Trainer:
    return trainer.without("--group-query-attention") if family == "MLA" else trainer


@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_the_scaled_models(name: str, trainer: Trainer, trained: dict[str, Run]) -> None:
    family, kind, flags, ours = CASES[name]
    one = ("--train-iters", "1", "--finetune", "--load", str(trained[family].folder), *FAMILIES[family])

    def first(label: str, *words: str) -> float:
        run = _of(trainer, family).run(f"{name}, {label}", *one, "--position-embedding-type", *words)
        if label == "ours":
            scaling = ours[ours.index("--fope-scaling") + 1]
            assert run.says(f"preserves the function of the checkpoint scaled by {scaling} (")
        return run.curve()[1]

    expected = first("Megatron's", kind, *flags)
    assert first("ours", *FOPE[1:], *PRESERVING, *ours) == pytest.approx(expected, abs=2e-6)
    plain = flags[: len(LONGER)] if flags[: len(LONGER)] == LONGER else ()
    assert abs(first("unscaled", "rope", *plain) - expected) > 1e-4, "the scaling makes a difference"


TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": (
        {"scaling": "yarn", "scaling_factor": 4.0, "original_length": 64,
         "attention_scaling": float(TEMPERATURE)},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "linear": ({"scaling": "pi", "original_length": 64}, {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        {"scaling": "llama3", "scaling_factor": 4.0, "original_length": 64},
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
}  # fmt: skip
"""FoPE's settings, and what transformers calls the same."""


@pytest.mark.parametrize("family", ["GQA", "qk-norm"])
def test_transformers_computes_the_same(
    family: str, trained: dict[str, Run], launcher: Launcher, tmp_path: Path
) -> None:
    """Logits and loss at four times the trained length, from a checkpoint that is converted, not started."""
    from transformers import AutoModelForCausalLM

    folder = trained[family].folder
    out = export(folder, tmp_path / "hf").folder
    tokens = torch.randint(0, 257, (2, 256), generator=torch.Generator().manual_seed(1))
    started = [
        convert(
            folder, tmp_path / name, start="function-preserving", anneal_iters=9, train_length=256, **settings
        ).target
        for name, (settings, _) in TRANSFORMERS.items()
    ]
    computed = megatron_logits(launcher, started, tokens, tmp_path)
    for (name, (_, rope)), ours in zip(TRANSFORMERS.items(), computed, strict=True):
        scaled = {"rope_parameters": {"rope_theta": 10000.0, **rope}}
        model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", **scaled)
        with torch.no_grad():
            logits = model(tokens).logits
        ours = ours[..., : logits.size(-1)]
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()), msg=name)
        mine, theirs = (
            torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            for x in (ours, logits)
        )
        assert abs(float(mine - theirs)) <= 1e-5, name
