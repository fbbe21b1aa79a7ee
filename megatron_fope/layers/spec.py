"""``with_fope``: any Megatron layer spec, with FoPE in its self-attention."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from megatron.core.transformer.attention import Attention, CrossAttention, SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.layers.attention import FoPEAttention, FoPESelfAttention
from megatron_fope.layers.mla import FoPEMLASelfAttention

_CONVERSIONS = {SelfAttention: FoPESelfAttention, MLASelfAttention: FoPEMLASelfAttention}


def with_fope(spec: Any, config: FoPEConfig) -> Any:
    """A copy of a layer spec in which self-attention rotates by Fourier series.

    Works on everything Megatron builds layers from: a layer's ``ModuleSpec``, a block's submodules with a
    list of layers, hybrid stacks, multi-token-prediction blocks; local and Transformer Engine layers, dense
    and mixture of experts, multi-latent attention. The original is never changed: Megatron shares specs
    between models and keeps some as module globals.

    Args:
        spec: the spec to convert.
        config: FoPE's settings.

    Returns:
        The converted copy, of the same type as ``spec``.

    Raises:
        UserError: an attention class that cannot be converted, a spec without any attention, one that has
            FoPE with other settings, or an unsupported Megatron-Core.
    """
    compat.require_megatron_core()
    converter = _Converter(config)
    converted = converter.convert(spec)
    if not converter.num_attentions:
        raise UserError("with_fope: the layer spec holds no self-attention to convert")
    return converted


class _Converter:
    def __init__(self, config: FoPEConfig) -> None:
        self.config = config
        # Multi-token-prediction layers are numbered from 1 again; the stack keeps them from repeating the
        # decoder's coefficients.
        self.stack = "decoder"
        self.num_attentions = 0
        # A hybrid stack's spec is a menu of layers; which are used is only known when the model is built.
        self._optional = False
        self._done: dict[tuple[int, str], Any] = {}  # a spec used twice is converted once and stays shared
        self._originals: list[Any] = []  # keeps ids in _done valid

    def convert(self, node: Any) -> Any:
        key = (id(node), self.stack)
        if key in self._done:
            return self._done[key]
        if isinstance(node, type) or node is None:
            self._check_bare_class(node)
            return node
        converted = self._convert_node(node)
        if converted is not node:
            self._done[key] = converted
            self._originals.append(node)
        return converted

    def _convert_node(self, node: Any) -> Any:
        if isinstance(node, ModuleSpec):
            return self._convert_module_spec(node)
        if isinstance(node, list):
            return [self.convert(item) for item in node]
        if isinstance(node, tuple) and type(node) is tuple:
            return tuple(self.convert(item) for item in node)
        if isinstance(node, functools.partial):
            self._check_bare_class(node.func)
            keywords = {name: self.convert(value) for name, value in node.keywords.items()}
            return functools.partial(node.func, *[self.convert(a) for a in node.args], **keywords)
        if dataclasses.is_dataclass(node) and not isinstance(node, FoPEConfig):
            converted = copy.copy(node)
            outer = self.stack
            if isinstance(node, MultiTokenPredictionBlockSubmodules):
                self.stack = "mtp"
            for field in dataclasses.fields(node):
                object.__setattr__(converted, field.name, self.convert(getattr(node, field.name)))
            self.stack = outer
            return converted
        return node

    def _convert_module_spec(self, spec: ModuleSpec) -> ModuleSpec:
        converted = copy.copy(spec)
        module = import_module(spec.module) if isinstance(spec.module, tuple) else spec.module
        if isinstance(module, type) and (module in _CONVERSIONS or issubclass(module, FoPEAttention)):
            previous = (spec.params or {}).get("fope", self.config)
            if previous != self.config:
                raise UserError("with_fope: the layer spec has FoPE with other settings already")
            converted.module = _CONVERSIONS.get(module, spec.module)
            converted.params = {**(spec.params or {}), "fope": self.config, "fope_stack": self.stack}
            self.num_attentions += 1
        else:
            self._check_bare_class(module)
        optional, self._optional = self._optional, self._optional or module in compat.hybrid_stack_classes()
        converted.submodules = self.convert(spec.submodules)
        self._optional = optional
        return converted

    def _check_bare_class(self, module: Any) -> None:
        """An attention class this package does not know would silently stay without positions."""
        if (
            not self._optional
            and isinstance(module, type)
            and issubclass(module, Attention)
            and not issubclass(module, (FoPEAttention, CrossAttention))
        ):
            raise UserError(
                f"with_fope: {module.__module__}.{module.__qualname__} cannot be converted; "
                "use megatron.core's SelfAttention or MLASelfAttention in a ModuleSpec, or a subclass "
                "of megatron_fope.FoPESelfAttention"
            )
