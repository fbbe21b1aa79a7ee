"""Layer specs with FoPE in them, and what Megatron builds from them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import fope_config, gpt, refused, run, since, tokens, transformer_config

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]


def test_with_fope_leaves_the_original_alone() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention

    from megatron_fope import FoPESelfAttention, with_fope

    spec = get_gpt_layer_local_spec()
    before = copy.deepcopy(spec)
    converted = with_fope(spec, fope_config())
    assert list(iterate_modules(spec)) == list(iterate_modules(before))
    assert spec.submodules.self_attention.module is SelfAttention
    assert spec.submodules.self_attention.params == before.submodules.self_attention.params
    attention = converted.submodules.self_attention
    assert attention.module is FoPESelfAttention
    assert attention.params["attn_mask_type"] == before.submodules.self_attention.params["attn_mask_type"]
    assert with_fope(converted, fope_config()).submodules.self_attention.params == attention.params


def test_with_fope_refuses_what_it_cannot_convert() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention

    from megatron_fope import with_fope

    class OwnAttention(SelfAttention):
        pass

    own = get_gpt_layer_local_spec()
    own.submodules.self_attention.module = OwnAttention
    cases = {
        "OwnAttention": lambda: with_fope([get_gpt_layer_local_spec(), own], fope_config()),
        "no self-attention": lambda: with_fope(get_gpt_layer_local_spec().submodules.mlp, fope_config()),
        "other settings": lambda: with_fope(
            with_fope(get_gpt_layer_local_spec(), fope_config()), fope_config(pad_value="0,1")
        ),
    }
    for text, case in cases.items():
        refused(case, text)


@since(0, 17)
def test_with_fope_refuses_absorbed_latent_attention() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_fope import with_fope

    absorbed = get_gpt_layer_local_spec(multi_latent_attention=True)
    absorbed.submodules.self_attention.module = absorbed_mla()
    refused(lambda: with_fope(absorbed, fope_config()), absorbed_mla().__name__)


def absorbed_mla() -> type:
    """DeepSeek's sparse attention stands on this class (0.18 and later)."""
    from megatron.core.transformer import multi_latent_attention

    try:
        from megatron.core.transformer.experimental_attention_variant import absorbed_mla
    except ImportError:
        return multi_latent_attention.FusedMLASelfAttention
    return absorbed_mla.AbsorbedMLASelfAttention


def test_mixture_of_experts_and_block_specs() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_fope import assert_fope_active

    moe = {
        "num_moe_experts": 2,
        "moe_layer_freq": [0, 1],
        "add_bias_linear": False,
        "moe_ffn_hidden_size": 64,
    }
    spec = get_gpt_decoder_block_spec(transformer_config(**moe), use_transformer_engine=False)
    model = gpt(fope_config(), spec=spec, **moe)
    assert len(assert_fope_active(model)) == 2
    assert run(model, *tokens()).isfinite().all()


def test_multi_token_prediction_layers_have_their_own_coefficients() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    from megatron_fope import assert_fope_active, with_fope

    config = transformer_config(mtp_num_layers=1)
    mtp = get_gpt_mtp_block_spec(config, get_gpt_layer_local_spec(), use_transformer_engine=False)
    model = gpt(fope_config(), mtp=with_fope(mtp, fope_config()), mtp_num_layers=1)
    assert len(assert_fope_active(model)) == 3
    drawn = [m.fope.sin_coef for m in model.modules() if type(m).__name__ == "FoPESelfAttention"]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])


