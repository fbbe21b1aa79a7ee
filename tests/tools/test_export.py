"""The export to Hugging Face: transformers computes what Megatron does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from differences import keep
from forks import Launcher
from launch import ROOT
from megatron_logits import megatron_logits
from synthetic import SyntheticCheckpoint
from trainer import FOPE, TP2, Trainer

from megatron_fope import FoPEConfig, UserError
from megatron_fope.arguments.flags import fope_config_of_checkpoint
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer, open_checkpoint
from megatron_fope.tools.huggingface import exporting
from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import import_model
from megatron_fope.tools.huggingface.settings import fope_settings

CHECKS = ROOT / "tests" / "scripts" / "export_checks.py"
OLDEST = "5.1.0"
"""The oldest transformers that pyproject.toml allows."""
LLAMA = ("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--init-method-std", "0.2")
UNTIED = "--untie-embeddings-and-output-weights"
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "96"),
    *("--expert-model-parallel-size", "2"),
)
MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rope": (1, (UNTIED, "--position-embedding-type", "rope")),
    "paper": (1, (UNTIED, *FOPE, "--fope-gain", "0.6")),
    "intern-s1-pro": (1, (*FOPE, "--fope-profile", "intern-s1-pro", "--fope-attention-scaling", "1.2")),
    "TP 2": (2, (UNTIED, *FOPE, *TP2)),
    "PP 2, learnable": (
        2,
        (
            *(UNTIED, *FOPE, "--fope-learnable", "--pipeline-model-parallel-size", "2"),
            "--use-distributed-optimizer",
        ),
    ),
    "qwen2, shared basis": (1, (*FOPE, "--add-qkv-bias", "--no-fope-separate-basis", "--fope-normalize")),
    "qwen3, shared heads": (1, (*FOPE, "--qk-layernorm", "--no-fope-separate-heads")),
    "mixtral, EP 2": (2, (*FOPE, *EXPERTS, UNTIED)),
    "qwen3_moe, EP 2": (2, (*FOPE, *EXPERTS, "--qk-layernorm", "--moe-router-pre-softmax")),
}
"""Ranks and flags of what is trained and exported."""
ROWS = {
    "rope": ("Llama, RoPE", "1"),
    "paper": ("Llama, paper", "1"),
    "intern-s1-pro": ("Llama tied, intern-s1-pro", "1"),
    "TP 2": ("Llama, paper", "TP 2"),
    "PP 2, learnable": ("Llama, learnable", "PP 2"),
    "qwen2, shared basis": ("Qwen2, one basis", "1"),
    "qwen3, shared heads": ("Qwen3, one head", "1"),
    "mixtral, EP 2": ("Mixtral, paper", "EP 2"),
    "qwen3_moe, EP 2": ("Qwen3-MoE, paper", "EP 2"),
}
"""What they are called in the table of ``tests/agreement.py``."""
COMPLETE = {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 256, "layernorm_epsilon": 1e-5}
"""What a synthetic checkpoint lacks of a Llama's arguments."""


def llama(folder: Path, **changes: Any) -> SyntheticCheckpoint:
    """A checkpoint without data whose arguments are Llama's but for the changes."""
    shape = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    return SyntheticCheckpoint(folder, **(shape | changes))


@pytest.fixture(scope="module")
def cases(trainer: Trainer, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model trained, computed by Megatron and exported; the file that ``export_checks.py`` reads."""
    made, listed = tmp_path_factory.mktemp("exports"), {}
    folders = {
        name: trainer.run(f"export-{name}", *LLAMA, *flags, "--train-iters", "2", nproc=ranks).folder
        for name, (ranks, flags) in MODELS.items()
    }
    tokens = torch.randint(0, 257, (2, 160), generator=torch.Generator().manual_seed(1))
    padding = ("--make-vocab-size-divisible-by", "512")
    computed = megatron_logits(launcher, list(folders.values()), tokens, made, *padding)
    for (name, folder), logits in zip(folders.items(), computed, strict=True):
        files = {"tokens": str(made / "tokens.pt"), "logits": str(made / f"{name}.pt")}
        torch.save(logits, files["logits"])
        out = export(folder, made / name, shard_size="200KB").folder
        kind = "rope" if name == "rope" else "fope"
        assert (out / "modeling_fope.py").exists() == (kind != "rope")
        listed[name] = {"folder": str(out), "checkpoint": str(folder), "kind": kind, **files}
    (made / "cases.json").write_text(json.dumps(listed))
    return made / "cases.json"


@pytest.fixture(scope="module", params=["installed", OLDEST])
def results(request: pytest.FixtureRequest, cases: Path) -> dict[str, str | None]:
    """Every check of every model with one release of transformers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cases.with_name("modules"))}
    if request.param == OLDEST:
        folder = Path(sys.prefix) / "transformers" / OLDEST
        assert (folder / "transformers").is_dir(), f"transformers {OLDEST} is not in {folder}; use make setup"
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, str(CHECKS), str(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    installed = importlib.metadata.version("transformers")
    assert answer["transformers"] == (OLDEST if request.param == OLDEST else installed)
    for name, difference in answer["differences"].items():
        family, ranks = ROWS[name]
        keep(family, "out", ranks, answer["transformers"], difference)
    return answer["results"]


@pytest.mark.launch
@pytest.mark.parametrize("check", re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE))
def test_exported(check: str, results: dict[str, str | None]) -> None:
    """transformers computes what Megatron does."""
    outcomes = {name: result for name, result in results.items() if name.startswith(f"{check}[")}
    assert len(outcomes) == len(MODELS) - check.startswith("check_fope_")
    failed = {name: result for name, result in outcomes.items() if result is not None}
    assert not failed, "\n".join(f"{name}\n{result}" for name, result in failed.items())


