"""FoPE in real Megatron models: layers, precision, layouts of heads, packed documents, checkpoint keys."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import fope_config, gpt, mla_model, run, tokens, transformer_config

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]


def test_identity_coefficients_equal_megatrons_rope() -> None:
    identity = fope_config(clip=False, drop_clipped=False, init="eye")
    ours = run(gpt(identity), *tokens())
    rope = run(gpt(position="rope"), *tokens())
    none = run(gpt(), *tokens())
    torch.testing.assert_close(ours, rope, rtol=0, atol=2e-5)
    assert (none - rope).abs().max() > 1e-2, "the model must notice positions"


def test_model_uses_the_formula() -> None:
    """Rotated query and key of a real layer against the pure functions."""
    from megatron_fope.formula.functional import apply_fourier_rotary, fourier_basis
    from megatron_fope.formula.geometry import Geometry

    fope = fope_config(gain=2.0)
    attention = gpt(fope, qk_layernorm=True).decoder.layers[1].self_attention
    hidden = torch.randn(20, 2, 64)
    plain = super(type(attention), attention).get_query_key_value_tensors(hidden)
    rotated = attention.get_query_key_value_tensors(hidden)
    geometry = Geometry(fope, 16, 2)
    basis = fourier_basis(torch.arange(20), geometry.inv_freq)
    sin, cos = geometry.tables(*basis, geometry.make_coefficients(layer=2))
    for before, after in zip(plain[:2], rotated[:2], strict=True):
        expected = apply_fourier_rotary(before, sin[:, None], cos[:, None])
        torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
        assert (after - before).abs().max() > 0.1
    assert torch.equal(plain[2], rotated[2]), "values are not rotated"


def test_coefficients_stay_exact_in_sixteen_bit() -> None:
    from megatron.core.transformer.module import Float16Module

    from megatron_fope.formula.geometry import Geometry

    for dtype, flag in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for learnable in (False, True):
            fope = fope_config(learnable=learnable)
            model = gpt(fope, **{flag: True, "params_dtype": dtype})
            wrapped = Float16Module(model.config, model)
            expected = Geometry(fope, 16, 2).make_coefficients(layer=1)
            embedding = wrapped.module.decoder.layers[0].self_attention.fope
            for name, value in expected.items():
                assert getattr(embedding, name).dtype == torch.float32
                assert torch.equal(getattr(embedding, name), value), (flag, learnable, name)
            assert embedding.inv_freq.dtype == torch.float32
            assert wrapped.module.output_layer.weight.dtype == dtype
            assert run(model, *tokens()).dtype == dtype


def test_describe_and_assert_fope_active() -> None:
    from megatron_fope import assert_fope_active, describe
    from megatron_fope.formula.geometry import Geometry

    fope = fope_config()
    first, second = assert_fope_active([gpt(fope)])
    assert first.attention == "FoPESelfAttention" and (first.layer_number, second.layer_number) == (1, 2)
    _, d_in, d_out = Geometry(fope, 16).coefficient_shape
    assert first.coefficients == {"sin_coef": (2, d_in, d_out), "cos_coef": (2, d_in, d_out)}
    assert str(d_in) in str(first) and "PyTorch" in str(first) and "train length 48" in first.summary()
    assert [r.fope for r in describe(gpt(position="rope"))] == [None, None]
    try:
        assert_fope_active(gpt(position="rope"))
    except RuntimeError as error:
        assert "2 of 2 attention layers have no FoPE" in str(error)
    else:
        raise AssertionError("a RoPE model passed")


def test_tensor_parallel_ranks_use_their_heads() -> None:
    """Every rank of TP 2, 4 and 8 on 4 KV heads: more ranks than heads share one."""
    from megatron_fope.layers.embedding import FourierEmbedding

    config = transformer_config(num_attention_heads=8, num_query_groups=4)
    fope = fope_config()
    whole = FourierEmbedding(config, fope, layer=1).sin_coef
    for size in (2, 4, 8):
        for rank in range(size):
            group = SimpleNamespace(rank=lambda r=rank: r, size=lambda n=size: n)
            local = FourierEmbedding(config, fope, layer=1, tp_group=group).coefficients()["sin_coef"]
            heads = [h for h in range(4) if h * size // 4 == rank] if size <= 4 else [rank * 4 // size]
            if size < 4:
                heads = list(range(rank * 4 // size, (rank + 1) * 4 // size))
            assert torch.equal(local, whole[heads]), (size, rank, heads)


def test_layers_without_position_embedding_stay_without() -> None:
    model = gpt(fope_config(), no_rope_freq=[1, 0])
    hidden = torch.randn(8, 1, 64)
    for layer, rotates in zip(model.decoder.layers, (False, True), strict=True):
        attention = layer.self_attention
        plain = super(type(attention), attention).get_query_key_value_tensors(hidden)
        assert torch.equal(plain[0], attention.get_query_key_value_tensors(hidden)[0]) is not rotates
        assert "sin_coef" in attention.fope.state_dict(), "all layers need the same checkpoint keys"


def test_output_gate_is_left_alone() -> None:
    attention = gpt(fope_config(), attention_output_gate=True).decoder.layers[0].self_attention
    hidden = torch.randn(8, 1, 64)
    plain = super(type(attention), attention).get_query_key_value_tensors(hidden, output_gate=True)
    rotated = attention.get_query_key_value_tensors(hidden, output_gate=True)
    assert len(rotated) == 4 and torch.equal(plain[3], rotated[3]) and not torch.equal(plain[0], rotated[0])


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        model = gpt(fope_config(learnable=True), **recompute)
        model.train()
        run(model, *tokens()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert any(name.endswith("fope.sin_coef") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_packed_documents_equal_separate_ones() -> None:
    """A packed batch must give each document the logits it has alone."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = gpt(fope_config(gain=1.0))
    ids, positions = tokens(length=24, batch=1)
    cu_seqlens = torch.tensor([0, 9, 24], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=15, max_seqlen_kv=15
    )
    together = model(ids, positions, None, packed_seq_params=packed)
    for start, end in ((0, 9), (9, 24)):
        alone = run(model, ids[:, start:end], positions[:, : end - start])
        torch.testing.assert_close(together[:, start:end], alone, rtol=0, atol=2e-5)


