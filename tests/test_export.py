"""The export to Hugging Face: transformers computes what Megatron does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from example_scripts import load
from forks import Launcher
from launch import ROOT
from synthetic import SyntheticCheckpoint
from trainer import FOPE, TP2, Trainer

from megatron_fope import FoPEConfig, UserError

SCRIPT = ROOT / "examples" / "pretrain" / "export.py"
LLAMA = ("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--init-method-std", "0.2")
UNTIED = "--untie-embeddings-and-output-weights"
MODELS = {
    "rope": (UNTIED, "--position-embedding-type", "rope"),
    "paper": (UNTIED, *FOPE, "--fope-gain", "0.6"),
    "intern-s1-pro": (*FOPE, "--fope-profile", "intern-s1-pro", "--fope-attention-scaling", "1.2"),
    "two tensor-parallel ranks": (UNTIED, *FOPE, *TP2),
    "two stages, learnable": (
        *(UNTIED, *FOPE, "--fope-learnable", "--pipeline-model-parallel-size", "2"),
        "--use-distributed-optimizer",
    ),
}
TWO_RANKS = [name for name in MODELS if name.startswith("two")]
COMPLETE = {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 128, "layernorm_epsilon": 1e-5}
"""What a synthetic checkpoint lacks of a Llama's arguments."""
REFERENCE = """
import sys
sys.argv = ["megatron-fope", "--load", {folder!r}, "--no-load-optim", "--no-load-rng"]
sys.argv += ["--micro-batch-size", "1", "--tensor-model-parallel-size", "1", "--transformer-impl", "local"]
sys.argv += ["--make-vocab-size-divisible-by", "512"]
import torch
from megatron_fope.launch import prepare
prepare(cpu=True)
from megatron_fope.evaluation.model import load_model
(model,) = load_model({folder!r})
tokens = torch.load({tokens!r})
positions = torch.arange(tokens.size(1)).expand_as(tokens).contiguous()
with torch.no_grad():
    torch.save(model(tokens, positions, None), {logits!r})
raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The example as a module."""
    pytest.importorskip("safetensors", reason="the export needs safetensors (comes with transformers)")
    return load("pretrain/export.py")


def llama(folder: Path, **changes: Any) -> SyntheticCheckpoint:
    """A checkpoint without data whose arguments are Llama's but for the changes."""
    shape = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    return SyntheticCheckpoint(folder, **(shape | changes))


@pytest.mark.launch
@pytest.mark.parametrize("name", MODELS)
def test_same_logits(
    name: str, script: ModuleType, trainer: Trainer, launcher: Launcher, tmp_path: Path
) -> None:
    """Also beyond the trained length, and with a cache."""
    transformers = pytest.importorskip("transformers")
    stop = ("--train-iters", "2")
    folder = trainer.run(
        f"export-{name}", *LLAMA, *MODELS[name], *stop, nproc=2 if name in TWO_RANKS else 1
    ).folder
    tokens = torch.randint(0, 257, (2, 160), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    files = {
        "folder": str(folder),
        "tokens": str(tmp_path / "tokens.pt"),
        "logits": str(tmp_path / "logits.pt"),
    }
    launcher.output(1, [], tmp_path / "log", hook=REFERENCE.format(**files))
    expected = torch.load(tmp_path / "logits.pt")

    out = script.export(folder, tmp_path / "hf")
    assert (out / "modeling_fope_llama.py").exists() == (name != "rope")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(out, dtype=torch.float32, trust_remote_code=name != "rope", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found = model(tokens).logits
        # One piece of the sequence after another.
        first = model(tokens[:, :100], use_cache=True)
        rest = model(tokens[:, 100:], past_key_values=first.past_key_values).logits
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), expected, rtol=0, atol=tolerance)
    texts = [
        model.generate(tokens[:1], max_new_tokens=5, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist() and texts[0].size(1) == 165
    if name == "rope":
        return
    coefficient = model.model.layers[0].self_attn.sin_coef
    kept = coefficient.clone()
    with torch.no_grad():
        coefficient.mul_(0.9)
        moved = (model(tokens).logits - expected).abs().max().item()
        coefficient.copy_(kept)
    assert moved > 30 * tolerance, "the tolerance would hide other coefficients"
    rounded = load(out, dtype=torch.bfloat16, trust_remote_code=True)
    for other in (rounded, model.to(torch.bfloat16)):
        assert torch.equal(other.model.layers[0].self_attn.sin_coef, kept)
        assert other.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm; allowed for Llama: RMSNorm"),
        ({"add_bias_linear": True}, "--add-bias-linear True; allowed for Llama: False"),
        ({"swiglu": False}, "--swiglu False; allowed for Llama: True"),
        ({"num_experts": 8}, "--num-experts 8; allowed: without"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1; allowed: without"),
        ({"qk_layernorm": True}, "--qk-layernorm True; allowed: without"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5; allowed: 1.0"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one; allowed: vanilla"),
        (
            COMPLETE
            | {"fope": FoPEConfig.from_profile(train_length=64, anneal_iters=9), "fope_anneal_start": 0},
            "its start from RoPE is still being annealed; finish it first",
        ),
        ({"position_embedding_type": "learned_absolute"}, "is learned_absolute; allowed: rope, fope"),
    ],
)
def test_what_llama_lacks(changes: dict[str, Any], message: str, script: ModuleType, tmp_path: Path) -> None:
    source = llama(tmp_path / "checkpoint", **changes)
    with pytest.raises(UserError) as refused:
        script.export(source.folder, tmp_path / "hf")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_folders(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT that exists stays, no checkpoint is refused, nothing is left of an export that ends early."""
    source = llama(
        tmp_path / "checkpoint",
        **COMPLETE,
    )
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="which exists; allowed: a new folder"):
        script.export(source.folder, tmp_path / "here")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "here"), str(tmp_path / "hf")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "export.py: error: CHECKPOINT is" in done.stderr

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.export(source.folder, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "here"}


def test_other_tensors_than_a_llama(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that cannot be read, tensors that are missing, and tensors that are left."""
    source = llama(tmp_path / "checkpoint", **COMPLETE)
    with pytest.raises(UserError, match=r"\.distcp: embedding\.word_embeddings\.weight cannot be read \("):
        script.export(source.folder, tmp_path / "hf")  # holes

    monkeypatch.setattr(
        script.Checkpoint, "read_tensor", lambda self, name: torch.zeros(*self.tensors[name].size)
    )
    with pytest.raises(UserError, match=r"it has no decoder\.final_layernorm\.weight, which Llama needs"):
        script.export(source.folder, tmp_path / "hf")

    there = script.Checkpoint.tensors.fget
    norms = {
        "decoder.final_layernorm.weight": (64,),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (4, 64),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 64),
        "decoder.layers.mlp.linear_fc1.bias": (4, 512),
        "output_layer.weight": (128, 64),
    }
    added = {name: SimpleNamespace(size=size) for name, size in norms.items()}
    monkeypatch.setattr(script.Checkpoint, "tensors", property(lambda self: there(self) | added))
    with pytest.raises(UserError, match=r"Llama has no place for decoder\.layers\.mlp\.linear_fc1\.bias$"):
        script.export(source.folder, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_without_safetensors(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="install it with: pip install safetensors"):
        script.export(tmp_path, tmp_path / "hf")
