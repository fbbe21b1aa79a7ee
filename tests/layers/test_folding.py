"""Padding 1,1 with its factor folded into the weights is padding 0,1; a start that folds begins at RoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import fope_config, gpt, mla_model, run, tokens

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]

MODELS: dict[str, dict[str, Any]] = {
    "grouped queries, biases": {"add_bias_linear": True},
    "biases of query, key and value only": {"add_bias_linear": False, "add_qkv_bias": True},
    "query and key normalised": {"qk_layernorm": True, "normalization": "LayerNorm"},
    "interleaved": {"rotary_interleaved": True},
    "output gates": {"attention_output_gate": True},
    "a layer without positions": {"no_rope_freq": [0, 1]},
    "latent": {"latent": True},
    "latent, queries not compressed": {"latent": True, "q_lora_rank": None},
}
FOLD = {"pad_value": "1,1", "fold_padding": True}


def build(fope: dict[str, Any] | None, *, latent: bool = False, **settings: Any) -> Any:
    config = None if fope is None else fope_config(**{"train_length": 24} | fope)
    position = {} if latent else {"position": "none" if fope is not None else "rope"}
    model = (mla_model if latent else gpt)(config, **position, **settings)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "layernorm" in name or name.endswith("bias"):  # zeros and ones would show nothing
            generator = torch.Generator().manual_seed(number)
            weight.data.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def loaded(model: Any, weights: dict[str, Any], *, fold: bool) -> Any:
    """Load what a start makes of a checkpoint's state dict."""
    from megatron_fope.layers.embedding import KEEP_INITIAL, ToFold

    state = dict(weights)
    for name in model.state_dict():
        if name.endswith("_coef"):
            value = state.get(name, KEEP_INITIAL)
            state[name] = ToFold(value) if fold else value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_folded_padding_is_padding_0_1(name: str) -> None:
    settings = MODELS[name]
    source = build({"pad_value": "0,1"}, **settings)
    assert source.decoder.layers[0].self_attention.fope.geometry.d_out < 8, "some pairs are padded"
    weights = {key: value.clone() for key, value in source.state_dict().items() if value is not None}
    expected = run(source, *tokens())
    folded = loaded(build(FOLD, **settings), weights, fold=True)
    torch.testing.assert_close(run(folded, *tokens()), expected, rtol=0, atol=1e-5)
    as_it_is = run(loaded(build(FOLD, **settings), weights, fold=False), *tokens())
    assert (as_it_is - expected).abs().max() > 1e-2
    changed = {key for key, value in folded.state_dict().items() if value is not None and
               not torch.equal(value, weights[key])}  # fmt: skip
    kinds = {key.rpartition("self_attention.")[2].partition(".")[0] for key in changed}
    latent = {"linear_kv_down_proj", "linear_q_up_proj" if "compressed" not in name else "linear_q_proj"}
    norms = {"q_layernorm", "k_layernorm"}
    normalised = norms if "qk_layernorm" in settings else {"linear_qkv"}
    assert kinds == (latent if "latent" in settings else normalised)
    if "positions" in name:
        assert not any("layers.1." in key for key in changed)


@pytest.mark.parametrize("name", ["grouped queries, biases", "query and key normalised", "latent"])
def test_a_gradual_start_with_folded_padding_begins_at_rope_and_ends_at_fope(name: str) -> None:
    from megatron_fope.layers import anneal

    settings, gradual = MODELS[name], {"anneal_iters": 4, "anneal_order": "slowest-first"}
    rope = build(None, **settings)
    weights = {key: value.clone() for key, value in rope.state_dict().items() if value is not None}
    expected = run(rope, *tokens())
    try:
        anneal.begin(0, 0)
        started = loaded(build(FOLD | gradual, **settings), weights, fold=True)
        torch.testing.assert_close(run(started, *tokens()), expected, rtol=0, atol=2e-5)
        anneal.advance(2, [started])
        assert (run(started, *tokens()) - expected).abs().max() > 1e-3
        anneal.advance(4, [started])
        plain = loaded(build({"pad_value": "0,1"}, **settings), weights, fold=False)
        torch.testing.assert_close(run(started, *tokens()), run(plain, *tokens()), rtol=0, atol=1e-5)
    finally:
        anneal.begin(0, 0)


def test_a_norm_that_multiplies_by_1_plus_its_weight() -> None:
    """Transformer Engine's; Megatron's other norms refuse it."""
    from types import SimpleNamespace

    from megatron_fope.formula.folding import fold

    weight, factors = torch.randn(16), torch.rand(16)
    for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p"):
        config = SimpleNamespace(**{name: True})
        folded = fold("q_layernorm.weight", weight, factors, config)
        torch.testing.assert_close(1 + folded, (1 + weight) * factors)
        assert torch.equal(fold("q_layernorm.bias", weight, factors, config), weight * factors)


def test_nothing_to_fold_into() -> None:
    from megatron_fope import UserError
    from megatron_fope.formula.folding import fold_factors
    from megatron_fope.formula.geometry import Geometry

    config = gpt(qk_l2_norm=True).config
    with pytest.raises(UserError, match=r"--fope-fold-padding is given with --qk-l2-norm, behind which no w"):
        fold_factors(config, Geometry(fope_config(**FOLD), 16, 2), 2)
    with pytest.raises(UserError, match=r"--fope-pad-value is '0,1'; allowed: 1,1 with --fope-fold-padding"):
        fope_config(pad_value="0,1", fold_padding=True)
