"""Model families, each trained with FoPE in Megatron's real loop: tensor parallelism against one rank."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from forks import Launcher
from launch import LATENT, TINY_MODEL, losses

pytestmark = pytest.mark.launch

ITERS = 4
TWO_RANKS = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none --disable-bias-linear"


@dataclass(frozen=True)
class Family:
    """A kind of model: its flags, those of the second rank, and the layers that must have FoPE."""

    flags: str
    layers: str
    """As in the log at start, see ``megatron_fope.layers.report.layer_list``."""
    more_losses: tuple[str, ...] = ()
    """What is logged besides ``lm loss``."""
    second_rank: str = ""
    common_start: bool = False
    """Initial weights depend on the number of ranks, so both runs start from one rank's checkpoint."""
    files: dict[str, object] = field(default_factory=dict)


def _block(attention: int, ffn: int) -> dict:
    """One layer of Megatron's file for heterogeneous models; 0: the part is left out."""
    kept, left_out = ({"no_op": no_op, "replace_with_linear": False} for no_op in (False, True))
    return {
        "attention": {"n_heads_in_group": 2, **kept} if attention else {"n_heads_in_group": None, **left_out},
        "ffn": {"ffn_mult": 2.0, **kept} if ffn else {"ffn_mult": None, **left_out},
    }


FAMILIES = {
    "attention variants": Family(
        "--qk-layernorm --attention-output-gate --window-size 16,0 --window-attn-skip-freq 2 "
        "--no-rope-freq 4",
        "4 attention layers: decoder 1-4; not rotated (--no-rope-freq): decoder 4",
    ),
    "experts and multi-token prediction": Family(
        f"{EXPERTS} --mtp-num-layers 2",
        "6 attention layers: decoder 1-4, mtp 1-2",
        more_losses=("mtp_1 loss", "mtp_2 loss"),
        second_rank="--expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
        common_start=True,
    ),
    "heterogeneous layers": Family(
        "--heterogeneous-layers-config-path layers.json --swiglu --normalization RMSNorm --use-rope-scaling "
        "--use-rotary-position-embeddings --untie-embeddings-and-output-weights",
        "2 attention layers: decoder 1, 3",
        files={
            "layers.json": {
                "block_configs": [_block(a, f) for a, f in ((1, 1), (0, 1), (1, 0), (0, 1))],
                "hidden_act": "silu",
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "rope_theta": 10000,
                "rope_scaling": {"factor": 8.0},
                "tie_word_embeddings": False,
            }
        },
    ),
    "multi-latent attention": Family(
        " ".join(LATENT),
        "4 attention layers: decoder 1-4",
    ),
    "hybrid": Family(
        "--hybrid-layer-pattern *-*-/*- --mtp-num-layers 1 --qk-layernorm",
        "3 attention layers: decoder 1, 3, mtp 1",
        more_losses=("mtp_1 loss",),
    ),
}


def train(launcher: Launcher, folder: Path, nproc: int, flags: str) -> str:
    """The log of a run in the real loop."""
    flags = flags.replace("layers.json", str(folder / "layers.json"))
    model = list(TINY_MODEL)
    if "--multi-latent-attention" in flags:
        model.remove("--group-query-attention")
    command = ["--cpu", "pretrain", *model, "--position-embedding-type", "fope", "--train-iters", str(ITERS)]
    return launcher.output(nproc, [*command, *flags.split()], folder / "log")


def logged(log: str, name: str) -> list[float]:
    return [float(x) for x in re.findall(rf"\| {name}: ([-+.\dEe]+)", log)]


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_alike_on_one_rank_and_on_two(name: str, launcher: Launcher, tmp_path: Path) -> None:
    family = FAMILIES[name]
    for file, content in family.files.items():
        (tmp_path / file).write_text(json.dumps(content))
    flags = family.flags
    if family.common_start:
        train(launcher, tmp_path, 1, f"{flags} --train-iters 2 --save-interval 2 --save {tmp_path}")
        flags += f" --load {tmp_path} --finetune --no-load-optim --no-load-rng"
    one = train(launcher, tmp_path, 1, flags)
    two = train(launcher, tmp_path, 2, f"{flags} {TWO_RANKS} {family.second_rank}")

    for log in (one, two):
        assert f"> FoPE: {family.layers}\n" in log
    assert len(losses(one)) == ITERS
    assert losses(one)[-1] < losses(one)[0] - 0.1, "does not learn"
    for quantity in ("lm loss", *family.more_losses):
        assert len(logged(one, quantity)) == ITERS
        assert logged(two, quantity) == pytest.approx(logged(one, quantity), abs=1e-5)
    assert logged(two, "grad norm") == pytest.approx(logged(one, "grad norm"), rel=1e-3)
