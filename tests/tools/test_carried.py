"""What goes in and out with the weights: tokenizer, generation, lengths, types, files, auto classes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import change, make_models, write_tokenizer
from synthetic import main
from tqdm import tqdm

from megatron_fope.checkpoint.reader import open_checkpoint
from megatron_fope.tools.huggingface import exporting, importing
from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import import_model

SPECIAL = {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 2}
AUTO_CLASSES = """
import sys
import torch, transformers, megatron_fope
folder = sys.argv[1]
classes = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification")
try:
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("importing the package registered its classes")
except ValueError:
    pass
from megatron_fope.tools.huggingface import register
register()
register()
made = {}
for name in classes:
    model = made[name] = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__ == "megatron_fope.tools.huggingface.modeling_fope", type(model)
tokens = torch.arange(40).view(1, 40)
with torch.no_grad():
    hidden = made["AutoModel"](tokens).last_hidden_state
    causal = made["AutoModelForCausalLM"]
    torch.testing.assert_close(causal.lm_head(hidden), causal(tokens).logits)
    torch.save(causal(tokens).logits, sys.argv[2])
    assert made["AutoModelForSequenceClassification"](tokens).logits.shape == (1, 2)
"""


@pytest.fixture(scope="module")
def models_there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_auto_classes_after_register(models_there: Path, tmp_path: Path) -> None:
    """Without ``trust_remote_code``, and only then; the same logits as by the file in the folder."""
    command = [sys.executable, "-c", AUTO_CLASSES, models_there / "fope", tmp_path / "logits.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = AUTO_CLASSES.partition("classes =")[0] + (
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "expected, found = model(torch.arange(40).view(1, 40)).logits, torch.load(sys.argv[2])\n"
        "assert torch.equal(expected, found)\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, models_there / "fope", tmp_path / "logits.pt"]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_tokenizer_and_generation_go_both_ways(
    models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The import names the folder in the checkpoint, and the export finds it there again."""
    source = shutil.copytree(models_there / "hf", tmp_path / "a model")
    write_tokenizer(source, 60)
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "do_sample": True, "eos_token_id": [59, 58]})
    )
    assert main("import", source, tmp_path / "checkpoint") == 0
    assert f"--tokenizer-model '{source}'" in capsys.readouterr().out, "a shell reads it as one word"
    assert main("export", tmp_path / "checkpoint", tmp_path / "out") == 0
    assert f"tokenizer: {source}" in capsys.readouterr().out
    assert SPECIAL.items() <= read(tmp_path / "out").items()
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.temperature, generation.do_sample) == (0.7, True)
    assert generation.eos_token_id == [59, 58] and generation.bos_token_id == 1
    old, new = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert old("w3 w4 <end>").input_ids == new("w3 w4 <end>").input_ids == [3, 4, 59]
    shutil.rmtree(source)
    assert main("export", tmp_path / "checkpoint", tmp_path / "without") == 0
    assert "tokenizer: none, and no special tokens" in capsys.readouterr().out
    assert dict.fromkeys(SPECIAL).items() <= read(tmp_path / "without").items()
    made = export(tmp_path / "checkpoint", tmp_path / "given", tokenizer=models_there / "tokenizer")
    assert SPECIAL.items() <= read(made.folder).items()
    assert read(made.folder, "generation_config.json")["eos_token_id"] == 59


