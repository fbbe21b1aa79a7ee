"""Exported models compute what Megatron does, with whatever transformers this interpreter finds, on the CPU.

``python export_checks.py CASES`` reads a JSON object ``{name: {"folder", "tokens", "logits", "kind"}}``: the
folder of an export, ``[2, 160]`` tokens and Megatron's logits for them (files of ``torch.save``), and
``"rope"`` or ``"fope"``. It prints ``{"transformers": version, "results": {check[name]: null or
traceback}, "differences": {name: largest of logits, relative}}``; ``tests/tools/test_export.py`` shows each
check as a test of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

PADDING = (0, 30, 70)


class Case:
    """One export."""

    def __init__(self, folder: str, tokens: str, logits: str, kind: str, **_: str) -> None:
        self.folder, self.kind = folder, kind
        self.tokens = torch.load(tokens)
        with open(f"{folder}/config.json") as file:  # Megatron's vocabulary is padded
            self.expected = torch.load(logits)[..., : json.load(file)["vocab_size"]]
        self.tolerance = 1e-4 * self.expected.abs().max().item()
        self.difference = 0.0

    def load(self, **options: Any) -> Any:
        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=self.kind != "rope", **options
        )

    @cached_property
    def model(self) -> Any:
        return self.load().eval()

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        relative = (found - expected).abs().max() / expected.abs().max()
        self.difference = max(self.difference, relative.item())
        torch.testing.assert_close(found, expected, rtol=0, atol=self.tolerance)


def check_every_weight_is_in_the_file(case: Case) -> None:
    _, info = case.load(output_loading_info=True)
    assert not any(info.values()), info


def check_logits_are_megatrons(case: Case) -> None:
    """Also beyond the trained length; in one piece and one piece after another, with each attention."""
    for attention in ("sdpa", "eager"):
        model = case.load(attn_implementation=attention)
        with torch.no_grad():
            case.assert_close(model(case.tokens).logits, case.expected)
            for name in cache_names(model):
                first = model(case.tokens[:, :100], use_cache=True)
                cache = first.past_key_values
                assert cache.get_seq_length() == 100
                rest = model(case.tokens[:, 100:], **{name: cache})
                assert cache.get_seq_length() == 160
                case.assert_close(torch.cat((first.logits, rest.logits), dim=1), case.expected)


def cache_names(model: Any) -> list[str]:
    """``past_key_values`` and what this release calls it; the older name is taken by all of them."""
    from inspect import signature

    return ["past_key_values"] + ["cache"] * ("cache" in signature(model.forward).parameters)


def check_fope_other_coefficients_would_be_seen(case: Case) -> None:
    """The tolerance hides nothing."""
    model = case.load()
    with torch.no_grad():
        layer = model.model.layers[0].self_attn
        coefficients = layer.sin_coef if hasattr(layer, "sin_coef") else layer.fourier_coef
        coefficients[:, 0] *= 0.5
        assert (model(case.tokens).logits - case.expected).abs().max() > 30 * case.tolerance


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with open(sys.argv[1]) as file:
        cases = {name: Case(**case) for name, case in json.load(file).items()}
    results: dict[str, str | None] = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        for label, case in cases.items():
            if case.kind == "rope" and name.startswith("check_fope_"):
                continue
            try:
                check(case)
                results[f"{name}[{label}]"] = None
            except Exception:
                results[f"{name}[{label}]"] = traceback.format_exc()
    answer = {"transformers": transformers.__version__, "results": results}
    answer["differences"] = {name: case.difference for name, case in cases.items()}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
