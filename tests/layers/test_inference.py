"""Inference with FoPE in Megatron's own engines: positions, caches, tokens against the full forward pass.

FlashAttention's kernels do not exist for the CPU. Where Megatron calls them (flash decode and dynamic
batching), they are replaced by plain attention with the same arguments; everything around them is Megatron's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import fope_config, gpt, transformer_config

pytestmark = pytest.mark.launch


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[
        pytest.param(2, id="tp2", marks=pytest.mark.ranks(2)),
        pytest.param(1, id="tp1", marks=pytest.mark.ranks(1)),
    ],
)
def tensor_parallel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test with two tensor-parallel ranks, and with one."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=request.param)
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()


PROMPTS = ("fope", "a longer prompt", "of three")
NEW_TOKENS = 10
GREEDY = {"top_k": 1, "num_tokens_to_generate": NEW_TOKENS, "return_log_probs": True}
ATOL = 5e-5
"""Noise of float32: other shapes sum in another order."""


def model(position: str = "fope", **overrides: Any) -> Any:
    """A GPT of three layers with random weights; RoPE's twin for ``position="rope"``."""
    from megatron.core import parallel_state

    settings = {
        "num_layers": 3,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        **overrides,
    }
    if position == "fope":
        return gpt(fope_config(gain=1.0), **settings).eval()
    return gpt(position=position, **settings).eval()


def inference_mode() -> Any:
    """Megatron's switch for code that serves; 0.17 looks at ``module.training``."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def full_logits(network: Any, ids: list[int]) -> Any:
    """Logits ``[s, vocabulary]`` of one sequence in one ordinary forward pass."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return network(tokens, torch.arange(len(ids))[None], None, runtime_gather_output=True)[0]


class Letters:
    """A tokenizer: one token per character."""

    vocab_size, eod, bos = 128, 0, None

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def detokenize(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, tokens))


def assert_decoded(network: Any, prompt: str, generated: list[int], log_probs: list[float]) -> None:
    """What an engine generated against one full forward pass over the finished sequence."""
    ids = Letters().tokenize(prompt)
    assert len(generated) == len(log_probs) == NEW_TOKENS, (generated, log_probs)
    logits = full_logits(network, ids + generated)[len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == generated, "not the most likely tokens"
    expected = logits.log_softmax(-1).gather(1, torch.tensor(generated)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=ATOL)


def static_engine(network: Any) -> Any:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    wrapper = GPTInferenceWrapper(network, StaticInferenceContext(len(PROMPTS), 64))
    return StaticInferenceEngine(TextGenerationController(wrapper, Letters()), legacy=True)


def test_static_engine_decodes_like_the_full_forward() -> None:
    """Megatron's engine on prompts of different lengths: prefill up to the shortest, then token by token."""
    from megatron.core.inference.sampling_params import SamplingParams

    for position in ("fope", "rope"):
        network = model(position)
        sampling = SamplingParams(**GREEDY)
        sampling.no_early_termination = True
        for request in static_engine(network).generate(prompts=list(PROMPTS), sampling_params=sampling):
            assert_decoded(
                network, request.prompt, request.generated_tokens.tolist(), request.generated_log_probs
            )


def attend(query: Any, key: Any, value: Any, scale: float | None) -> Any:
    """Causal attention of the last ``s`` tokens: ``[s, heads, d]`` on ``[t, KV heads, d]``."""
    repeats = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
    scores = query.transpose(0, 1) @ key.transpose(1, 2) * (scale or query.size(-1) ** -0.5)
    future = torch.ones(scores.shape[1:], dtype=torch.bool).tril(key.size(1) - query.size(0)).logical_not()
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value).transpose(0, 1)


def attend_packed(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *_: Any, block_table: Any, **options: Any
) -> Any:
    """``flash_attn_varlen_func`` on a paged cache; rows without a request get NaN instead of garbage."""
    out = torch.full_like(query, float("nan"))
    for i, table in enumerate(block_table):
        rows, length = slice(cu_q[i], cu_q[i + 1]), cu_k[i + 1] - cu_k[i]
        if length:
            k, v = (x[table].flatten(0, 1)[:length] for x in (key, value))
            out[rows] = attend(query[rows], k, v, options["softmax_scale"])
    return out


