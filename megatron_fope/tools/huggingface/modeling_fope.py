"""Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE with FoPE (Fourier Position Embedding, 2412.17739).

For transformers from 5.1; travels with exported weights and needs nothing else of megatron-fope::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

``config.json`` is the family's own with one more entry, ``fope``:

- ``inv_freq``: the D_in frequencies, radians per position; ``num_series``: D_out, the channel pairs that get
  a Fourier series; ``num_heads``: KV heads with coefficients of their own, or 1;
- ``pad_sin``, ``pad_cos``: of the other channel pairs, ``attention_scaling`` multiplied in;
- ``attention_scaling``: factor of both tables; ``normalize``: divide coefficients by their sum over D_in;
- ``separate_basis``: whether cos has coefficients of its own; ``exact_angles``: angles in float64;
- ``learnable``: whether optimizers move the coefficients, which otherwise are buffers.

Every layer has ``self_attn.sin_coef`` and ``cos_coef`` (``fourier_coef`` without ``separate_basis``), float32
``[num_heads, D_in, D_out]``; those of a new model are the identity.

Scores depend on absolute positions: those of tokens behind left padding must start at 0, and are derived so
from ``attention_mask`` when ``position_ids`` are not given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

SERVING_ENGINES = ("vllm", "sglang")
"""Attention functions of engines that give every parameter the model's dtype, and train none."""
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"
"""This release's name of the cache. Where it is the older one, ``cache`` is for the attention function."""


@torch.compiler.assume_constant_result
def shortens_products(device_type: str) -> bool:
    """Whether PyTorch may multiply float32 matrices on a device with fewer bits (TF32, bfloat16)."""
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    try:
        return backend.matmul.fp32_precision not in ("ieee", "none")
    except AttributeError:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() != "highest"


def series(basis: Tensor, coefficients: Tensor) -> Tensor:
    """``[b, s, D_in] x [H, D_in, D_out] -> [b, H, s, D_out]``, exact to float32."""
    with torch.autocast(basis.device.type, enabled=False):
        if shortens_products(basis.device.type):
            return torch.einsum("bsi,hij->bhsj", basis.double(), coefficients.double()).float()
        return torch.einsum("bsi,hij->bhsj", basis, coefficients)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[b, heads, s, head_dim]`` by ``[b, H, s, head_dim / 2]``; neighbours share a table."""
    first, second = x.float().unflatten(1, (cos.size(1), -1)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(1, 2).to(x.dtype)


class FourierBasis(nn.Module):
    """sin and cos of every position times every frequency, made once for all layers."""

    inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fope = config.fope
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """``[D_in]`` of ``config.json``."""
        dtype = torch.float64 if self.fope["exact_angles"] else torch.float32
        return torch.tensor(self.fope["inv_freq"], dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Neither a cast (.bfloat16()) nor .to_empty() may change them.
        super()._apply(fn, recurse)
        self.inv_freq = self.frequencies(self.inv_freq.device)
        return self

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, s]`` positions to ``(cos, sin)``, each ``[b, s, D_in]`` float32, where ``x`` is."""
        inv_freq = self.inv_freq.to(x.device)
        angles = position_ids.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
        return angles.cos().float(), angles.sin().float()


