"""The module that holds one layer's Fourier coefficients and rotates its queries and keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.growth import grow_coefficients
from megatron_fope.kernels import cache
from megatron_fope.kernels.backend import Backend, Case, choose
from megatron_fope.kernels.cache import VersionedCache, canonical, forget
from megatron_fope.layers.anneal import Interpolation
from megatron_fope.layers.positions import local_positions
from megatron_fope.layers.precision import KeepsDtype

BASES: VersionedCache[tuple[Tensor, Tensor]] = VersionedCache()
"""The basis of the moment for each of a few models, used by all layers.

Plain positions stay the same from step to step. Others come from tensors: packed documents and position ids
bring new ones with every micro-batch, an inference context writes new values into the same memory in every
step. (Recomputation brings other tensors of the same memory.)
"""

KEEP_INITIAL = object()
"""In place of a coefficient tensor in a state dict: loading it keeps the numbers that the module has."""


@dataclass(frozen=True)
class ToGrow:
    """In place of a coefficient tensor in a state dict: what a model of a shorter training length had."""

    value: Tensor
    fope: FoPEConfig
    """Settings that ``value`` belongs to."""


@dataclass(frozen=True)
class ToFold:
    """In place of a coefficient tensor in a state dict whose weights get the padding's factor folded in."""

    value: Any
    """What would stand there otherwise."""


