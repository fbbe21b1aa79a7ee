"""One small Llama in every form: Hugging Face's, the engines', Megatron's, ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import import_model

VOCABULARY = 60


def make_models(folder: Path) -> Path:
    """``hf``: RoPE, in several files; ``engine``: FoPE in LMDeploy's layout; ``checkpoint``: Megatron's of
    it; ``fope``: our export of that; ``tokenizer``: of as many ids."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf", max_shard_size="20KB")
    shutil.copytree(folder / "hf", folder / "engine")
    rope = {"rope_type": "default", "rope_theta": 1e4, "fope_sep_head": True}
    change(folder / "engine" / "config.json", rope_parameters=rope)
    names = ("model.rotary_emb.sin_coef", "model.rotary_emb.cos_coef")
    coefficients = {name: torch.eye(3) + 0.1 * torch.randn(2, 3, 3) for name in names}
    save_file(coefficients, folder / "engine" / "fope.safetensors")
    index = folder / "engine" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=places | dict.fromkeys(names, "fope.safetensors"))
    import_model(folder / "engine", folder / "checkpoint")
    export(folder / "checkpoint", folder / "fope")
    write_tokenizer(folder / "tokenizer", VOCABULARY)
    return folder


def write_tokenizer(folder: Path, size: int) -> Path:
    """Words ``w0``, ``w1`` and so on; the last id ends a text."""
    words = {f"w{i}": i for i in range(size - 1)} | {"<end>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="w1", pad_token="w2"
    )
    fast.save_pretrained(folder)
    return folder


def change(file: Path, **values: Any) -> None:
    """Entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