class FopeAttention(nn.Module):
    """Before a family's attention in the bases: queries and keys are rotated by Fourier series."""

    config: Any
    head_dim: int
    mesh: Any = None
    """Ranks that share the heads, where transformers splits layers without DTensor."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        separate = config.fope["separate_basis"]
        self.coefficient_names = ("sin_coef", "cos_coef") if separate else ("fourier_coef",)
        for name in self.coefficient_names:
            if config.fope["learnable"] and config._attn_implementation not in SERVING_ENGINES:
                self.register_parameter(name, nn.Parameter(self.identity()))
            else:
                self.register_buffer(name, self.identity())

    def identity(self) -> Tensor:
        """``[num_heads, D_in, D_out]``: series ``j`` is frequency ``j``."""
        fope = self.config.fope
        eye = torch.eye(len(fope["inv_freq"]), fope["num_series"], dtype=torch.float32)
        return eye.repeat(fope["num_heads"], 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting the model (.bfloat16(), .half()) would round the series; they stay float32.
        before = {name: getattr(self, name).detach() for name in self.coefficient_names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype:
                tensor.data = value.to(tensor.device)
        return self

    def heads_of_rank(self, heads: int) -> slice:
        """Which coefficients belong to the ``heads`` KV heads that this rank computes.

        Raises:
            ValueError: it computes a part of them, and nothing says which.
            NotImplementedError: the coefficients would get gradients of a part of the heads.
        """
        total = self.config.num_key_value_heads
        if heads == total:
            return slice(None)
        if torch.is_grad_enabled() and getattr(self, self.coefficient_names[0]).requires_grad:
            raise NotImplementedError(
                "learnable coefficients are not trained with tensor parallelism; use requires_grad_(False)"
            )
        if self.config.fope["num_heads"] == 1:
            return slice(None)
        rank, size = self.tensor_parallel_rank()
        if heads * size == total:
            return slice(rank * heads, (rank + 1) * heads)
        if heads == 1 and size % total == 0:  # neighbouring ranks have copies of a head
            return slice(rank * total // size, rank * total // size + 1)
        raise ValueError(f"rank {rank} of {size} computes {heads} of {total} KV heads; which is not known")

    def tensor_parallel_rank(self) -> tuple[int, int]:
        """This rank and the number of ranks that share the heads.

        Raises:
            ValueError: the layers do not say.
        """
        # vLLM merges the projections, SGLang does not; layers of both know their rank or their group.
        for name in ("qkv_proj", "k_proj", "o_proj"):
            layer: Any = getattr(self, name, None)
            if getattr(layer, "tp_size", 1) > 1:
                return layer.tp_rank, layer.tp_size
            if (group := getattr(layer, "tp_group", None)) is not None:
                return group.rank_in_group, group.world_size
        key_weight = getattr(getattr(self, "k_proj", None), "weight", None)
        mesh = getattr(key_weight, "device_mesh", self.mesh)  # newer releases of transformers: a DTensor
        if mesh is None or mesh.ndim != 1:
            raise ValueError("KV heads are shared among ranks in a way that is not known here")
        return mesh.get_local_rank(), mesh.size()

    def tables(self, cos_basis: Tensor, sin_basis: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """The basis of :class:`FourierBasis` to ``(cos, sin)``, each ``[b, H, s, head_dim / 2]`` float32."""
        fope, part = self.config.fope, self.heads_of_rank(heads)
        coefficients = [getattr(self, name)[part].float() for name in self.coefficient_names]
        if fope["normalize"]:
            coefficients = [value / value.sum(dim=-2, keepdim=True) for value in coefficients]
        cos, sin = series(cos_basis, coefficients[-1]), series(sin_basis, coefficients[0])
        if fope["attention_scaling"] != 1.0:
            cos, sin = cos * fope["attention_scaling"], sin * fope["attention_scaling"]
        padding = (0, self.head_dim // 2 - cos.size(-1))
        return F.pad(cos, padding, value=fope["pad_cos"]), F.pad(sin, padding, value=fope["pad_sin"])

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Like the family's; ``position_embeddings`` is what :class:`FourierBasis` returns."""
        # vLLM reads this source and traces it to find the projections and the attention function: q, k, v one
        # after the other as they are here, one call of a name assigned from ALL_ATTENTION_FUNCTIONS.
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        past_key_values = kwargs.pop(CACHE, past_key_values)
        cos, sin = self.tables(*position_embeddings, key.size(1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
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
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        # Engines return [tokens, heads * head_dim].
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class FopeConfig:
    """Before a family's settings in the bases."""

    def to_dict(self) -> dict[str, Any]:
        """With ``auto_map``, by which transformers finds the classes of this file beside the weights."""
        family = type(self).__name__.removesuffix("Config")
        names = {
            "AutoConfig": f"{family}Config",
            "AutoModel": f"{family}Model",
            "AutoModelForCausalLM": f"{family}ForCausalLM",
            "AutoModelForSequenceClassification": f"{family}ForSequenceClassification",
        }
        settings = super().to_dict()  # type: ignore[misc]  # the family's
        return settings | {"auto_map": {key: f"modeling_fope.{name}" for key, name in names.items()}}


class FopePreTrained(hf.PreTrainedModel):
    """Before every model of a family in the bases."""

    _keep_in_fp32_modules_strict = ("sin_coef", "cos_coef", "fourier_coef")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FourierBasis):
            init.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, FopeAttention):
            for name in module.coefficient_names:
                init.copy_(getattr(module, name), module.identity())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the class's file; the layers of experts are in the family's.
        family: Any = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return family._can_set_experts_implementation()

    @property
    def _device_mesh(self) -> Any:
        return self.__dict__.get("tensor_parallel_mesh")

    @_device_mesh.setter
    def _device_mesh(self, mesh: Any) -> None:
        # transformers tells the whole model only, the attention layers need it.
        self.__dict__["tensor_parallel_mesh"] = mesh
        for module in self.modules():
            if isinstance(module, FopeAttention):
                module.mesh = mesh


