"""The export to Hugging Face: transformers computes what Megatron does."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
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
MODELING = SCRIPT.with_name("modeling_fope_llama.py")
CHECKS = ROOT / "tests" / "scripts" / "export_checks.py"
OLDEST = "5.1.0"
"""The oldest transformers that pyproject.toml allows."""
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
COMPLETE = {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 128, "layernorm_epsilon": 1e-5}
"""What a synthetic checkpoint lacks of a Llama's arguments."""
REFERENCE = """
import sys
sys.argv = ["megatron-fope", "--load", {folder!r}, "--no-load-optim", "--no-load-rng"]
sys.argv += ["--micro-batch-size", "1", "--tensor-model-parallel-size", "1", "--transformer-impl", "local"]
sys.argv += ["--make-vocab-size-divisible-by", "512"]
import torch
from megatron_fope.training.launch import prepare
prepare(cpu=True)
from megatron_fope.tools.evaluation.model import load_model
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
    return load("pretrain/export.py")


def llama(folder: Path, **changes: Any) -> SyntheticCheckpoint:
    """A checkpoint without data whose arguments are Llama's but for the changes."""
    shape = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    return SyntheticCheckpoint(folder, **(shape | changes))


@pytest.fixture(scope="module")
def cases(
    script: ModuleType, trainer: Trainer, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every model trained, computed by Megatron and exported; the file that ``export_checks.py`` reads."""
    made, listed = tmp_path_factory.mktemp("exports"), {}
    torch.save(
        torch.randint(0, 257, (2, 160), generator=torch.Generator().manual_seed(1)), made / "tokens.pt"
    )
    for name, flags in MODELS.items():
        ranks = 2 if name.startswith("two") else 1
        folder = trainer.run(f"export-{name}", *LLAMA, *flags, "--train-iters", "2", nproc=ranks).folder
        files = {"tokens": str(made / "tokens.pt"), "logits": str(made / f"{name}.pt")}
        launcher.output(1, [], made / "log", hook=REFERENCE.format(folder=str(folder), **files))
        out = script.export(folder, made / name)
        kind = "rope" if name == "rope" else "learnable" if "--fope-learnable" in flags else "fope"
        assert (out / "modeling_fope_llama.py").exists() == (kind != "rope")
        listed[name] = {"folder": str(out), "kind": kind, **files}
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


def test_vllm_finds_the_attention_function() -> None:
    """vLLM reads ``forward``: a name assigned from ``ALL_ATTENTION_FUNCTIONS``, called exactly once."""
    (attention,) = (
        node for node in ast.parse(MODELING.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "FopeLlamaAttention"
    )  # fmt: skip
    (forward,) = (
        node for node in attention.body if isinstance(node, ast.FunctionDef) and node.name == "forward"
    )
    nodes = list(ast.walk(forward))
    looked_up = [
        node for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    ]  # fmt: skip
    names = {target.id for node in looked_up for target in node.targets}
    called = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (call,) = (node for node in called if node.func.id in names)
    assert ast.unparse(call.args[0]) == "self"
    (scaling,) = (keyword.value for keyword in call.keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling"
    for name in ("q_proj", "k_proj", "v_proj"):  # merged into one projection where each is called once
        (argument,) = (
            ast.unparse(node.args[0]) for node in nodes
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"
        )  # fmt: skip
        assert argument == "hidden_states"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm; Llama requires RMSNorm"),
        ({"add_bias_linear": True}, "--add-bias-linear True; Llama requires False"),
        ({"swiglu": False}, "--swiglu False; Llama requires True"),
        ({"num_experts": 8}, "--num-experts 8; use a model without it"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1; use a model without it"),
        ({"qk_layernorm": True}, "--qk-layernorm True; use a model without it"),
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
    with pytest.raises(UserError, match="which exists; use a new folder"):
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
