"""Checks of exported Hugging Face models with whatever transformers this interpreter finds, on the CPU.

``python export_checks.py CASES`` reads a JSON object ``{name: {"folder", "tokens", "logits", "kind"}}``: the
folder of an export, ``[2, 160]`` tokens and Megatron's logits for them (files of ``torch.save``), and
``"rope"``, ``"fope"`` or ``"learnable"``. It prints ``{"transformers": version, "results": {check[name]: null
or traceback}}``; ``tests/examples/test_export.py`` shows each check as a test of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

PADDING = (0, 30, 70)


class Case:
    """One export."""

    def __init__(self, folder: str, tokens: str, logits: str, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.tokens, self.expected = torch.load(tokens), torch.load(logits)
        self.tolerance = 1e-4 * self.expected.abs().max().item()

    def load(self, **options: Any) -> Any:
        options = {"dtype": torch.float32} | options
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=self.kind != "rope", **options
        )

    @cached_property
    def model(self) -> Any:
        return self.load().eval()

    def assert_close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=self.tolerance)


def coefficients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_coef")}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


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


def check_generation_is_the_full_forward(case: Case) -> None:
    prompt = case.tokens[:1, :120]
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        out = case.model.generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **cache,
        )
        assert out.sequences.size(1) == 132
        with torch.no_grad():
            full = case.model(out.sequences, use_cache=False).logits[:, 119:-1]
        case.assert_close(torch.stack(out.logits, dim=1), full)
        assert out.sequences[:, 120:].tolist() == full.argmax(-1).tolist()


def left_padded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """``[3, 160]`` tokens and their mask; ``PADDING`` tokens in front."""
    rows = torch.cat((case.tokens, case.tokens[:1].flip(1)))
    mask = torch.stack([torch.arange(160) >= padding for padding in PADDING]).long()
    return rows * mask, mask


def check_left_padded_rows_are_the_rows_alone(case: Case) -> None:
    """Without ``position_ids``; in one piece, and in pieces with a cache."""
    rows, mask = left_padded(case)
    with torch.no_grad():
        whole = case.model(rows, attention_mask=mask).logits
        first = case.model(rows[:, :100], attention_mask=mask[:, :100], use_cache=True)
        pieces = [first.logits]
        for start, end in ((100, 150), (150, 151), (151, 160)):
            pieces.append(
                case.model(
                    rows[:, start:end],
                    attention_mask=mask[:, :end],
                    past_key_values=first.past_key_values,
                ).logits
            )
        for row, padding in enumerate(PADDING):
            alone = case.model(rows[row : row + 1, padding:]).logits[0]
            case.assert_close(whole[row, padding:], alone)
            case.assert_close(torch.cat(pieces, dim=1)[row, padding:], alone)
        embedded = case.model(
            inputs_embeds=case.model.get_input_embeddings()(rows), attention_mask=mask.bool()
        ).logits
        case.assert_close(embedded, whole)
        behind = case.model(rows.flip(1), attention_mask=mask.flip(1)).logits
        for row, padding in enumerate(PADDING):
            alone = case.model(rows[row : row + 1, padding:].flip(1)).logits[0]
            case.assert_close(behind[row, : 160 - padding], alone)


def check_left_padded_rows_generate_what_they_do_alone(case: Case) -> None:
    rows, mask = left_padded(case)
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **cache}
        together = case.model.generate(rows, attention_mask=mask, pad_token_id=0, **options)
        for row, padding in enumerate(PADDING):
            alone = case.model.generate(rows[row : row + 1, padding:], pad_token_id=0, **options)
            assert together[row, padding:].tolist() == alone[0].tolist(), (cache, row)


def check_fope_mask_of_fewer_tokens_is_refused(case: Case) -> None:
    cache = case.model(case.tokens[:, :100], use_cache=True).past_key_values
    try:
        case.model(case.tokens[:, 100:], attention_mask=torch.ones(2, 60), past_key_values=cache)
    except ValueError as error:
        assert "attention_mask covers 60 tokens, cache and input hold 160" in str(error)
    else:
        raise AssertionError("a mask of the new tokens alone was accepted")


def check_fope_coefficients_stay_float32(case: Case) -> None:
    """Whatever dtype the model is loaded, made or cast to; also when it is saved again."""
    kept = coefficients(case.model)
    for dtype in (torch.bfloat16, torch.float16):
        for model in (case.load(dtype=dtype), case.load().to(dtype)):
            assert_same_bits(coefficients(model), kept)
            assert model.lm_head.weight.dtype == dtype
            assert model(case.tokens[:, :8]).logits.isfinite().all()
    assert_same_bits(coefficients(case.load(dtype=torch.float64).float().bfloat16().half()), kept)
    with tempfile.TemporaryDirectory() as folder:
        case.load(dtype=torch.bfloat16).save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert_same_bits(coefficients(again), kept)
    config = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    assert fresh.lm_head.weight.dtype == torch.bfloat16
    assert {value.dtype for value in coefficients(fresh).values()} == {torch.float32}


def check_fope_coefficients_move_only_if_learnable(case: Case) -> None:
    """Eight steps of an optimizer that got ``model.parameters()``."""
    for dtype in (torch.float32, torch.bfloat16):
        model = case.load(dtype=dtype).train()
        kept = coefficients(model)
        is_parameter = {name in kept for name, _ in model.named_parameters() if name.endswith("_coef")}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(8):
            model(case.tokens, labels=case.tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = coefficients(model)
        if case.kind == "learnable":
            assert is_parameter == {True}
            assert all(not torch.equal(moved[name], value) for name, value in kept.items())
            assert {value.dtype for value in moved.values()} == {torch.float32}
        else:
            assert not is_parameter
            assert_same_bits(moved, kept)


def check_fope_other_coefficients_would_be_seen(case: Case) -> None:
    """The tolerance hides nothing."""
    model = case.load()
    with torch.no_grad():
        model.model.layers[0].self_attn.sin_coef.mul_(0.9)
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
    print(json.dumps({"transformers": transformers.__version__, "results": results}), flush=True)


if __name__ == "__main__":
    main()