class FopeModel(FopePreTrained):
    """Before a family's base model in the bases: its layers with the attention of this file."""

    attention_class: type[FopeAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rotary_emb = FourierBasis(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like the family's; without ``position_ids``, a mask ``[b, cached + s]`` says which tokens count.

        Raises:
            ValueError: the mask covers fewer tokens than the cache and the input hold.
        """
        past_key_values = kwargs.pop(CACHE, past_key_values)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            tokens: Any = inputs_embeds if input_ids is None else input_ids
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            end = start + tokens.size(1)
            if attention_mask.size(1) < end:
                raise ValueError(
                    f"attention_mask covers {attention_mask.size(1)} tokens, cache and input hold {end}; "
                    "use a mask of all of them or position_ids"
                )
            counted = attention_mask[:, :end].long().cumsum(-1) - 1
            position_ids = counted.clamp(min=0)[:, start:]
        kwargs |= {"inputs_embeds": inputs_embeds, CACHE: past_key_values}
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class FopeForCausalLM(FopePreTrained):
    """Before a family's language model in the bases."""

    model_class: type[FopeModel]

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):  # what it makes is replaced
            super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class FopeLlamaConfig(FopeConfig, hf.LlamaConfig):
    model_type = "fope_llama"


class FopeLlamaAttention(FopeAttention, LlamaAttention): ...


class FopeLlamaModel(FopeModel, hf.LlamaModel):
    attention_class = FopeLlamaAttention


class FopeLlamaForCausalLM(FopeForCausalLM, hf.LlamaForCausalLM):
    model_class = FopeLlamaModel


class FopeLlamaForSequenceClassification(FopePreTrained, hf.LlamaForSequenceClassification): ...


class FopeQwen2Config(FopeConfig, hf.Qwen2Config):
    model_type = "fope_qwen2"


class FopeQwen2Attention(FopeAttention, Qwen2Attention): ...


class FopeQwen2Model(FopeModel, hf.Qwen2Model):
    attention_class = FopeQwen2Attention


class FopeQwen2ForCausalLM(FopeForCausalLM, hf.Qwen2ForCausalLM):
    model_class = FopeQwen2Model


class FopeQwen2ForSequenceClassification(FopePreTrained, hf.Qwen2ForSequenceClassification): ...


class FopeQwen3Config(FopeConfig, hf.Qwen3Config):
    model_type = "fope_qwen3"


class FopeQwen3Attention(FopeAttention, Qwen3Attention): ...


class FopeQwen3Model(FopeModel, hf.Qwen3Model):
    attention_class = FopeQwen3Attention


class FopeQwen3ForCausalLM(FopeForCausalLM, hf.Qwen3ForCausalLM):
    model_class = FopeQwen3Model


class FopeQwen3ForSequenceClassification(FopePreTrained, hf.Qwen3ForSequenceClassification): ...


class FopeMixtralConfig(FopeConfig, hf.MixtralConfig):
    model_type = "fope_mixtral"


class FopeMixtralAttention(FopeAttention, MixtralAttention):
    @property
    def sliding_window(self) -> int | None:
        return self.config.sliding_window


class FopeMixtralModel(FopeModel, hf.MixtralModel):
    attention_class = FopeMixtralAttention


class FopeMixtralForCausalLM(FopeForCausalLM, hf.MixtralForCausalLM):
    model_class = FopeMixtralModel


class FopeMixtralForSequenceClassification(FopePreTrained, hf.MixtralForSequenceClassification): ...


class FopeQwen3MoeConfig(FopeConfig, hf.Qwen3MoeConfig):
    model_type = "fope_qwen3_moe"
    # Older releases forget to sum over ranks.
    base_model_tp_plan = hf.Qwen3MoeConfig.base_model_tp_plan | {"layers.*.mlp.experts": "moe_tp_experts"}


class FopeQwen3MoeAttention(FopeAttention, Qwen3MoeAttention): ...


class FopeQwen3MoeModel(FopeModel, hf.Qwen3MoeModel):
    attention_class = FopeQwen3MoeAttention


class FopeQwen3MoeForCausalLM(FopeForCausalLM, hf.Qwen3MoeForCausalLM):
    model_class = FopeQwen3MoeModel


class FopeQwen3MoeForSequenceClassification(FopePreTrained, hf.Qwen3MoeForSequenceClassification): ...


for config, base, causal, classifier in (
    (FopeLlamaConfig, FopeLlamaModel, FopeLlamaForCausalLM, FopeLlamaForSequenceClassification),
    (FopeQwen2Config, FopeQwen2Model, FopeQwen2ForCausalLM, FopeQwen2ForSequenceClassification),
    (FopeQwen3Config, FopeQwen3Model, FopeQwen3ForCausalLM, FopeQwen3ForSequenceClassification),
    (FopeMixtralConfig, FopeMixtralModel, FopeMixtralForCausalLM, FopeMixtralForSequenceClassification),
    (FopeQwen3MoeConfig, FopeQwen3MoeModel, FopeQwen3MoeForCausalLM, FopeQwen3MoeForSequenceClassification),
):
    hf.AutoConfig.register(config.model_type, config, exist_ok=True)
    config.register_for_auto_class()
    for auto, model in (
        (hf.AutoModel, base),
        (hf.AutoModelForCausalLM, causal),
        (hf.AutoModelForSequenceClassification, classifier),
    ):
        model.config_class = config
        auto.register(config, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)  # save_pretrained copies this file
    if experts := get_checkpoint_conversion_mapping(config.model_type.removeprefix("fope_")):
        register_checkpoint_conversion_mapping(config.model_type, experts, overwrite=True)