def test_progress_is_of_every_byte(
    models_there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars end at 100 %, padding of the vocabulary included; both commands count the same parameters."""
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            assert options.pop("disable") is None, "only where somebody looks at a terminal"
            super().__init__(**options, disable=False, file=io.StringIO())
            bars.append(self)

    for module in (exporting, importing):
        monkeypatch.setattr(module, "tqdm", Bar)
    imported = import_model(models_there / "engine", tmp_path / "checkpoint")
    exported = export(imported.folder, tmp_path / "engine", format="engine")
    assert len(bars) == 2 and all(bar.n == bar.total > 0 for bar in bars)
    assert imported.num_parameters == exported.num_parameters and imported.added_rows == 128 - 60


@pytest.mark.parametrize("layout", ["hf", "engine"])
def test_lengths(layout: str, models_there: Path, tmp_path: Path) -> None:
    """``--max-length`` is what engines accept, and never the length that the model was trained with."""
    for given, expected in ((None, 64), (4096, 4096), (8, 8)):
        made = export(models_there / "checkpoint", tmp_path / f"{given}", format=layout, max_length=given)
        assert made.max_length == read(made.folder)["max_position_embeddings"] == expected
        told = {"train_length": 64} if layout == "engine" else {}
        back = open_checkpoint(import_model(made.folder, tmp_path / f"back {given}", **told).folder, name="X")
        assert (back.train_length, back.args.seq_length) == (64, 64)
        assert back.args.max_position_embeddings == max(64, expected)


def test_types_and_files(models_there: Path, tmp_path: Path) -> None:
    """Every weight has the type that was asked for but coefficients, and no file is larger than asked."""
    whole = load_file(models_there / "fope" / "model.safetensors")
    for name in ("bfloat16", "float16", "float32"):
        made = export(models_there / "checkpoint", tmp_path / name, dtype=name, shard_size="10KB").folder
        assert read(made)["dtype"] == read(made)["torch_dtype"] == name
        index, found = read(made, "model.safetensors.index.json"), {}
        for file in made.glob("*.safetensors"):
            tensors = load_file(file)
            assert sum(value.nbytes for value in tensors.values()) <= 10_000 or len(tensors) == 1
            assert all(index["weight_map"][key] == file.name for key in tensors)
            found |= tensors
        assert found.keys() == whole.keys() == index["weight_map"].keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        for key, value in found.items():
            dtype = torch.float32 if "_coef" in key else getattr(torch, name)
            assert value.dtype == dtype and torch.equal(value, whole[key].to(dtype)), key


def test_layers_of_different_types(models_there: Path, tmp_path: Path) -> None:
    """Megatron has one type for all layers of a tensor: the one that loses nothing."""
    from safetensors.torch import save_file

    folder = shutil.copytree(models_there / "hf", tmp_path / "hf")
    (file,) = (f for f in folder.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(f))
    tensors = load_file(file)
    rounded = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": rounded}, file)
    made = open_checkpoint(import_model(folder, tmp_path / "checkpoint").folder, name="X")
    stored = made.read_tensor("decoder.layers.mlp.linear_fc1.weight", (1,))
    assert stored.dtype == torch.float32 and torch.equal(stored[48:], rounded.float())


def test_coefficients_of_any_type_become_float32(models_there: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(models_there / "engine", tmp_path / "engine")
    coefficients = {k: v.bfloat16() for k, v in load_file(folder / "fope.safetensors").items()}
    save_file(coefficients, folder / "fope.safetensors")
    made = open_checkpoint(import_model(folder, tmp_path / "checkpoint").folder, name="X")
    stored = made.read_tensor("decoder.layers.self_attention.fope.sin_coef", (0,))
    assert stored.dtype == torch.float32
    assert torch.equal(stored, coefficients["model.rotary_emb.sin_coef"].float())


def test_an_annealed_model_does_not_begin_anew(models_there: Path, tmp_path: Path) -> None:
    """Its start from RoPE is over, also at iteration 0 of the imported checkpoint."""
    folder = shutil.copytree(models_there / "fope", tmp_path / "fope")
    fope = read(folder)["fope"]
    change(folder / "config.json", fope=fope | {"settings": fope["settings"] | {"anneal_iters": 100}})
    made = import_model(folder, tmp_path / "checkpoint")
    export(made.folder, tmp_path / "again")
    assert read(tmp_path / "again")["fope"]["settings"]["anneal_iters"] == 0