def test_packed_layers_share_one_basis() -> None:
    """Built once per micro-batch, and again when the lengths are new or overwritten in place."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_fope.formula import functional

    model = gpt(fope_config(gain=1.0))
    ids, positions = tokens(length=24, batch=1)
    built: list[int] = []
    original = functional.fourier_basis
    functional.fourier_basis = lambda *args: built.append(1) or original(*args)
    try:

        def loss(lengths: torch.Tensor) -> torch.Tensor:
            packed = PackedSeqParams("thd", lengths, lengths, max_seqlen_q=15, max_seqlen_kv=15)
            return model(ids, positions, None, packed_seq_params=packed)

        lengths = torch.tensor([0, 9, 24], dtype=torch.int32)
        first = loss(lengths)
        assert len(built) == 1, built
        assert torch.equal(loss(lengths), first) and len(built) == 1
        lengths[1] = 12
        changed = loss(lengths)
        assert len(built) == 2 and not torch.equal(changed, first)
        assert torch.equal(loss(lengths.clone()), changed) and len(built) == 3
    finally:
        functional.fourier_basis = original


def test_sharded_state_is_replicated_and_complete() -> None:
    from megatron_fope.formula.geometry import Geometry

    model = gpt(fope_config())
    state = model.sharded_state_dict()
    entries = {k: v for k, v in state.items() if ".fope." in k}
    assert {k.rsplit(".", 1)[1] for k in entries} == {"sin_coef", "cos_coef"} and len(entries) == 4
    shapes = {tuple(entry.global_shape) for entry in entries.values()}
    _, d_in, d_out = Geometry(fope_config(), 16).coefficient_shape
    assert shapes == {(2, 2, d_in, d_out)}, "layers stacked, heads unsharded"


def test_positional_context_arguments_are_seen() -> None:
    """A caller that passes everything by position must not get wrong positions."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.attention import SelfAttention

    attention = gpt(fope_config()).decoder.layers[0].self_attention
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=5, max_seqlen_kv=5
    )
    names = list(inspect.signature(SelfAttention.forward).parameters)[2:]
    values = [packed if name == "packed_seq_params" else None for name in names]
    hidden = torch.randn(8, 1, 64)
    by_position = attention(hidden, *values[: names.index("packed_seq_params") + 1])[0]
    by_keyword = attention(hidden, None, packed_seq_params=packed)[0]
    assert torch.equal(by_position, by_keyword)
    assert not torch.equal(by_keyword, attention(hidden, None)[0])


def test_evaluation_in_inference_mode_does_not_poison_training() -> None:
    model = gpt(fope_config(train_length=50, learnable=True))
    ids, positions = tokens(length=17)
    with torch.inference_mode():
        run(model, ids, positions)
    run(model, ids, positions).square().mean().backward()


def test_layers_whose_buffers_are_written_back() -> None:
    """What Megatron's graph runner does to a layer between the captures of its forward and backward pass."""
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    for build, settings in ((gpt, {}), (mla_model, {}), (mla_model, recompute)):
        found = []
        for written in (False, True):
            model = build(fope_config(), **settings)
            model.train()
            logits = run(model, *tokens())
            if written:
                for buffer in model.buffers():
                    buffer.copy_(buffer.clone())
            logits.square().mean().backward()
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), build


def test_threads_have_their_own_positions() -> None:
    """Two threads inside the same layer at the same moment, with other documents."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = gpt(fope_config(gain=1.0))
    ids, positions = tokens(length=24, batch=1)

    def logits(cut: int) -> Any:
        lengths = torch.tensor([0, cut, 24], dtype=torch.int32)
        packed = PackedSeqParams("thd", lengths, lengths, max_seqlen_q=24, max_seqlen_kv=24)
        with torch.no_grad():
            return model(ids, positions, None, packed_seq_params=packed)

    cuts = (3, 10, 17)
    expected = [logits(cut) for cut in cuts]
    found: dict[int, Any] = {}
    together = threading.Barrier(len(cuts), timeout=60)

    def wait(*_: Any) -> None:
        together.wait()

    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.register_forward_hook(wait)

    def work(cut: int) -> None:
        found[cut] = logits(cut)

    threads = [threading.Thread(target=work, args=(cut,)) for cut in cuts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cut, alone in zip(cuts, expected, strict=True):
        torch.testing.assert_close(found[cut], alone, rtol=0, atol=1e-6)
