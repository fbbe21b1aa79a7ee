"""Models of Hugging Face in Megatron and back: the same weights, the same logits."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from differences import keep, relative_difference
from forks import Launcher
from megatron_logits import megatron_logits
from safetensors.torch import load_file, save_file

from megatron_fope import UserError
from megatron_fope.checkpoint.reader import open_checkpoint
from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import import_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rope_theta": 100000.0,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "vocab_size": 300}),
    "llama3": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
    ),
    "qwen3_moe, not normalised": (
        "Qwen3Moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": False}
    ),
}  # fmt: skip
LAYOUTS = {
    "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP 2": ("--pipeline-model-parallel-size", "2"),
    "EP 2": ("--expert-model-parallel-size", "2"),
}
PAIRS = [
    (family, layout)
    for family in ("llama", "smollm2", "qwen2", "qwen3", "mixtral", "qwen3_moe")
    for layout in LAYOUTS
    if layout != "EP 2" or family in ("mixtral", "qwen3_moe")
]
BATCH = (
    *("--micro-batch-size", "1", "--global-batch-size", "2", "--transformer-impl", "local"),
    *("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--eval-iters", "0"),
    *("--eval-interval", "100", "--log-interval", "1", "--mock-data", "--finetune", "--no-save-optim"),
)


def make(folder: Path, family: str, **changes: Any) -> Path:
    """A model with random weights, saved by transformers."""
    import transformers

    name, own = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**({"vocab_size": 256} | SIZES | own | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or "bias" in key:  # as a new model has them, they would hide mistakes
                value.add_(torch.rand_like(value))
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of Hugging Face."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module", params=list(FAMILIES))
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    source = make(folder / "hf", request.param)
    made = import_model(source, folder / "megatron")
    return folder, source, made


@pytest.mark.launch
def test_megatron_computes_what_transformers_does(
    imported: Any, launcher: Launcher, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import transformers

    _, source, made = imported
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(1))
    (found,) = megatron_logits(launcher, [made.folder], tokens, tmp_path, *made.flags)
    with torch.no_grad():
        expected = model(tokens).logits
    found = found[..., : expected.size(-1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    family = request.node.callspec.params["imported"]
    keep(family, "in", "1", transformers.__version__, relative_difference(found, expected))


@pytest.mark.launch
@pytest.mark.parametrize("imported,layout", PAIRS, indirect=["imported"])
def test_weights_return_from_every_layout(
    layout: str, imported: Any, launcher: Launcher, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Loaded by two ranks, trained at a rate of 0, saved and exported: the source's bits."""
    _, source, made = imported
    words = ["--cpu", "pretrain", *made.flags, *BATCH, *LAYOUTS[layout]]
    words += ["--load", str(made.folder), "--save", str(tmp_path / "saved"), "--save-interval", "1"]
    launcher.output(2, words, tmp_path / "log")
    out = export(tmp_path / "saved", tmp_path / "hf", shard_size="100KB")
    assert [out.architecture] == json.loads((source / "config.json").read_text())["architectures"]
    found, expected = weights(tmp_path / "hf"), weights(source)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    family = request.node.callspec.params["imported"]
    keep(family, "in and out", layout, importlib.metadata.version("transformers"), None)


def test_import_and_export_are_each_others_inverse(imported: Any, tmp_path: Path) -> None:
    _, source, made = imported
    export(made.folder, tmp_path / "hf")
    found, expected = weights(tmp_path / "hf"), weights(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again = import_model(tmp_path / "hf", tmp_path / "again")
    assert again.flags == made.flags
    ours, theirs = (open_checkpoint(folder, name="X") for folder in (made.folder, tmp_path / "again"))
    assert vars(ours.args) == vars(theirs.args)
    assert all(torch.equal(ours.read_tensor(name), theirs.read_tensor(name)) for name in ours.tensors)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "its architecture is GPT2LMHeadModel; allowed: Llama"),
        ({"architectures": None}, "its architecture is None"),
        ({"architectures": ["InternS1ProForCausalLM"]}, "one expert of each of 8 groups"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "it comes with code of its own, which is never run"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu; requires silu"),
        ({"mlp_bias": True}, "its mlp_bias is True"),
        ({"attention_bias": True}, "its attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "its quantization_config is"),
        ({"sliding_window": 32}, "its sliding_window is 32"),
        ({"num_hidden_layers": "2"}, "its num_hidden_layers is '2'; allowed: whole numbers from 1 to 65536"),
        ({"num_hidden_layers": 3}, "its files have no model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "Megatron's model has no place for model.layers.1"),
        ({"intermediate_size": 80}, "has the size [96, 64]; its config.json requires [80, 64]"),
        ({"vocab_size": 255}, "has the size [256, 64]; its config.json requires [255, 64]"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "rope_type is yarn",
        ),
        ({"architectures": ["FopeLlamaForCausalLM"]}, "no settings of FoPE that this version knows"),
    ],
)
def test_what_megatron_lacks(change: dict[str, Any], message: str, tmp_path: Path, plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    for file in plain.iterdir():
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / file.name).symlink_to(file)
    (tmp_path / "hf" / "config.json").unlink()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as refused:
        import_model(tmp_path / "hf", tmp_path / "megatron")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plain") / "hf", "llama")


def test_files_that_are_not_whole(plain: Path, tmp_path: Path) -> None:
    """Missing and damaged files, and numbers that are no floating point; nothing is left."""

    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            import_model(folder, tmp_path / "megatron")
        assert not (tmp_path / "megatron").exists() and "\n" not in str(error.value)
        return str(error.value)

    folder = tmp_path / "hf"
    assert "config.json cannot be read" in refused(folder)
    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    assert "it has no model.safetensors; only safetensors files are read" in refused(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors is missing" in refused(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "../model.safetensors is missing" in refused(folder)
    index.unlink()
    data = (plain / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors cannot be read" in refused(folder)
    tensors = load_file(plain / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight has the type I8; allowed: F32, F16, BF16" in refused(folder)


def test_targets_that_exist_stay(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="which exists; use a new folder"):
        import_model(plain, tmp_path / "there")
    with pytest.raises(UserError, match="does not exist"):
        import_model(plain, tmp_path / "no" / "folder")
    made = import_model(plain, tmp_path / "megatron")
    with pytest.raises(UserError, match="which exists; use a new folder"):
        export(made.folder, tmp_path / "there")
    with pytest.raises(UserError, match="allowed: sizes such as 500MB or 5GB"):
        export(made.folder, tmp_path / "hf", shard_size="many")
    with pytest.raises(UserError, match="requires a folder with a Hugging Face tokenizer"):
        export(made.folder, tmp_path / "hf", tokenizer=tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "megatron"}