def attend_cached(
    q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, k: Any = None, v: Any = None, **options: Any
) -> Any:
    """``flash_attn_with_kvcache``: appends new keys if given; plain or paged cache."""
    assert options.get("rotary_cos") is None, "the kernel must not rotate again"
    table, out = options.get("block_table"), torch.full_like(q, float("nan"))
    for i, cached in enumerate(cache_seqlens.tolist()):
        if k is not None:
            k_cache[i, cached : cached + k.size(1)], v_cache[i, cached : cached + k.size(1)] = k[i], v[i]
            cached += k.size(1)
        if cached:
            pages = (x[i] if table is None else x[table[i]].flatten(0, 1) for x in (k_cache, v_cache))
            out[i] = attend(q[i], *(x[:cached] for x in pages), options.get("softmax_scale"))
    return out


@contextlib.contextmanager
def stand_ins_for_kernels() -> Any:
    """Megatron's attention finds FlashAttention, in plain PyTorch; its Triton kernel for the cache is off."""
    import megatron.core.transformer.attention as attention
    from megatron.core.inference.contexts import dynamic_context

    names = {
        "flash_attn_varlen_func": attend_packed,
        "flash_attn_with_kvcache": attend_cached,
        "is_fa_min_version": lambda version: True,
        "rearrange": lambda x, pattern: x.flatten(2),
        "HAVE_FA3": False,
        "HAVE_FA4": False,
    }
    replaced = [(attention, name, value) for name, value in names.items() if hasattr(attention, name)]
    replaced += [(dynamic_context, "triton_append_key_value_cache", None)]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)


def dynamic_engine(network: Any, **settings: Any) -> Any:
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    DynamicInferenceContext.TOKEN_ROUNDER = 4  # 64; fits our few tokens
    defaults = {"max_sequence_length": 64, "buffer_size_gb": 0.001, "block_size_tokens": 8, "max_requests": 4}
    context = DynamicInferenceContext(
        model_config=network.config, inference_config=InferenceConfig(**defaults | settings)
    )
    controller = TextGenerationController(GPTInferenceWrapper(network, context), Letters())
    return DynamicInferenceEngine(controller=controller, context=context)


def test_dynamic_engine_decodes_like_the_full_forward() -> None:
    """Megatron's engine: prefill and decode mixed, long prompts in chunks, all with attention's stand-ins."""
    from megatron.core.inference.sampling_params import SamplingParams

    for position in ("fope", "rope"):
        network = model(position)
        for chunked in (False, True):
            settings = {"max_tokens": 12 if chunked else 64, "enable_chunked_prefill": chunked}
            sampling = SamplingParams(**GREEDY, skip_prompt_log_probs=True, termination_id=-1)
            with stand_ins_for_kernels():
                engine = dynamic_engine(network, **settings)
                for request in engine.generate(list(PROMPTS), sampling):
                    request = request.merge()
                    assert_decoded(
                        network, request.prompt, request.generated_tokens, request.generated_log_probs
                    )


def hybrid_model(**overrides: Any) -> Any:
    """Attention and MLP layers of ``HybridModel`` (0.17: ``MambaModel``)."""
    from megatron.core import parallel_state

    from megatron_fope import compat, with_fope
    from megatron_fope.training.hybrid_model import local_stack_spec

    config = transformer_config(
        num_layers=4,
        is_hybrid_model=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **overrides,
    )
    model_class, (spec, *_) = compat.model_classes()[-1]
    torch.manual_seed(3)
    return model_class(
        config,
        **{spec: with_fope(local_stack_spec(config), fope_config(gain=1.0))},
        vocab_size=128,
        max_sequence_length=64,
        hybrid_layer_pattern="*-*-",
    ).eval()


def attention_layers(network: Any) -> dict[int, Any]:
    from megatron_fope import FoPESelfAttention

    modules = [m for m in network.modules() if isinstance(m, FoPESelfAttention)]
    return {m.layer_number: m for m in modules}


def rotated_keys(network: Any, ids: list[int]) -> dict[int, Any]:
    """``[s, KV heads, d]`` by layer: plain keys of one ordinary forward pass, rotated once by the formula."""
    from megatron_fope.formula.functional import apply_fourier_rotary, fourier_basis

    plain = {}

    def remember(attention: Any, args: tuple) -> None:
        key = super(type(attention), attention).get_query_key_value_tensors(args[0])[1]
        basis = fourier_basis(torch.arange(len(ids)), attention.fope.inv_freq)
        sin, cos = attention.fope.geometry.tables(*basis, attention.fope.coefficients())
        plain[attention.layer_number] = apply_fourier_rotary(key, sin[:, None], cos[:, None])[:, 0]

    hooks = [m.register_forward_pre_hook(remember) for m in attention_layers(network).values()]
    full_logits(network, ids)
    for hook in hooks:
        hook.remove()
    return plain


