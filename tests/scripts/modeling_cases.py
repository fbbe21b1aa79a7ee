"""Small models with FoPE of every family, and their logits by the formula; for ``modeling_checks.py``."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_fope.formula import functional
from megatron_fope.tools import huggingface

MODELING = Path(huggingface.__file__).with_name("modeling_fope.py")
VOCABULARY, HEAD_DIM, LAYERS, HEADS, KV_HEADS, LENGTH = 96, 16, 2, 4, 2, 48
PADDING = (0, 11, 30)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {"attention_scaling": 1.2, "pad_sin": 1.2, "pad_cos": 1.2}),
    "qwen2": (
        "Qwen2",
        {
            **{"tie_word_embeddings": True, "use_sliding_window": True},
            **{"sliding_window": 20, "max_window_layers": 1},
        },
        {"d_in": 5, "num_series": 7, "learnable": True},
    ),
    "qwen3": (
        "Qwen3",
        {},
        {"num_heads": 1, "separate_basis": False, "exact_angles": True, "normalize": True},
    ),
    "mixtral": (
        "Mixtral",
        {**EXPERTS, "num_local_experts": 4, "sliding_window": None},
        {"num_series": 6, "pad_sin": 0.0},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True},
        {"d_in": 8, "num_series": 8, "learnable": True, "normalize": True},
    ),
}
"""Folder to class prefix, settings of the family, settings of FoPE."""


def fope_settings(d_in: int = 6, **changes: Any) -> dict[str, Any]:
    defaults = {
        "num_series": d_in,
        "num_heads": KV_HEADS,
        "pad_sin": 1.0,
        "pad_cos": 1.0,
        "attention_scaling": 1.0,
        "normalize": False,
        "separate_basis": True,
        "exact_angles": False,
        "learnable": False,
        "settings": {"profile": "made up"},
    }
    inv_freq = functional.inverse_frequencies(HEAD_DIM, 10000.0)[:d_in].tolist()
    return {"inv_freq": inv_freq} | defaults | changes


@dataclass
class Case:
    """One family: a folder as the export writes it, and what its logits must be."""

    name: str
    folder: Path

    @cached_property
    def fope(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())["fope"]

    @cached_property
    def tokens(self) -> Tensor:
        return torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    def load(self, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
        options = {"dtype": torch.float32, "trust_remote_code": True} | options
        return auto.from_pretrained(self.folder, **options).eval()

    @cached_property
    def model(self) -> Any:
        return self.load()

    @cached_property
    def expected(self) -> Tensor:
        return reference(self, self.tokens)

    @property
    def is_dense(self) -> bool:
        return "mixtral" not in self.name and "moe" not in self.name

    def assert_close(self, found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        tolerance = factor * 2e-5 * self.expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        MOST[0] = max(
            MOST[0], (found - expected).abs().max().item() / self.expected.abs().max().item() / factor
        )


MOST = [0.0]
"""Largest difference so far, of the largest logit."""


def make(name: str, folder: Path) -> Case:
    """The family's own class writes a folder; config, coefficients and model file of FoPE are added to it."""
    prefix, changes, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**(SHAPE | changes))
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(folder / "rope")
    made = folder / "fope"
    shutil.copytree(folder / "rope", made)
    fope = fope_settings(**settings)
    stored = json.loads((made / "config.json").read_text())
    names = {
        "AutoConfig": "Config",
        "AutoModel": "Model",
        "AutoModelForCausalLM": "ForCausalLM",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
    }
    stored |= {
        "model_type": f"fope_{name}",
        "architectures": [f"Fope{prefix}ForCausalLM"],
        "auto_map": {auto: f"modeling_fope.Fope{prefix}{part}" for auto, part in names.items()},
        "fope": fope,
    }
    (made / "config.json").write_text(json.dumps(stored))
    shutil.copyfile(MODELING, made / MODELING.name)
    weights = load_file(made / "model.safetensors")
    shape = (fope["num_heads"], len(fope["inv_freq"]), fope["num_series"])
    for layer in range(LAYERS):
        for coefficients in ("sin_coef", "cos_coef") if fope["separate_basis"] else ("fourier_coef",):
            value = torch.eye(*shape[1:]).repeat(shape[0], 1, 1) + 0.15 * torch.rand(shape)
            weights[f"model.layers.{layer}.self_attn.{coefficients}"] = value
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    return Case(name, made)


class Positions(nn.Module):
    """In place of a rotary embedding: the positions themselves."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return position_ids, position_ids


def reference(case: Case, tokens: Tensor, **inputs: Any) -> Tensor:
    """Logits of the family's RoPE model, its rotation replaced by the formula."""
    prefix, fope = FAMILIES[case.name][0], case.fope
    module = importlib.import_module(f"transformers.models.{case.name}.modeling_{case.name}")
    model = getattr(transformers, f"{prefix}ForCausalLM").from_pretrained(
        case.folder.with_name("rope"), attn_implementation="eager"
    )
    model.model.rotary_emb = Positions()
    dtype = torch.float64 if fope["exact_angles"] else torch.float32
    layers = iter(range(LAYERS))

    def rotate(query: Tensor, key: Tensor, positions: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        prefix = f"model.layers.{next(layers)}.self_attn."
        basis = functional.fourier_basis(positions, torch.tensor(fope["inv_freq"], dtype=dtype))
        names = ("sin_coef", "cos_coef") if fope["separate_basis"] else ("fourier_coef", "fourier_coef")
        sin, cos = functional.fourier_tables(
            *(part.float() for part in basis),
            *(case.weights[prefix + name] for name in names),
            half=HEAD_DIM // 2,
            # The file has the padding's product with the scaling.
            pad_sin=fope["pad_sin"] / fope["attention_scaling"],
            pad_cos=fope["pad_cos"] / fope["attention_scaling"],
            normalize=fope["normalize"],
            attention_scaling=fope["attention_scaling"],
        )
        rotated = (functional.apply_fourier_rotary(x.transpose(1, 2), sin, cos) for x in (query, key))
        query, key = (x.transpose(1, 2) for x in rotated)
        return query, key

    kept, module.apply_rotary_pos_emb = module.apply_rotary_pos_emb, rotate
    try:
        with torch.no_grad():
            return model.eval()(tokens, use_cache=False, **inputs).logits
    finally:
        module.apply_rotary_pos_emb = kept


def coefficients(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_coef")}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


def left_padded(case: Case) -> tuple[Tensor, Tensor]:
    """``[3, LENGTH]`` tokens and their mask; ``PADDING`` tokens in front."""
    rows = torch.cat((case.tokens, case.tokens[:1].flip(1)))
    mask = torch.stack([torch.arange(LENGTH) >= padding for padding in PADDING]).long()
    return rows * mask, mask
