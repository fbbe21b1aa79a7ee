"""FoPE in multi-latent attention.

Megatron builds these layers on Transformer Engine only; the CPU runtime lets its plain attention serve them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from models import LATENT, POSITIONAL, fope_config, mla_config, mla_model, refused, run, since, tokens

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]


def test_mla_with_identity_coefficients_equals_megatrons_own() -> None:
    from megatron_fope import assert_fope_active

    model = mla_model(fope_config(clip=False, drop_clipped=False, init="eye"))
    assert [r.attention for r in assert_fope_active(model)] == ["FoPEMLASelfAttention"] * 2
    ours = run(model, *tokens())
    torch.testing.assert_close(ours, run(mla_model(), *tokens()), rtol=0, atol=2e-5)
    assert (ours - run(mla_model(fope_config(gain=1.0)), *tokens())).abs().max() > 1e-2


def test_mla_rotates_the_positional_channels_by_the_formula() -> None:
    """All heads by one set of coefficients; the other channels and the values stay as they are."""
    from megatron_fope.formula.functional import apply_fourier_rotary, fourier_basis
    from megatron_fope.formula.geometry import Geometry

    fope = fope_config(gain=1.0)
    attention = mla_model(fope).decoder.layers[1].self_attention
    hidden = torch.randn(20, 2, 64)
    plain = super(type(attention), attention).get_query_key_value_tensors(hidden)
    rotated = attention.get_query_key_value_tensors(hidden)
    geometry = Geometry(fope, POSITIONAL)
    basis = fourier_basis(torch.arange(20), geometry.inv_freq)
    sin, cos = geometry.tables(*basis, geometry.make_coefficients(layer=2))
    for before, after in zip(plain[:2], rotated[:2], strict=True):
        expected = apply_fourier_rotary(before[..., -POSITIONAL:], sin[:, None], cos[:, None])
        torch.testing.assert_close(after[..., -POSITIONAL:], expected, rtol=0, atol=2e-6)
        assert torch.equal(after[..., :-POSITIONAL], before[..., :-POSITIONAL])
        assert (after - before).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(plain[2:], rotated[2:], strict=True))


def test_mla_packed_documents_equal_separate_ones() -> None:
    """Also with ``max_seqlen`` of the whole pack, where Megatron's own rotation does not start again."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = mla_model(fope_config(gain=1.0))
    ids, positions = tokens(length=24, batch=1)
    cu_seqlens = torch.tensor([0, 9, 24], dtype=torch.int32)
    for longest in (15, 24):
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        together = model(ids, positions, None, packed_seq_params=packed)
        for start, end in ((0, 9), (9, 24)):
            alone = run(model, ids[:, start:end], positions[:, : end - start])
            torch.testing.assert_close(together[:, start:end], alone, rtol=0, atol=2e-5)


def test_mla_recomputation_gives_the_same_gradients() -> None:
    """Megatron frees query, key and value after the forward pass and makes them again."""
    gradients = []
    for recompute in (
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        model = mla_model(fope_config(learnable=True), **recompute)
        model.train()
        run(model, *tokens()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert any(name.endswith("fope.sin_coef") for name in gradients[0])
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7)


def test_mla_recomputation_keeps_no_more_than_megatrons_own() -> None:
    """Bytes that a step keeps for its backward pass: what is rotated is recomputed with what it came from."""

    def kept(fope: Any) -> int:
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
        model = mla_model(fope, **recompute)
        model.train()
        saved: dict[int, Any] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run(model, *tokens()).square().mean()
        held = [*model.parameters(), *model.buffers()]
        own = {tensor.untyped_storage()._cdata for tensor in held}
        total = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
        loss.backward()
        return total

    most = kept(None)
    assert kept(fope_config()) <= 1.02 * most
    assert kept(fope_config(learnable=True)) <= 1.02 * most


def test_mla_cached_decoding_equals_the_full_forward() -> None:
    """Static batching: a chunk, then token by token; the cache holds rotated keys."""
    from megatron.core.inference.contexts import StaticInferenceContext

    try:
        from megatron.core.inference.utils import InferenceMode

        inference = InferenceMode.active()
    except ImportError:
        inference = contextlib.nullcontext()
    model = mla_model(fope_config(gain=1.0)).eval()
    ids, positions = tokens(length=20)
    steps, prompt = [], 13
    with torch.no_grad():
        whole = run(model, ids, positions)
        with inference:
            context = StaticInferenceContext(2, 64)
            for start, end in ((0, prompt), *((t, t + 1) for t in range(prompt, 20))):
                options = {"inference_context": context, "runtime_gather_output": True}
                steps.append(model(ids[:, start:end], positions[:, start:end], None, **options)[:, -1])
                context.increment_sequence_len_offset(end - start)
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, prompt - 1 :], rtol=0, atol=5e-5)


@since(0, 17)
def test_mla_latent_cache_gets_rotated_keys() -> None:
    """Dynamic batching caches latents beside one rotated key: every row by its token's position."""
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_fope.formula.functional import apply_fourier_rotary, fourier_basis

    model = mla_model(fope_config(gain=1.0), cache_mla_latents=True).eval()
    attention = model.decoder.layers[0].self_attention
    DynamicInferenceContext.TOKEN_ROUNDER = 4  # 64; fits our few tokens
    settings = {"max_sequence_length": 64, "buffer_size_gb": 0.001, "block_size_tokens": 64}
    context = DynamicInferenceContext(
        model_config=model.config,
        inference_config=InferenceConfig(**settings, max_requests=4, max_tokens=64),
    )
    lengths = (5, 6)
    for number, length in enumerate(lengths):
        request = DynamicInferenceRequest(
            request_id=number,
            prompt_tokens=torch.arange(length),
            sampling_params=SamplingParams(num_tokens_to_generate=4),
        )
        context.add_request(request)
    context.initialize_attention_state()
    rows = context.padded_active_token_count
    assert rows > sum(lengths)
    hidden = torch.randn(rows, 1, 64)
    with torch.no_grad():
        plain = super(type(attention), attention).get_query_key_value_tensors(
            hidden, inference_context=context
        )
        rotated = attention.get_query_key_value_tensors(hidden, inference_context=context)
    positions = torch.cat([torch.arange(length) for length in lengths])
    fope = attention.fope
    sin, cos = fope.geometry.tables(*fourier_basis(positions, fope.inv_freq), fope.coefficients())
    used = slice(len(positions))
    assert rotated[1].shape == (rows, 1, LATENT + POSITIONAL)
    assert torch.equal(rotated[1][..., :LATENT], plain[1][..., :LATENT])
    expected = apply_fourier_rotary(plain[0][used, ..., -POSITIONAL:], sin[:, None], cos[:, None])
    torch.testing.assert_close(rotated[0][used, ..., -POSITIONAL:], expected, rtol=0, atol=2e-6)
    expected = apply_fourier_rotary(plain[1][used, :, None, -POSITIONAL:], sin[:, None], cos[:, None])
    torch.testing.assert_close(rotated[1][used, ..., -POSITIONAL:], expected[:, :, 0], rtol=0, atol=2e-6)


@since(0, 17)
def test_mla_refuses_what_it_cannot_rotate() -> None:
    from megatron_fope.layers.attention import check_megatron_config

    refused(lambda: check_megatron_config(mla_config(rope_type="yarn")), "use --rope-type rope")
    refused(lambda: check_megatron_config(mla_config(mla_down_proj_fusion=True)), "--mla-down-proj-fusion")
    dsa = mla_config()
    dsa.experimental_attention_variant = "dsa"
    refused(lambda: check_megatron_config(dsa), "--experimental-attention-variant")
