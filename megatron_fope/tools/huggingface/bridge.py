"""Megatron-Bridge: ``AutoBridge`` reads and writes exported FoPE folders, providers build FoPE models.

::

    from megatron_fope.tools.huggingface import bridge

    bridge.register()
    auto = AutoBridge.from_hf_pretrained(folder, trust_remote_code=True)
    provider = auto.to_megatron_provider()

Tested with Megatron-Bridge 0.6.2. Its bridges for Llama, Qwen2 and Qwen3 do the work; this module adds the
settings, which come from the folder, and the coefficients.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from megatron_fope.formula.config import FoPEConfig
from megatron_fope.tools.huggingface.config_json import fope_of


def register() -> None:
    """Make ``AutoBridge`` know FoPE folders until the process ends; once is enough.

    Raises:
        ImportError: Megatron-Bridge, or a package that it needs, is missing.
    """
    _register()


def __getattr__(name: str) -> Any:
    if name == "FopeModelProvider":  # by this name, configurations that Bridge stored find the class again
        return _provider_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _register() -> None:
    provider_class = _provider_class()
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.conversion.param_mapping import ColumnParallelMapping, ReplicatedMapping
    from megatron.bridge.models.llama.llama_bridge import LlamaBridge
    from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
    from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
    from megatron.core.models.gpt import GPTModel

    class WithFope:
        """Before a family's bridge in the bases."""

        hf_config: Any

        def provider_bridge(self, hf_pretrained: Any) -> Any:
            provider = super().provider_bridge(hf_pretrained)  # type: ignore[misc]  # the family's
            config = hf_pretrained.config
            fope = fope_of({"fope": config.fope}, f"the folder is {config.name_or_path!r}")
            provider.fope = dataclasses.asdict(fope)
            provider.position_embedding_type = "none"
            provider.apply_rope_fusion = False
            return provider

        def mapping_registry(self) -> Any:
            """The family's, and the coefficients of every layer."""
            fope = fope_of({"fope": self.hf_config.fope}, "the folder")
            # Split by KV head, unless all heads share one set.
            mapping = ColumnParallelMapping if fope.separate_heads else ReplicatedMapping
            coefficients = [
                mapping(
                    megatron_param=f"decoder.layers.*.self_attention.fope.{name}",
                    hf_param=f"model.layers.*.self_attn.{name}",
                )
                for name in fope.coefficient_names
            ]
            return MegatronMappingRegistry(*super().mapping_registry().mappings, *coefficients)  # type: ignore[misc]  # the family's

    register_allowed_target_prefix(__name__)  # so that stored configurations may make the provider
    for family, bridge_class in (("Llama", LlamaBridge), ("Qwen2", Qwen2Bridge), ("Qwen3", Qwen3Bridge)):
        bridge = type(f"Fope{family}Bridge", (WithFope, bridge_class), {})
        MegatronModelBridge.register_bridge(
            source=f"Fope{family}ForCausalLM",
            target=GPTModel,
            provider=provider_class,
            model_type=f"fope_{family.lower()}",
        )(bridge)


@functools.cache
def _provider_class() -> type:
    try:
        from megatron.bridge.models.gpt_provider import GPTModelProvider
    except ImportError as error:
        name = error.name or ""
        if name.startswith("megatron.bridge"):
            raise ImportError(
                "Megatron-Bridge is missing; install it with: pip install megatron-bridge"
            ) from None
        raise ImportError(f"Megatron-Bridge cannot be imported: {error}", name=error.name) from error

    class FopeModelProvider(GPTModelProvider):
        """A provider whose layers have FoPE, whatever layer specification it is given."""

        fope: dict[str, Any] | None = None
        """Fields of a :class:`~megatron_fope.FoPEConfig`; Bridge copies what is here field by field, which
        frozen classes do not let it."""

        def provide(self, *args: Any, **kwargs: Any) -> Any:
            """Build the model.

            Raises:
                ValueError: without settings, with a second position embedding, or with prediction layers.
            """
            if self.fope is None:
                raise ValueError("fope is None; use asdict(FoPEConfig.from_profile(...))")
            if self.position_embedding_type != "none":
                raise ValueError(f"position_embedding_type is {self.position_embedding_type!r}; use 'none'")
            if self.mtp_num_layers:
                raise ValueError(f"mtp_num_layers is {self.mtp_num_layers}; FoPE folders have none")
            given: Any = self.transformer_layer_spec  # type: ignore[has-type]  # a field of the base
            fope = FoPEConfig(**self.fope)
            self.transformer_layer_spec = functools.partial(_layer_spec, given=given, fope=fope)
            try:
                return super().provide(*args, **kwargs)
            finally:
                self.transformer_layer_spec = given

    FopeModelProvider.__module__, FopeModelProvider.__qualname__ = __name__, "FopeModelProvider"
    return dataclasses.dataclass(FopeModelProvider)


def _layer_spec(provider: Any, vp_stage: int | None = None, *, given: Any, fope: FoPEConfig) -> Any:
    """The given specification, or what it returns for this provider, with FoPE."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_fope.layers.spec import with_fope

    if not isinstance(given, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(given).parameters
        given = given(provider, vp_stage=vp_stage) if takes_stage else given(provider)
    return with_fope(given, fope)