def test_hybrid_and_transformer_engine_specs_convert() -> None:
    """Only the specs: the layers themselves need Transformer Engine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.attention import SelfAttention

    from megatron_fope import FoPESelfAttention, compat, with_fope

    specs = []
    for describe in (get_gpt_layer_with_transformer_engine_spec, compat.hybrid_stack_spec):
        # Some releases cannot even describe the layer without Transformer Engine.
        with contextlib.suppress(ImportError, TypeError, AttributeError, NameError, AssertionError):
            specs.append(describe())
    assert specs, "neither spec could be imported"
    for spec in specs:
        converted = with_fope(spec, fope_config())
        assert SelfAttention in iterate_modules(spec) and SelfAttention not in iterate_modules(converted)
        assert FoPESelfAttention in iterate_modules(converted)


def iterate_modules(node: Any) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec

    if isinstance(node, ModuleSpec):
        yield node.module
        yield from iterate_modules(node.submodules)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from iterate_modules(item)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from iterate_modules(getattr(node, field.name))


@since(0, 17)
def test_pattern_of_a_hybrid_model_is_checked() -> None:
    from megatron_fope.layers.attention import check_megatron_config
    from megatron_fope.training import hybrid_model

    def args(pattern: str) -> SimpleNamespace:
        return SimpleNamespace(hybrid_layer_pattern=pattern)

    hybrid_model.check_args(args("*-*E"))
    check_megatron_config(args("M*-"))
    refused(lambda: hybrid_model.check_args(args("M*-")), "mamba_ssm")
    refused(lambda: hybrid_model.check_args(args("G*-")), "fla")
    refused(lambda: check_megatron_config(args("*-+-")), "without +")
    refused(lambda: check_megatron_config(args("*-D-")), "without D")


@since(0, 17)
def test_prediction_layers_of_a_hybrid_model_have_their_own_coefficients() -> None:
    from megatron_fope import assert_fope_active, compat, with_fope
    from megatron_fope.layers.report import layer_list
    from megatron_fope.training.hybrid_model import LOCAL_STACK

    model_class, (spec, *_) = compat.model_classes()[-1]
    model = model_class(
        transformer_config(mtp_num_layers=2),
        **{spec: with_fope(LOCAL_STACK, fope_config())},
        vocab_size=128,
        max_sequence_length=64,
        hybrid_layer_pattern="*-/*-/*-",
    )
    assert len(assert_fope_active(model)) == 3
    assert layer_list(model) == "3 attention layers: decoder 1, mtp 1, 1"
    drawn = [m.fope.sin_coef for m in model.modules() if type(m).__name__ == "FoPESelfAttention"]
    if compat.megatron_version().release >= (0, 18):  # earlier: layers do not know their name
        assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])


def test_layers_without_position_embedding_are_listed() -> None:
    """Cross-attention and what stands in the place of attention: they have none with RoPE either."""
    from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_fope import with_fope
    from megatron_fope.layers.report import layer_list

    spec = with_fope(get_t5_decoder_with_local_block_spec(2), fope_config())
    spec.layer_specs[1] = copy.deepcopy(spec.layer_specs[1])
    spec.layer_specs[1].submodules.self_attention = ModuleSpec(module=linear_attention())
    block = TransformerBlock(transformer_config(num_query_groups=4), spec)
    assert layer_list(block) == (
        "1 attention layers: decoder 1; without position embedding: 2 CrossAttention, 1 LinearAttention"
    )


def linear_attention() -> type:
    class LinearAttention(torch.nn.Module):
        """Stands for gated delta nets, which need a library for GPUs."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

    return LinearAttention


@since(0, 17)
def test_models_that_know_no_fope_refuse_the_type() -> None:
    """T5 and BERT would train without any positions."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.T5.t5_model import T5Model

    from megatron_fope import register, unregister

    config = transformer_config()
    models = {
        "T5": lambda kind: T5Model(config, config, None, None, 128, 64, position_embedding_type=kind),
        "BERT": lambda kind: BertModel(
            config, 0, bert_layer_local_spec, 128, 64, position_embedding_type=kind
        ),
    }
    register(fope_config())
    try:
        for name, build in models.items():
            message = io.StringIO()
            try:
                with contextlib.redirect_stderr(message):
                    build("fope")
            except SystemExit as stopped:
                assert stopped.code == 2
                assert "neither GPTModel nor HybridModel" in message.getvalue(), name
            else:
                raise AssertionError(f"{name} was built")
    finally:
        unregister()
