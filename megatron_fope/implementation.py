"""Which code rotates queries and keys: chosen once per device, said once, never exchanged silently."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fope import kernels, rotation
from megatron_fope.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """A way to rotate, and why it was taken."""

    name: str
    """"torch" or "triton"."""
    reason: str
    rotate: Callable[..., tuple[Tensor, Tensor]]
    """Same arguments and results as :func:`megatron_fope.rotation.rotate`."""

    @property
    def keeps_tables(self) -> bool:
        """Whether tables are kept between calls, found by the memory of the coefficients."""
        return self.name == "triton"

    def __str__(self) -> str:
        title = {"torch": "PyTorch", "triton": "Triton kernels"}[self.name]
        return f"{title}, float32 arithmetic ({self.reason})"


def choose(wanted: str, device: torch.device) -> Implementation:
    """The implementation that rotates tensors on a device.

    Args:
        wanted: one of :data:`megatron_fope.config.IMPLEMENTATIONS`. "auto" takes the Triton kernels on a GPU
            on which they pass a comparison with PyTorch, which runs once per process, and PyTorch elsewhere.
        device: where queries and keys are.

    Raises:
        UserError: "triton" was asked for and cannot run.
    """
    return _choose(wanted, device.type, device.index)


@functools.cache
def _choose(wanted: str, device_type: str, index: int | None) -> Implementation:
    if wanted == "torch":
        return Implementation("torch", "asked for", rotation.rotate)
    if wanted == "triton":
        check_available(wanted, torch.device(device_type, index))
        return Implementation("triton", "asked for", _triton())
    if device_type != "cuda":
        return Implementation("torch", f"on the {device_type.upper()}", rotation.rotate)
    device = torch.device(device_type, index)
    why_not = kernels.available(device) or _self_check(_triton(), device)
    if why_not is None:
        return Implementation("triton", "they agree with PyTorch on this GPU", _triton())
    logger.warning("FoPE rotates with PyTorch instead of its Triton kernels: %s", why_not)
    return Implementation("torch", why_not, rotation.rotate)


def _triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from megatron_fope.kernels.ops import rotate_triton

    return rotate_triton


def check_available(wanted: str, device: torch.device | None = None) -> None:
    """Refuse what was asked for and cannot run, before anything is built.

    Args:
        wanted: one of :data:`megatron_fope.config.IMPLEMENTATIONS`.
        device: where it shall run; None: :func:`current_device`.

    Raises:
        UserError: "triton" was asked for and cannot run.
    """
    if wanted == "triton" and (why_not := kernels.available(device or current_device())):
        raise UserError(f"--fope-implementation is 'triton', but {why_not}; allowed here: auto, torch")


def current_device() -> torch.device:
    """Where this process trains."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _self_check(rotate: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> str | None:
    """Rotate a few tokens both ways, forward and backward; a sentence when the results differ."""
    from megatron_fope import functional
    from megatron_fope.config import FoPEConfig

    config = FoPEConfig.from_profile("paper", train_length=512)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(70, 2, 8, 64, generator=generator).to(device)
    upstream = torch.randn(70, 2, 6, 64, generator=generator).to(device)
    positions = torch.arange(70, device=device)
    basis = functional.fourier_basis(positions, config.inv_freq(64).to(device))
    coefficients = {k: v.to(device) for k, v in config.make_coefficients(2, 64, layer=1).items()}
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for way in (rotate, rotation.rotate):
                query, key, _ = mixed.clone().requires_grad_().split([4, 2, 2], dim=2)
                turned = way(query, key, *basis, coefficients, config)
                grads = torch.autograd.grad(turned, (query, key), upstream.split([4, 2], dim=2))
                results.append((*turned, *grads))
    except Exception as error:  # whatever a compiler or driver may say
        return f"a first try failed with {type(error).__name__}: {str(error).splitlines()[0]}"
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return None if worst <= 1e-4 else f"their results differ from PyTorch's by {worst:.1e} on this GPU"
