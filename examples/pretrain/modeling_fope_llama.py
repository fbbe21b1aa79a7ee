"""Llama with Fourier Position Embedding (FoPE, arXiv 2412.17739) for transformers from 5.1.

Travels with the weights that ``export.py`` of megatron-fope writes and needs nothing of that package::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

``config.json`` holds, beside Llama's entries, ``fope_inv_freq`` (radians per position; the D_in frequencies),
``fope_series`` (D_out, channel pairs with a Fourier series), ``fope_heads`` (KV heads with coefficients of
their own, or 1), ``fope_pad_sin`` and ``fope_pad_cos`` (of the other channel pairs), ``fope_exact_angles``,
``fope_learnable`` (the coefficients are trained; otherwise they are buffers, which no optimizer moves).

Attention scores depend on absolute positions: tokens behind left padding need positions that start at 0. They
are derived from ``attention_mask`` when ``position_ids`` are not given.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

if not hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
    raise ImportError("modeling_fope_llama.py requires transformers >= 5.1")

COEFFICIENTS = ("sin_coef", "cos_coef")
CACHE_IS_NAMED_CACHE = "cache" in inspect.signature(LlamaAttention.forward).parameters
"""Newer releases; in older ones ``cache`` is something else: the paged cache, for the attention function."""


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
        for name in COEFFICIENTS:
            value = torch.zeros(shape, dtype=torch.float32)
            if config.fope_learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def _apply(self, fn, recurse: bool = True):
        # Casting the model (.bfloat16(), .half()) would round the series; they stay float32.
        before = {name: getattr(self, name).detach() for name in COEFFICIENTS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype:
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
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Like Llama's; ``position_embeddings`` is what :class:`FourierBasis` returns."""
        if CACHE_IS_NAMED_CACHE:
            past_key_values = past_key_values if cache is None else cache
        elif cache is not None:
            kwargs["cache"] = cache
        # vLLM finds the projections and the call of the attention function in this source: as in Llama's.
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        tables = self.tables(*position_embeddings)
        query, key = self.rotate(query, *tables), self.rotate(key, *tables)
        if past_key_values is not None:
            # Where to write is in kwargs: of static caches in older releases, of paged ones in newer.
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class FopeLlamaModel(LlamaModel):
    """Llama's layers with :class:`FopeLlamaAttention`."""

    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = COEFFICIENTS

    def __init__(self, config: FopeLlamaConfig) -> None:
        super().__init__(config)
        self.rotary_emb = FourierBasis(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = FopeLlamaAttention(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ):
        """Like Llama's; without ``position_ids``, a mask ``[b, cached + s]`` says which tokens count.

        Raises:
            ValueError: the mask covers fewer tokens than the cache and the input hold.
        """
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            tokens = kwargs["inputs_embeds"] if input_ids is None else input_ids
            caches = (kwargs.get(name) for name in ("cache", "past_key_values"))
            start = next((cache.get_seq_length() for cache in caches if cache is not None), 0)
            end = start + tokens.size(1)
            if attention_mask.size(1) < end:
                raise ValueError(
                    f"attention_mask covers {attention_mask.size(1)} tokens, cache and input hold {end}; "
                    "use a mask of all of them or position_ids"
                )
            counted = attention_mask[:, :end].long().cumsum(-1) - 1
            position_ids = counted.clamp(min=0)[:, start:]
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class FopeLlamaForCausalLM(LlamaForCausalLM):
    """A language model on :class:`FopeLlamaModel`."""

    config_class = FopeLlamaConfig
    _keep_in_fp32_modules_strict = COEFFICIENTS

    def __init__(self, config: FopeLlamaConfig) -> None:
        super().__init__(config)
        self.model = FopeLlamaModel(config)
        self.post_init()