def sequences() -> Any:
    return torch.randint(1, 128, (3, 21), generator=torch.Generator().manual_seed(9))


def test_static_cache_holds_keys_rotated_once() -> None:
    """Prefill, a chunk of several tokens behind it, and single tokens; logits and the cache after each."""
    from megatron.core.inference.contexts import StaticInferenceContext

    ids, positions = sequences(), torch.arange(21)[None]
    future = torch.ones(21, 21).triu(1).bool()[None, None]
    for network in (model(), hybrid_model()):
        whole = torch.stack([full_logits(network, row.tolist()) for row in ids])
        keys = [rotated_keys(network, row.tolist()) for row in ids]
        context = StaticInferenceContext(4, 64)
        context.config.materialize_only_last_token_logits = False
        with torch.no_grad(), inference_mode():
            for start, end in ((0, 9), (9, 15), (15, 16), (16, 17), (17, 21)):
                # Behind the cache Megatron masks nothing by itself, so a chunk needs a mask of its own.
                mask = future[..., start:end, :end] if end - start > 1 else None
                logits = network(
                    ids[:, start:end],
                    positions[:, start:end],
                    mask,
                    inference_context=context,
                    runtime_gather_output=True,
                )
                context.increment_sequence_len_offset(end - start)
                torch.testing.assert_close(logits, whole[:, start:end], rtol=0, atol=ATOL)
                for number in attention_layers(network):
                    cache = context.key_value_memory_dict[number][0]
                    for row, expected in enumerate(keys):
                        torch.testing.assert_close(
                            cache[:end, row], expected[number][:end], rtol=0, atol=ATOL
                        )


def test_flash_decode_takes_positions_from_the_offset_tensor() -> None:
    """Static engine with ``flash_decode``: the layers see Megatron's tensor, and decode rightly with it."""
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_fope.layers.embedding import FourierEmbedding

    original, seen = FourierEmbedding.forward, []

    def forward(self: Any, *args: Any, sequence_len_offset: Any = None, **kwargs: Any) -> Any:
        seen.append(sequence_len_offset)
        return original(self, *args, sequence_len_offset=sequence_len_offset, **kwargs)

    sampling = SamplingParams(**GREEDY)
    sampling.no_early_termination = True
    lengths = [len(prompt) for prompt in PROMPTS]
    steps = [0, *range(min(lengths), max(lengths) + NEW_TOKENS - 1)]
    for network in (model(flash_decode=True), hybrid_model(flash_decode=True)):
        seen.clear()
        FourierEmbedding.forward = forward
        try:
            with stand_ins_for_kernels():
                done = static_engine(network).generate(prompts=list(PROMPTS), sampling_params=sampling)
        finally:
            FourierEmbedding.forward = original
        assert seen[0].dtype == torch.int32
        one_layers = [offset.tolist() for offset in seen[:: len(attention_layers(network))]]
        assert one_layers == [[step] * len(PROMPTS) for step in steps]
        for request in done:
            tokens, log_probs = request.generated_tokens.tolist(), request.generated_log_probs
            assert_decoded(network, request.prompt, tokens, log_probs)


def test_offset_tensor_wins_over_the_contexts_number() -> None:
    """A replayed CUDA graph runs with the tensor's new content and the number of its capture."""
    from types import SimpleNamespace

    from megatron_fope.layers.positions import inference_positions

    captured = SimpleNamespace(is_static_batching=lambda: True, sequence_len_offset=3)
    offset = torch.tensor([3, 3], dtype=torch.int32)
    first = inference_positions(2, captured, sequence_len_offset=offset)
    offset += 4
    assert first.tolist() == [3, 4]
    assert inference_positions(2, captured, sequence_len_offset=offset).tolist() == [7, 8]
    offset[1] = 0
    try:
        inference_positions(2, captured, sequence_len_offset=offset)
    except ValueError as error:
        assert "[7, 0]" in str(error)
    else:
        raise AssertionError("sequences with different offsets were accepted")


