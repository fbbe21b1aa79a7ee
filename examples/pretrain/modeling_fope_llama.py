"""Llama with Fourier Position Embedding (FoPE, arXiv 2412.17739) for transformers 4.56 to 5.

Travels with the weights that ``export.py`` of megatron-fope writes and needs nothing of that package::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

``config.json`` holds, beside Llama's entries, ``fope_inv_freq`` (radians per position; the D_in frequencies),
``fope_series`` (D_out, channel pairs with a Fourier series), ``fope_heads`` (KV heads with coefficients of
their own, or 1), ``fope_pad_sin`` and ``fope_pad_cos`` (of the other channel pairs), ``fope_exact_angles``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward


class FopeLlamaConfig(LlamaConfig):
    """Llama's settings and FoPE's, see the top of this file."""

    model_type = "fope_llama"


class FourierBasis(nn.Module):
    """sin and cos of every position times every frequency, made once for all layers; has no tensors."""

    def __init__(self, config: FopeLlamaConfig) -> None:
        super().__init__()
        self.inv_freq = list(config.fope_inv_freq)
        self.dtype = torch.float64 if config.fope_exact_angles else torch.float32

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, s]`` positions to ``(cos, sin)``, each ``[b, s, D_in]`` float32, where ``x`` is."""
        inv_freq = torch.tensor(self.inv_freq, dtype=self.dtype, device=x.device)
        angles = position_ids.to(self.dtype).unsqueeze(-1) * inv_freq
        return angles.cos().float(), angles.sin().float()


class FopeLlamaAttention(LlamaAttention):
    """Llama's attention with queries and keys rotated by Fourier series of its own."""

    def __init__(self, config: FopeLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        shape = (config.fope_heads, len(config.fope_inv_freq), config.fope_series)
        for name in ("sin_coef", "cos_coef"):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def _apply(self, fn, recurse: bool = True):
        # Casting the model (.bfloat16(), .half()) would round the series; they stay float32.
        before = {name: getattr(self, name).data for name in ("sin_coef", "cos_coef")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype and not value.is_meta:
                tensor.data = value.to(tensor.device)
        return self

    def tables(self, cos_basis: Tensor, sin_basis: Tensor) -> tuple[Tensor, Tensor]:
        """The basis of :class:`FourierBasis` to ``(cos, sin)``, each ``[b, H, s, head_dim / 2]`` float32."""
        with torch.autocast(cos_basis.device.type, enabled=False):
            cos = torch.einsum("bsi,hij->bhsj", cos_basis, self.cos_coef)
            sin = torch.einsum("bsi,hij->bhsj", sin_basis, self.sin_coef)
        padding = (0, self.head_dim // 2 - cos.size(-1))
        cos = F.pad(cos, padding, value=self.config.fope_pad_cos)
        return cos, F.pad(sin, padding, value=self.config.fope_pad_sin)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate ``[b, heads, s, head_dim]``; heads that share a table lie side by side."""
        groups = cos.size(1)
        first, second = x.float().unflatten(1, (groups, -1)).chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.flatten(1, 2).to(x.dtype)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        """Like Llama's; ``position_embeddings`` is what :class:`FourierBasis` returns."""

        def heads(projection: nn.Linear) -> Tensor:
            return projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        tables = self.tables(*position_embeddings)
        query, key = self.rotate(heads(self.q_proj), *tables), self.rotate(heads(self.k_proj), *tables)
        value = heads(self.v_proj)
        if past_key_values is not None:
            # Static caches of transformers 4 ask where to write.
            where = {"cache_position": kwargs.get("cache_position")}
            key, value = past_key_values.update(key, value, self.layer_idx, where)
        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class FopeLlamaModel(LlamaModel):
    """Llama's layers with :class:`FopeLlamaAttention`."""

    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = ("sin_coef", "cos_coef")

    def __init__(self, config: FopeLlamaConfig) -> None:
        super().__init__(config)
        self.rotary_emb = FourierBasis(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = FopeLlamaAttention(config, index)
        self.post_init()


class FopeLlamaForCausalLM(LlamaForCausalLM):
    """A language model on :class:`FopeLlamaModel`."""

    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = ("sin_coef", "cos_coef")

    def __init__(self, config: FopeLlamaConfig) -> None:
        super().__init__(config)
        self.model = FopeLlamaModel(config)
        self.post_init()
