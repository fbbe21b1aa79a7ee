"""Fused attention on queries and keys that FoPE rotated, against float64: one back end, one process.

    python attention_worker.py {torch,te-flash,te-cudnn,te-unfused} RESULT.json

Transformer Engine chooses its back end from environment variables when it is imported, so every back end
needs a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLES = {
    "te-flash": {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
    "te-cudnn": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"},
    "te-unfused": {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "1"},
}
HEAD_DIM = 128
CASES = {
    # name: (query heads, KV heads, lengths of packed documents or one length)
    "16/16 heads": (16, 16, [256]),
    "32/8 heads": (32, 8, [256]),
    "8/1 heads, odd length": (8, 1, [253]),
    "packed": (16, 4, [150, 65, 41]),
}


def main(back_end: str, result: str) -> None:
    """Compare all cases; write ``{case: {tensor: {"error", "rounding"}}}``."""
    os.environ.update(VARIABLES.get(back_end, {}))
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = _torch_attention if back_end == "torch" else _transformer_engine(back_end)
    errors = {name: compare(attention, *case, device) for name, case in CASES.items()}
    Path(result).write_text(json.dumps(errors))


def compare(
    attention: Callable[..., Any], heads: int, kv_heads: int, lengths: list[int], device: Any
) -> dict[str, dict[str, float]]:
    """Relative errors of the output and of the gradients of query, key and value.

    ``rounding`` is the error of the same attention in float64 when only what a bfloat16 kernel must round is
    rounded: the rotated query and key, the output, and the gradients that leave the kernel.
    """
    import torch

    from megatron_fope import FoPEConfig

    fope = FoPEConfig.from_profile("paper", train_length=256, gain=0.3)
    generator = torch.Generator().manual_seed(7)

    def random(count: int) -> Any:
        values = torch.randn(sum(lengths), 1, count, HEAD_DIM, generator=generator)
        return values.to(device, torch.bfloat16)

    inputs = random(heads), random(kv_heads), random(kv_heads)
    grad = random(heads)
    rotate = _embedding(fope, heads, kv_heads, device)
    ours = _with_gradients(
        lambda q, k, v: attention(*rotate(q, k, _packed(lengths, device)), v, lengths), inputs, grad
    )
    coefficients = {name: value.double() for name, value in rotate.coefficients.items()}

    def exact(rounded: bool) -> Any:
        keep = _round_both_ways if rounded else (lambda tensor: tensor)

        def run(query: Any, key: Any, value: Any) -> Any:
            query, key = _rotate_exactly(query, key, fope, coefficients, lengths)
            return keep(_exact_attention(keep(query), keep(key), value, lengths))

        return _with_gradients(run, [tensor.double() for tensor in inputs], grad.double())

    reference, rounded = exact(False), exact(True)
    return {
        name: {"error": _error(a, c), "rounding": _error(b, c)}
        for name, a, b, c in zip(
            ("output", "d query", "d key", "d value"), ours, rounded, reference, strict=True
        )
    }


def _embedding(fope: Any, heads: int, kv_heads: int, device: Any) -> Any:
    """The module that a model has, as a function of query, key and the packed lengths."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_fope.layers.embedding import FourierEmbedding

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=HEAD_DIM,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    module = FourierEmbedding(config, fope, layer=1).to(device)

    def rotate(query: Any, key: Any, packed: Any) -> Any:
        return module(query, key, packed_seq_params=packed)

    rotate.coefficients = module.coefficients()
    return rotate


def _packed(lengths: list[int], device: Any) -> Any:
    """Megatron's parameters of packed documents; None for a single one."""
    if len(lengths) == 1:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = _ends(lengths, device)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _ends(lengths: list[int], device: Any) -> Any:
    import torch

    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def _with_gradients(function: Any, inputs: Any, grad: Any) -> list[Any]:
    import torch

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad.reshape(output.shape))]


def _rotate_exactly(query: Any, key: Any, fope: Any, coefficients: Any, lengths: list[int]) -> Any:
    """The formula in float64 (angles are float32, as published); every document starts at position 0."""
    import torch

    from megatron_fope.formula import functional
    from megatron_fope.formula.geometry import Geometry
    from megatron_fope.kernels.torch_rotary import rotate

    positions = torch.cat([torch.arange(length) for length in lengths]).to(query.device)
    inv_freq = Geometry(fope, HEAD_DIM).inv_freq.to(query.device)
    sin, cos = functional.fourier_basis(positions, inv_freq)
    return rotate(query, key, sin.double(), cos.double(), coefficients, fope)


def _exact_attention(query: Any, key: Any, value: Any, lengths: list[int]) -> Any:
    """Causal attention of every document on its own, ``[t, 1, heads, head_dim]``."""
    import torch

    parts = []
    for q, k, v in zip(*(tensor[:, 0].split(lengths) for tensor in (query, key, value)), strict=True):
        k, v = (tensor.repeat_interleave(q.size(1) // tensor.size(1), dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        ahead = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(parts)[:, None]


def _torch_attention(query: Any, key: Any, value: Any, lengths: list[int]) -> Any:
    """PyTorch's own fused attention, which also runs without a GPU."""
    import torch

    parts = []
    for q, k, v in zip(*(tensor[:, 0].split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)[:, None]


def _transformer_engine(back_end: str) -> Callable[..., Any]:
    from transformer_engine.pytorch import DotProductAttention

    def attention(query: Any, key: Any, value: Any, lengths: list[int]) -> Any:
        packed = len(lengths) > 1
        module = DotProductAttention(
            query.size(2),
            HEAD_DIM,
            num_gqa_groups=key.size(2),
            attention_dropout=0.0,
            qkv_format="thd" if packed else "sbhd",
            attn_mask_type="padding_causal" if packed else "causal",
        )
        if not packed:
            return module(query, key, value)
        ends, longest = _ends(lengths, query.device), max(lengths)
        return module(
            *(tensor[:, 0].contiguous() for tensor in (query, key, value)),
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    return attention


def _round_both_ways(tensor: Any) -> Any:
    """bfloat16 rounding of a tensor and of its gradient."""
    rounded = tensor.bfloat16().to(tensor.dtype)
    result = tensor + (rounded - tensor).detach()
    if result.requires_grad:
        result.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))
    return result


def _error(value: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference; NaN stays NaN."""
    difference = value.detach().double().reshape(reference.shape) - reference.detach()
    return (difference.norm() / reference.detach().norm()).item()


if __name__ == "__main__":
    main(*sys.argv[1:])
