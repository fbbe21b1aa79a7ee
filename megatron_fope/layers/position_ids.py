"""How a model's ``position_ids`` reach its attention layers.

Megatron hands position ids to the embedding of tokens only, and rotary tables to the layers. FoPE uses the
latter way: while a model with FoPE runs, position ids other than 0, 1, 2, ... stand in the place of
``rotary_pos_emb``. That is an argument of every layer, so recomputation in the backward pass, other
micro-batches in between and other threads see the ids of their own forward pass.

Plain ids are left out, so that their basis is made once and kept for the whole run. On a CPU ids are
compared. On a GPU, where that would wait for the device, they are plain when Megatron's flags say so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.layers.positions import check_values, local_positions

_running: ContextVar[tuple[Any, Tensor | None, Any] | None] = ContextVar("fope_position_ids", default=None)
"""Model whose forward pass runs in this thread, its position ids, and what was there before."""

_PLAIN = "_fope_plain_position_ids"


@functools.cache
def follow_models() -> None:
    """From now on, models that get a part with FoPE hand their position ids to it; others are left alone."""
    from torch.nn.modules.module import register_module_module_registration_hook

    register_module_module_registration_hook(_on_new_part)


def _on_new_part(model: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
    """PyTorch calls this for every module that becomes part of another."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    from megatron_fope.layers.attention import FoPEAttention

    if not isinstance(model, LanguageModule) or part is None:
        return
    if not any(isinstance(module, FoPEAttention) for module in part.modules()):
        return
    if "position_ids" not in _signature(type(model).forward).parameters:
        return
    if _on_model_start not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_on_model_start, with_kwargs=True)
        model.register_forward_hook(_on_model_end, always_call=True)
    part.register_forward_pre_hook(_on_part_start, with_kwargs=True)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def expect_plain_position_ids(model: torch.nn.Module) -> None:
    """Take a model's position ids for 0, 1, 2, ... without a comparison on a GPU, except of the first ones.

    Args:
        model: with FoPE, trained on Megatron's own data without ``--reset-position-ids``.
    """
    setattr(model, _PLAIN, "unchecked")


def _on_model_start(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    call = _signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    _running.set((model, _ids_to_honour(model, call), _running.get()))


def _on_model_end(model: Any, args: tuple, output: Any) -> None:
    running = _running.get()
    if running is not None and running[0] is model:
        _running.set(running[2])


def _on_part_start(part: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    running = _running.get()
    if running is None or running[1] is None or kwargs.get("rotary_pos_emb") is not None:
        return None  # the layers refuse rotary tables
    return args, {**kwargs, "rotary_pos_emb": running[1]}


def _ids_to_honour(model: Any, call: dict[str, Any]) -> Tensor | None:
    """``[b, s]`` or ``[1, s]``: ids that the layers must be told; None: they find positions themselves."""
    ids = call.get("position_ids")
    context = call.get("inference_context") or call.get("inference_params")
    packed = call.get("packed_seq_params")
    if ids is None or (context is not None and not context.is_static_batching()):
        return None  # under dynamic batching the context has the position of every token
    if packed is not None and packed.qkv_format == "thd":
        return None  # documents start at 0
    check_form(ids, call.get("input_ids"))
    expected, on_cpu = getattr(model, _PLAIN, None), ids.device.type == "cpu"
    if expected == "checked" and not on_cpu:
        return None
    check_values(ids >= 0, "position_ids holds negative positions; requires 0 and more")
    if ids.stride(0) == 0:
        ids = ids[:1]  # made by expand(): all samples have the same
    whole = model.pg_collection.pp.size() == 1
    if not on_cpu and whole and not expected:
        return ids
    plain = ids == local_positions(
        ids.size(1),
        cp_group=model.pg_collection.cp,
        packed_seq_params=packed,
        inference_context=context,
        device=ids.device,
    )
    if on_cpu and whole:
        return None if plain.all() else ids
    check_values(
        plain,
        "position_ids are not 0, 1, 2, ...; with pipeline parallelism FoPE requires that, because Megatron "
        "gives position ids to the first stage only"
        if not whole
        else "position_ids are not 0, 1, 2, ..., but --reset-position-ids is not given; it is required then",
    )
    if expected:
        setattr(model, _PLAIN, "checked")
    return None


def check_form(ids: Any, tokens: Any = None) -> None:
    """Refuse what is no tensor of position ids.

    Args:
        ids: the model's argument.
        tokens: ``[b, s]`` token ids, or None.

    Raises:
        UserError: not ``[b, s]`` integers, or ``[1, s]`` for all samples.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16):
        kind = str(ids.dtype).removeprefix("torch.") if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"position_ids is {kind}; requires a tensor of integers (int64)")
    shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else None
    if (
        ids.dim() != 2
        or not ids.numel()
        or (shape and (ids.size(0) not in (1, shape[0]) or ids.shape[1:] != shape[1:]))
    ):
        of_tokens = f", here {list(shape)} like the tokens" if shape else ""
        raise UserError(f"position_ids has shape {tuple(ids.shape)}; requires [b, s]{of_tokens}")


def take_position_ids(call: dict[str, Any]) -> Tensor | None:
    """Take position ids out of the arguments of an attention layer.

    Args:
        call: arguments by name; ``rotary_pos_emb`` is removed.

    Raises:
        UserError: rotary tables.
    """
    ids = call.pop("rotary_pos_emb", None)
    tables = (call.get(name) for name in ("rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin"))
    if not (ids is None or (isinstance(ids, Tensor) and not ids.is_floating_point())) or any(
        table is not None for table in tables
    ):
        raise UserError(
            "an attention layer with FoPE got rotary embeddings too, which would rotate queries and keys "
            "twice; use position_embedding_type='none' for models built from a layer spec, and check "
            "config.position_embedding_type, which wins over it"
        )
    return ids
