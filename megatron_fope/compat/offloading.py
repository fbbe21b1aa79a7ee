"""Fine-grained offloading of activations (``--fine-grained-activation-offloading``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def keep_on_device(tensor: Tensor) -> Tensor:
    """Mark a tensor that is saved for the backward pass, but must not be moved to the host.

    Megatron offloads every large enough tensor that autograd saves inside a layer, unless it is marked:
    through 0.18 by ``offloading_activation = False``, from 0.19 on by ``_do_not_offload = True``. Transformer
    Engine's own offloading looks at ``_TE_do_not_offload``.

    Args:
        tensor: what all layers share, and would move once per layer.

    Returns:
        The same tensor.
    """
    tensor.offloading_activation = False  # type: ignore[attr-defined]
    tensor._do_not_offload = True  # type: ignore[attr-defined]
    tensor._TE_do_not_offload = True  # type: ignore[attr-defined]
    return tensor


def survives_offloading(tensor: Tensor, value: Tensor, attention: Any) -> Tensor:
    """A query or key that autograd may keep although Megatron offloads the core attention.

    Megatron then frees the memory of the query, key and value that the core attention got, in 0.16 to 0.19.
    That of the value is the whole fused projection, of which the query and key before the rotation are parts.

    Args:
        tensor: query or key before the rotation.
        value: what the core attention will get.
        attention: Megatron's ``SelfAttention``.

    Returns:
        The same tensor, or a copy of one that would be freed.
    """
    storage, freed = tensor.untyped_storage(), value.untyped_storage()
    return (
        tensor.clone()
        if attention.offload_core_attention and storage.data_ptr() == freed.data_ptr()
        else tensor
    )