class FourierEmbedding(KeepsDtype, MegatronModule):
    """FoPE for one attention layer, under any tensor-parallel layout.

    Every rank keeps the coefficients of all KV heads (a few hundred KB per layer) and uses its own slice:
    the checkpoint then holds one replicated tensor that any other layout reads as it is, also when there
    are fewer KV heads than tensor-parallel ranks.

    Args:
        config: the layer's ``TransformerConfig``.
        fope: FoPE's settings.
        layer: global ``layer_number``, from 1.
        stack: "decoder" or "mtp"; see :meth:`Geometry.make_coefficients`.
        tp_group: tensor-parallel process group, or None.
        head_dim: channels of a head that are rotated; None: all of them.
        num_kv_heads: KV heads of the whole model; None: the config's.

    Raises:
        UserError: the settings do not fit the model.
    """

    inv_freq: Tensor

    def __init__(
        self,
        config: Any,
        fope: FoPEConfig,
        *,
        layer: int,
        stack: str = "decoder",
        tp_group: Any = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
    ):
        super().__init__(config)
        self.fope = fope
        self.tp_group = tp_group
        self.geometry = Geometry(
            fope, head_dim or config.kv_channels, num_kv_heads or config.num_query_groups
        )
        self.layer, self.stack = layer, stack
        coefficients = self.initial_tensors()
        self.register_buffer("inv_freq", coefficients.pop("inv_freq"), persistent=False)
        for name, value in coefficients.items():
            if fope.learnable:
                parameter = torch.nn.Parameter(value)
                # Megatron's mark for muP: its size does not grow with the model's width.
                parameter.is_embedding_parameter = True  # type: ignore[attr-defined]
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, value)
        self.interpolation = Interpolation(self.geometry) if fope.anneal_iters else None
        self.folds = False
        """Whether the weights that are being loaded get the padding's factor."""

    def initial_tensors(self) -> dict[str, Tensor]:
        """Frequencies and fresh coefficients."""
        coefficients = self.geometry.make_coefficients(layer=self.layer, stack=self.stack)
        return {"inv_freq": self.geometry.inv_freq, **coefficients}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self.fope.coefficient_names:
            if isinstance(entry := state_dict.get(prefix + name), ToFold):
                state_dict[prefix + name], self.folds = entry.value, True
        self._grow(state_dict, prefix)
        for name in self.fope.coefficient_names:
            if state_dict.get(prefix + name) is KEEP_INITIAL:
                state_dict[prefix + name] = getattr(self, name).detach()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in self.fope.coefficient_names:
            forget(getattr(self, name))

    def _grow(self, state_dict: Any, prefix: str) -> None:
        found = {name: state_dict.get(prefix + name) for name in self.fope.coefficient_names}
        to_grow = {name: value for name, value in found.items() if isinstance(value, ToGrow)}
        if not to_grow:
            return
        grown = grow_coefficients(
            {name: entry.value for name, entry in to_grow.items()},
            dataclasses.replace(self.geometry, config=next(iter(to_grow.values())).fope),
            self.geometry,
            layer=self.layer,
            stack=self.stack,
        )
        state_dict.update({prefix + name: value for name, value in grown.items()})

    def coefficients(self, *, shared: bool = False) -> dict[str, Tensor]:
        """This rank's share: ``{name: [local KV heads, D_in, D_out]}`` (one head when heads share).

        Learnable coefficients get the sum of all tensor-parallel ranks' gradients, because every rank
        holds all heads but only its own heads produce a gradient. Frozen ones come as aliases whose writes
        autograd does not count: Megatron writes a layer's buffers back, unchanged, between the capture of its
        forward and of its backward graph.

        Args:
            shared: where layers share coefficients, return the same memory for all of them.
        """
        local = {name: getattr(self, name) for name in self.fope.coefficient_names}
        if not self.fope.learnable:
            share = shared and self.fope.shared_layers
            local = {k: canonical(v) if share else v.data for k, v in local.items()}
        tp_size = self.tp_group.size() if self.tp_group is not None else 1
        if tp_size == 1:
            return local
        if self.fope.learnable:
            local = {
                k: copy_to_tensor_model_parallel_region(v, group=self.tp_group) for k, v in local.items()
            }
        if not self.fope.separate_heads:
            return local
        heads_per_rank = max(1, self.geometry.num_kv_heads // tp_size)
        start = self.tp_group.rank() * self.geometry.num_kv_heads // tp_size
        return {name: value[start : start + heads_per_rank] for name, value in local.items()}

    def backend(
        self, device: torch.device, dtype: torch.dtype, heads: int, groups: int, rows: int
    ) -> Backend:
        """What rotates queries and keys.

        Args:
            device: of query and key.
            dtype: of query and key.
            heads: query heads of this rank.
            groups: KV heads of this rank.
            rows: tokens of this rank.
        """
        settings, (_, d_in, d_out) = self.fope, self.geometry.coefficient_shape
        between = self.interpolation
        if between is not None and between.active:
            settings, d_in, d_out = between.settings, between.inv_freq.numel() + 1, between.num_pairs
        case = Case(
            config=settings,
            dtype=dtype,
            heads=heads,
            groups=groups,
            head_dim=self.geometry.head_dim,
            coefficient_heads=groups if self.fope.separate_heads else 1,
            d_in=d_in,
            d_out=d_out,
        )
        return choose(self.fope.backend, device, case, rows)

    def leave(self, query: Tensor) -> Tensor:
        """``query`` as it is, of a layer that does not rotate.

        Learnable coefficients get a gradient of zero: Megatron's data parallelism waits for one of every
        parameter, and checkpoints, which stack layers, need parameters and optimizer states of all layers.
        """
        if not self.fope.learnable:
            return query
        return _Leave.apply(query, *(getattr(self, name) for name in self.fope.coefficient_names))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        cp_group: Any = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        sequence_len_offset: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            query: ``[s, b, local query heads, head_dim]``; ``b`` is 1 for packed sequences and ``s`` counts
                requests under dynamic batching.
            key: ``[s, b, local KV heads, head_dim]``.
            cp_group: context-parallel group of the layer.
            packed_seq_params: Megatron's, or None.
            inference_context: Megatron's, or None.
            sequence_len_offset: ``[b]`` int32 of static batching with CUDA graphs or flash decode; see
                :func:`megatron_fope.layers.positions.inference_positions`.
            position_ids: ``[b, s]``, or ``[1, s]`` for all samples: positions of this rank's tokens, in place
                of those that the other arguments say; None: those.

        Returns:
            Rotated query and key, same shapes and dtypes, new tensors.

        Raises:
            UserError: position ids of another shape.
        """
        if position_ids is not None:
            _check_shape(position_ids, query)
            if position_ids.size(0) > 1:  # a row of the basis per token and sample
                flat = [tensor.flatten(0, 1).unsqueeze(1) for tensor in (query, key)]
                query_out, key_out = self._rotate(*flat, position_ids, cp_group, None, None, None)
                return query_out.view(query.shape), key_out.view(key.shape)
        return self._rotate(
            query, key, position_ids, cp_group, packed_seq_params, inference_context, sequence_len_offset
        )

    def _rotate(
        self, query: Tensor, key: Tensor, position_ids: Tensor | None, *layout: Any
    ) -> tuple[Tensor, Tensor]:
        if self.inv_freq.device != query.device:
            self.to(query.device)  # built on the CPU and not moved with the model; happens once
        between = self.interpolation
        if between is not None and not between.active:
            between = None
        sin_basis, cos_basis = self._basis(query, position_ids, between, *layout)
        chosen = self.backend(query.device, query.dtype, query.size(2), key.size(2), query.size(0))
        if between is None:
            coefficients = self.coefficients(shared=chosen.keeps_tables)
            return chosen.rotate(query, key, sin_basis, cos_basis, coefficients, self.fope)
        if not cache.is_capturing():
            between.update()
        coefficients = between.coefficients(self.coefficients())
        return chosen.rotate(query, key, sin_basis, cos_basis, coefficients, between.settings)

    def _basis(
        self,
        query: Tensor,
        position_ids: Tensor | None,
        between: Interpolation | None,
        cp_group: Any,
        packed: Any,
        context: Any,
        offset: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        def build() -> tuple[Tensor, Tensor]:
            if position_ids is not None:
                positions = position_ids.t().flatten().to(query.device)
            else:
                positions = local_positions(
                    query.size(0),
                    cp_group=cp_group,
                    packed_seq_params=packed,
                    inference_context=context,
                    sequence_len_offset=offset,
                    device=query.device,
                )
            if between is not None:
                basis = between.basis(positions)
            else:
                basis = functional.fourier_basis(positions, self.inv_freq)
            dtype = getattr(self, self.fope.coefficient_names[0]).dtype
            sin, cos = (b.to(dtype) for b in basis)  # exact angles come in float64
            return compat.keep_on_device(sin), compat.keep_on_device(cos)

        layout: tuple[Any, ...] = (query.size(0),)
        tensors: tuple[Tensor | None, ...] = ()
        if position_ids is not None:
            layout += ("position_ids",)
            tensors = (position_ids,)
        elif context is not None:
            layout += ("static" if context.is_static_batching() else "dynamic",)
            if not context.is_static_batching():
                tensors = (compat.token_positions(context),)
            elif offset is not None:
                tensors = (offset,)
            else:
                layout += (context.sequence_len_offset,)
        else:
            layout += (cp_group.rank(), cp_group.size()) if cp_group is not None else (0, 1)
            if packed is not None:
                layout += (packed.qkv_format, packed.cp_group, packed.local_cp_size)
                tensors = (packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
        found = tuple(t for t in tensors if t is not None)
        # A tensor made in inference mode could not be saved for backward by a later training step.
        with torch.inference_mode(False), torch.no_grad():
            if found and cache.is_capturing():
                return build()  # the graph will be replayed with other positions in the same memory
            uncounted = found and (context is not None or any(t.is_inference() for t in found))
            return BASES.get(
                (self.geometry, query.device, between is not None),
                build,
                settings=layout,
                sources=found,
                place=(self.stack, self.layer) if uncounted else None,
            )


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, *coefficients: Tensor) -> Tensor:
        ctx.coefficients = coefficients
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.coefficients)


def _check_shape(position_ids: Tensor, query: Tensor) -> None:
    tokens, samples = query.shape[:2]
    if position_ids.dim() != 2 or position_ids.size(1) != tokens or position_ids.size(0) not in (1, samples):
        raise UserError(
            f"position_ids has shape {tuple(position_ids.shape)}; requires [b, s], here [{samples}, "
            f"{tokens}] (a context-parallel rank takes those of its own tokens)"
        )