def dynamic_steps(network: Any, **settings: Any) -> Any:
    """The engine's context at every forward pass, while three requests of different lengths are served."""
    from megatron.core.inference.sampling_params import SamplingParams

    with stand_ins_for_kernels():
        engine = dynamic_engine(network, **settings)
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(
                number, prompt, SamplingParams(top_k=1, num_tokens_to_generate=NEW_TOKENS, termination_id=-1)
            )
        while engine.has_unfinished_requests():
            engine.step_modern()
            yield engine.context


def test_dynamic_positions_are_those_of_megatrons_rope() -> None:
    """What Megatron's RoPE looks up for queries and for keys, in the same context: prefill, mixed, decode."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer.attention import Attention

    from megatron_fope.layers.positions import inference_positions

    looked_up: list[Any] = []
    rotate = dynamic_context.apply_rotary_pos_emb
    adjust = Attention._adjust_key_value_for_inference

    def record(t: Any, freqs: Any, *args: Any, **kwargs: Any) -> Any:
        looked_up.append(freqs.flatten())
        return t

    def compare(self: Any, context: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        table = torch.arange(64)[:, None, None, None]
        looked_up.clear()
        cp_group = self.pg_collection.cp
        context.apply_rotary_emb_query(query.clone(), table, self.config, None, cp_group)
        context.apply_rotary_emb_key(key.clone(), table, self.config, cp_group)
        rows, active = query.size(0), context.active_token_count
        if hasattr(context, "gpu_view"):  # the context's own field is the host's, not what a GPU may read
            context.token_to_pos_ids.fill_(-1)
        ours = inference_positions(rows, context)
        assert torch.equal(ours, looked_up[0]) and torch.equal(ours[:active], looked_up[1][:active])
        shapes.add((active, rows))
        if hasattr(context, "gpu_view"):
            context.token_to_pos_ids[:rows] = ours
        return adjust(self, context, query, key, *args, **kwargs)

    shapes: set[tuple[int, int]] = set()
    network = model()
    dynamic_context.apply_rotary_pos_emb, Attention._adjust_key_value_for_inference = record, compare
    try:
        for _ in dynamic_steps(network, max_tokens=12, enable_chunked_prefill=True):
            pass
    finally:
        dynamic_context.apply_rotary_pos_emb, Attention._adjust_key_value_for_inference = rotate, adjust
    assert any(active < rows for active, rows in shapes), "no step had rows beyond the active tokens"
    assert len({active for active, _ in shapes}) > 3, shapes


def test_dynamic_cache_holds_keys_rotated_once() -> None:
    """Block by block after every step; the stand-ins put NaN into rows beyond the active tokens."""
    network, held = model(), 0
    expected = [rotated_keys(network, Letters().tokenize(prompt)) for prompt in PROMPTS]
    for context in dynamic_steps(network, max_tokens=64):
        for row in range(context.paused_request_count, context.total_request_count):
            request = int(context.request_ids[row])
            length = min(int(context.request_kv_length_offsets[row]), len(PROMPTS[request]))
            blocks = context.request_to_kv_block_ids[row]
            blocks = blocks[blocks >= 0].long()
            for number, keys in expected[request].items():
                cache = context.memory_buffer[0, number - 1, blocks].flatten(0, 1)[:length]
                torch.testing.assert_close(cache, keys[:length], rtol=0, atol=ATOL)
            held += length
    assert held > 3 * sum(map(len, PROMPTS)), "the steps were not looked at"


def test_rows_beyond_the_active_tokens_do_no_harm() -> None:
    """Whatever stands in them, the other rows' queries and keys stay the same."""
    from types import SimpleNamespace

    embedding = attention_layers(model())[1].fope
    positions = torch.tensor([4, 5, 0, 63, 1 << 40])
    view = SimpleNamespace(token_to_pos_ids=positions)
    context = SimpleNamespace(is_static_batching=lambda: False, gpu_view=view)
    query, key = torch.randn(5, 1, 4, 16), torch.randn(5, 1, 2, 16)
    query[3:], key[3:] = float("nan"), float("inf")
    rotated = embedding(query, key, inference_context=context)
    alone = embedding(query[:3], key[:3], inference_context=context)
    for together, expected in zip(rotated, alone, strict=True):
        # Within rounding: a matrix product of fewer rows may sum in another order.
        torch.testing.assert_close(together[:3], expected, rtol=0, atol=ATOL)
        assert expected.isfinite().all()
