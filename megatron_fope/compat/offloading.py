"""Fine-grained offloading of activations (``--fine-grained-activation-offloading``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
