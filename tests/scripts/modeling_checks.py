"""Checks of ``modeling_fope.py`` with whatever transformers this interpreter finds, on the CPU.

``python modeling_checks.py FOLDER PORT [WORD ...]`` makes a small model of every family in FOLDER and prints
``{"transformers", "largest difference", "results": {check[family]: null or traceback}}``. Two ranks meet at
PORT, words choose checks. ``test_modeling_fope.py`` shows each check as a test of its own.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
import time
import traceback
from itertools import pairwise
from pathlib import Path

import modeling_parallel
import torch
import transformers
from modeling_cases import (
    FAMILIES,
    HEADS,
    LAYERS,
    LENGTH,
    MODELING,
    MOST,
    PADDING,
    Case,
    assert_same_bits,
    coefficients,
    left_padded,
    make,
)
from modeling_parallel import ask_two_ranks
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

# Loading and saving -----------------------------------------------------------------------------------


def check_every_weight_is_in_the_file(case: Case) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        case.folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    stored = {name: value for name, value in case.weights.items() if name.endswith("_coef")}
    assert_same_bits(coefficients(model), stored)


def check_saving_writes_the_same_file(case: Case) -> None:
    """Names (those of experts, too), bits, config and model file; loaded with and without trust."""
    with tempfile.TemporaryDirectory() as folder:
        case.load().save_pretrained(folder)
        saved = load_file(Path(folder, "model.safetensors"))
        assert saved.keys() == case.weights.keys()
        assert all(torch.equal(saved[name], value) for name, value in case.weights.items())
        assert Path(folder, MODELING.name).read_bytes() == MODELING.read_bytes()
        before, after = (json.loads(Path(at, "config.json").read_text()) for at in (case.folder, folder))
        assert all(after[key] == before[key] for key in ("fope", "auto_map", "model_type", "architectures"))
        for trust in (True, None):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
            with torch.no_grad():
                case.assert_close(model(case.tokens).logits, case.expected)


def check_coefficients_stay_float32(case: Case) -> None:
    """Whatever dtype the model is loaded, made or cast to; also when it is saved again."""
    kept = coefficients(case.model)
    for dtype in (torch.bfloat16, torch.float16):
        for model in (case.load(dtype=dtype), case.load().to(dtype)):
            assert_same_bits(coefficients(model), kept)
            assert model.lm_head.weight.dtype == dtype
            assert model(case.tokens[:, :8]).logits.isfinite().all()
    assert_same_bits(coefficients(case.load(dtype=torch.float64).float().bfloat16().half()), kept)
    if case.is_dense:  # experts do not compute in float64
        assert case.load(dtype=torch.float64)(case.tokens).logits.dtype == torch.float64
    with tempfile.TemporaryDirectory() as folder:
        case.load(dtype=torch.bfloat16).save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert_same_bits(coefficients(again), kept)


def check_bfloat16_is_close(case: Case) -> None:
    with torch.no_grad():
        found = case.load(dtype=torch.bfloat16)(case.tokens).logits.float()
    if case.is_dense:  # rounding sends some tokens to other experts
        assert (found - case.expected).abs().mean() < 0.03 * case.expected.abs().max()
    assert (found - case.expected).abs().median() < 0.03 * case.expected.abs().max()


def check_new_models_are_the_identity(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
    eye = torch.eye(len(case.fope["inv_freq"]), case.fope["num_series"])
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = auto.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
        if auto is not AutoModelForSequenceClassification:  # older releases look at the config's dtype
            parameters = [value for name, value in model.named_parameters() if not name.endswith("_coef")]
            assert {value.dtype for value in parameters} == {torch.bfloat16}
        found = coefficients(model)
        assert_same_bits(found, {name: eye.repeat(case.fope["num_heads"], 1, 1) for name in found})
    without = {name: value for name, value in case.weights.items() if not name.endswith("_coef")}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(case.folder, folder, dirs_exist_ok=True)
        save_file(without, Path(folder, "model.safetensors"), {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found = coefficients(model)
    assert_same_bits(found, {name: eye.repeat(case.fope["num_heads"], 1, 1) for name in found})


def check_empty_then_loaded(case: Case) -> None:
    """Made without storage: frequencies are right as soon as there is some."""
    with torch.device("meta"):
        model = type(case.model)(case.model.config)
    model.to_empty(device="cpu")
    model.load_state_dict(case.model.state_dict())
    with torch.no_grad():
        case.assert_close(model.eval()(case.tokens).logits, case.expected)


def check_base_model_and_classifier(case: Case) -> None:
    base = case.load(AutoModel)
    classifier, info = (
        case.load(
            AutoModelForSequenceClassification, num_labels=3, pad_token_id=0, output_loading_info=False
        ),
        None,
    )
    assert info is None and classifier.score.weight.shape == (3, 64)
    with torch.no_grad():
        hidden = base(case.tokens).last_hidden_state
        case.assert_close(case.model.lm_head(hidden), case.expected)
        case.assert_close(classifier(case.tokens).logits, classifier.score(hidden[:, -1]))
        rows, mask = left_padded(case)
        labels = torch.tensor([0, 1, 2])
        found = classifier(rows, attention_mask=mask, labels=labels)
        for row, padding in enumerate(PADDING):
            alone = classifier(rows[row : row + 1, padding:]).logits[0]
            case.assert_close(found.logits[row], alone)
        assert found.loss.isfinite()


# Forward ----------------------------------------------------------------------------------------------


def check_logits_are_the_formulas(case: Case) -> None:
    """In one piece and one piece after another, with each attention and each name of the cache."""
    names = ["past_key_values"] + ["cache"] * ("cache" in inspect.signature(case.model.forward).parameters)
    for attention in ("sdpa", "eager"):
        model = case.load(attn_implementation=attention)
        with torch.no_grad():
            case.assert_close(model(case.tokens).logits, case.expected)
            for name in names:
                for owner in (model, model.model):
                    cache = DynamicCache(config=model.config)
                    pieces = [
                        owner(case.tokens[:, :30], **{name: cache}),
                        owner(case.tokens[:, 30:], **{name: cache}),
                    ]
                    assert cache.get_seq_length() == LENGTH
                    found = torch.cat([piece[0] for piece in pieces], dim=1)
                    found = found if owner is model else model.lm_head(found)
                    case.assert_close(found, case.expected)


def check_flex_attention(case: Case) -> None:
    """Not compiled, which would take a minute."""
    model = case.load(attn_implementation="flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        case.assert_close(model(case.tokens).logits, case.expected)


def check_attention_weights_are_recorded(case: Case) -> None:
    model = case.load(attn_implementation="eager")
    with torch.no_grad():
        found = model(case.tokens, output_attentions=True, output_hidden_states=True)
    assert [value.shape for value in found.attentions] == [(2, HEADS, LENGTH, LENGTH)] * LAYERS
    assert len(found.hidden_states) == LAYERS + 1


def check_packed_sequences_are_the_sequences_alone(case: Case) -> None:
    if case.name == "qwen2":  # its window's mask is made without looking at positions
        return
    row, cuts = case.tokens[:1], (0, 17, LENGTH)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(cuts)])[None]
    with torch.no_grad():
        packed = case.model(row, position_ids=positions, use_cache=False).logits
        for start, end in pairwise(cuts):
            case.assert_close(packed[:, start:end], case.model(row[:, start:end]).logits)


def check_left_padded_rows_are_the_rows_alone(case: Case) -> None:
    """Without ``position_ids``; in one piece, and in pieces with a cache."""
    rows, mask = left_padded(case)
    with torch.no_grad():
        whole = case.model(rows, attention_mask=mask).logits
        first = case.model(rows[:, :32], attention_mask=mask[:, :32], use_cache=True)
        pieces = [first.logits]
        for start, end in ((32, 40), (40, 41), (41, LENGTH)):
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
            case.assert_close(behind[row, : LENGTH - padding], alone)


def check_mask_of_fewer_tokens_is_refused(case: Case) -> None:
    cache = case.model(case.tokens[:, :30], use_cache=True).past_key_values
    try:
        case.model(case.tokens[:, 30:], attention_mask=torch.ones(2, 18), past_key_values=cache)
    except ValueError as error:
        assert "attention_mask covers 18 tokens, cache and input hold 48" in str(error)
    else:
        raise AssertionError("a mask of the new tokens alone was accepted")


# Generation -------------------------------------------------------------------------------------------

CACHES = ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})


def check_generation_is_the_full_forward(case: Case) -> None:
    prompt = case.tokens[:1, :40]
    for cache in CACHES:
        out = case.model.generate(
            prompt,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **cache,
        )
        assert out.sequences.size(1) == 46
        with torch.no_grad():
            full = case.model(out.sequences, use_cache=False).logits[:, 39:-1]
        case.assert_close(torch.stack(out.logits, dim=1), full)
        assert out.sequences[:, 40:].tolist() == full.argmax(-1).tolist()


def check_beams_are_those_without_cache(case: Case) -> None:
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "disable_compile": True}
    found = [case.model.generate(case.tokens[:, :20], **options, **cache).tolist() for cache in CACHES]
    assert found[0] == found[1] == found[2]


def check_left_padded_rows_generate_what_they_do_alone(case: Case) -> None:
    rows, mask = left_padded(case)
    for cache in CACHES:
        options = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True, **cache}
        together = case.model.generate(rows, attention_mask=mask, pad_token_id=0, **options)
        for row, padding in enumerate(PADDING):
            alone = case.model.generate(rows[row : row + 1, padding:], pad_token_id=0, **options)
            assert together[row, padding:].tolist() == alone[0].tolist(), (cache, row)


# Training ---------------------------------------------------------------------------------------------


def check_coefficients_move_only_if_learnable(case: Case) -> None:
    """Some steps of an optimizer that got ``model.parameters()``."""
    for dtype in (torch.float32, torch.bfloat16):
        model = case.load(dtype=dtype).train()
        kept = coefficients(model)
        is_parameter = {name for name, _ in model.named_parameters() if name.endswith("_coef")}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            model(case.tokens, labels=case.tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = coefficients(model)
        if case.fope["learnable"]:
            assert is_parameter == kept.keys()
            assert all(not torch.equal(moved[name], value) for name, value in kept.items())
            assert {value.dtype for value in moved.values()} == {torch.float32}
        else:
            assert not is_parameter
            assert_same_bits(moved, kept)


def check_gradient_checkpointing_changes_nothing(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = case.load().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(case.tokens, labels=case.tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(value is not None for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)


def check_lora_is_trained_merged_and_loaded(case: Case) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(case.load(), lora).train()
    kept = coefficients(case.model).values()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=case.tokens, labels=case.tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(coefficients(model).values(), kept, strict=True))
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = model(input_ids=case.tokens).logits
        assert (trained - case.expected).abs().max() > 0.1 * case.expected.abs().max()
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.load(), folder).eval()
        case.assert_close(loaded(input_ids=case.tokens).logits, trained)
        loaded.merge_and_unload().save_pretrained(folder + "/merged")
        merged = AutoModelForCausalLM.from_pretrained(folder + "/merged", trust_remote_code=True).eval()
        case.assert_close(merged(case.tokens).logits, trained, factor=5)


def check_trainer_takes_a_step(case: Case) -> None:
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, use_cpu=True, report_to=[], gradient_checkpointing=True, disable_tqdm=True
        )
        data = [{"input_ids": row, "labels": row} for row in case.tokens]
        trainer = Trainer(case.load(), arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(folder + "/saved")
        saved = AutoModelForCausalLM.from_pretrained(folder + "/saved", trust_remote_code=True)
    found, before = coefficients(saved), coefficients(case.model)
    assert found.keys() == before.keys()
    moved = {not torch.equal(found[name], value) for name, value in before.items()}
    assert moved == {case.fope["learnable"]}
    assert not torch.equal(saved.lm_head.weight, case.model.lm_head.weight)


# Compilers --------------------------------------------------------------------------------------------


def check_compiles_as_one_graph(case: Case) -> None:
    """``torch.export``, ``torch.compile`` without a break; twice, with other tokens."""
    if not case.is_dense:  # which experts get tokens is decided while running
        return
    model = case.load()
    compiled = model
    if case.name == "llama":
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    exported = torch.export.export(model, (), {"input_ids": case.tokens, "use_cache": False}, strict=False)
    with torch.no_grad():
        for tokens in (case.tokens, case.tokens.flip(1)):
            expected = model(tokens).logits
            case.assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected)
            case.assert_close(exported.module()(input_ids=tokens, use_cache=False).logits, expected)
    torch._dynamo.reset()


def check_series_are_exact_where_products_are_shortened(case: Case) -> None:
    """Under autocast and with the shortcuts that PyTorch offers."""
    module = sys.modules[type(case.model).__module__]
    basis, weights = torch.rand(1, 64, 50), torch.rand(2, 50, 40)
    exact = torch.einsum("bsi,hij->bhsj", basis.double(), weights.double())
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = module.series(basis, weights)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
        finally:
            torch.set_float32_matmul_precision("highest")


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    cases = [make(name, folder / name) for name in FAMILIES]
    ask_two_ranks(cases, folder, sys.argv[2])
    chosen = sys.argv[3:]
    results: dict[str, str | None] = {}
    for name, check in (globals() | vars(modeling_parallel)).items():
        if not name.startswith("check_") or (chosen and not any(word in name for word in chosen)):
            continue
        start = time.perf_counter()
        for case in cases:
            try:
                check(case)
                results[f"{name}[{case.name}]"] = None
            except Exception:
                results[f"{name}[{case.name}]"] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(
        json.dumps(
            {"transformers": transformers.__version__, "largest difference": MOST[0], "results": results}
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