def test_oldest_transformers_is_the_one_that_the_project_allows() -> None:
    (allowed,) = re.findall(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert f"{allowed}.0" == OLDEST
    assert f'"transformers=={OLDEST}"' in (ROOT / ".ci" / "setup-env").read_text()


@pytest.mark.launch
def test_imported_again(cases: Path, tmp_path: Path) -> None:
    """Settings, train length and every bit of the weights, coefficients among them."""
    for name, case in json.loads(cases.read_text()).items():
        made = import_model(case["folder"], tmp_path / name)
        old, new = (open_checkpoint(folder, name="X") for folder in (case["checkpoint"], made.folder))
        if name != "rope":
            before, after = (fope_config_of_checkpoint(one.args, one.args) for one in (old, new))
            assert before == after and new.train_length == old.train_length
        shared = [key for key in old.tensors if not is_optimizer(key)]
        assert set(shared) <= set(new.tensors)
        for key in shared:
            expected, found = old.read_tensor(key), new.read_tensor(key)
            rows = (
                made.vocab_size
                if key in ("embedding.word_embeddings.weight", "output_layer.weight")
                else None
            )
            assert torch.equal(found[:rows], expected[:rows]), (name, key)


def test_a_finished_start_leaves_no_trace(tmp_path: Path) -> None:
    """An imported model would otherwise be at the beginning of it."""
    came = {"anneal_iters": 4, "anneal_order": "slowest-first", "anneal_clip": "0:3", "fold_padding": True}
    plain = FoPEConfig.from_profile(train_length=64)
    fope = FoPEConfig.from_profile(train_length=64, **came)
    source = llama(tmp_path / "checkpoint", **COMPLETE, fope=fope, fope_anneal_start=0)
    assert fope_settings(open_checkpoint(source.folder, name="X"), "X") == plain


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm; requires RMSNorm"),
        ({"add_bias_linear": True}, "--add-bias-linear True; requires False"),
        ({"swiglu": False}, "--swiglu False; requires True"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1; use a model without"),
        ({"window_size": (64, 0)}, "--window-size (64, 0); use a model without"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5; requires 1.0"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one; requires vanilla"),
        ({"num_experts": 8, "moe_layer_freq": [0, 1]}, "--moe-layer-freq [0, 1]; requires 1"),
        ({"num_experts": 8, "add_qkv_bias": True}, "has --add-qkv-bias and --num-experts together"),
        ({"num_experts": 8, "moe_router_pre_softmax": True}, "it was trained with --moe-router-pre-softmax"),
        ({"num_experts": 8, "moe_router_score_function": "sigmoid"}, "sigmoid; requires softmax"),
        (
            COMPLETE
            | {"fope": FoPEConfig.from_profile(train_length=64, anneal_iters=9), "fope_anneal_start": 0},
            "its start from RoPE is still being annealed; finish it first",
        ),
        ({"position_embedding_type": "learned_absolute"}, "is learned_absolute; allowed: rope, fope"),
    ],
)
def test_what_no_family_has(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = llama(tmp_path / "checkpoint", **changes)
    with pytest.raises(UserError) as refused:
        export(source.folder, tmp_path / "hf")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT that exists stays, no checkpoint is refused, nothing is left of an export that ends early."""
    source = llama(
        tmp_path / "checkpoint",
        **COMPLETE,
    )
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="which exists; use a new folder"):
        export(source.folder, tmp_path / "here")
    with pytest.raises(UserError, match="CHECKPOINT is"):
        export(tmp_path / "here", tmp_path / "hf")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_tensors", lambda *_: [])
    monkeypatch.setattr(exporting, "_write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source.folder, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "here"}


def test_other_tensors_than_a_family_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that cannot be read, tensors that are missing, and tensors that are left."""
    source = llama(tmp_path / "checkpoint", **COMPLETE)
    there = Checkpoint.tensors.fget
    added: dict[str, Any] = {}

    def refused() -> str:
        with pytest.raises(UserError) as error:
            export(source.folder, tmp_path / "hf")
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
        return str(error.value)

    def add(name: str, *size: int) -> None:
        added[name] = SimpleNamespace(size=size, properties=SimpleNamespace(dtype=torch.bfloat16))

    monkeypatch.setattr(Checkpoint, "tensors", property(lambda self: there(self) | added))
    assert "it has no decoder.layers.0.self_attention.linear_qkv.layer_norm_weight, which" in refused()
    add("decoder.layers.self_attention.linear_qkv.layer_norm_weight", 4, 64)
    add("decoder.layers.mlp.linear_fc1.layer_norm_weight", 4, 32)
    assert "mlp.linear_fc1.layer_norm_weight has the size [4, 32], which does not fit" in refused()
    add("decoder.layers.mlp.linear_fc1.layer_norm_weight", 4, 64)
    assert "it has no decoder.final_layernorm.weight, which LlamaForCausalLM needs" in refused()
    add("decoder.final_layernorm.weight", 64)
    add("output_layer.weight", 128, 64)
    assert "embedding.word_embeddings.weight cannot be read (" in refused()  # holes
    add("decoder.layers.mlp.linear_fc1.bias", 4, 512)
    assert "LlamaForCausalLM has no place for decoder.layers.mlp.linear_fc1.bias" in refused()


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="export needs safetensors; install it with"):
        export(tmp_path, tmp_path / "hf")
