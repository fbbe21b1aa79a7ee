"""Which code rotates queries and keys: chosen once per device and model, never exchanged silently."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fope import kernels
from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.kernels import torch_rotary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A way to rotate, and why it was taken."""

    name: str
    """"torch" or "triton"."""
    reason: str
    rotate: Callable[..., tuple[Tensor, Tensor]]
    """Same arguments and results as :func:`megatron_fope.kernels.torch_rotary.rotate`."""

    @property
    def keeps_tables(self) -> bool:
        """Whether tables are kept between calls, found by the memory of the coefficients."""
        return self.name == "triton"

    def __str__(self) -> str:
        title = {"torch": "PyTorch", "triton": "Triton kernels"}[self.name]
        return f"{title}, float32 arithmetic ({self.reason})"


class Case(NamedTuple):
    """What a layer asks of the code that rotates: one compilation, one comparison."""

    config: FoPEConfig
    """The settings that the tables depend on."""
    dtype: torch.dtype
    """Of query and key."""
    heads: int
    """Query heads of this rank."""
    groups: int
    """KV heads of this rank."""
    head_dim: int
    coefficient_heads: int
    """``groups``, or 1 where heads share."""
    d_in: int
    d_out: int

    @classmethod
    def small(cls) -> Case:
        """Some model, where there is none."""
        model = Geometry(FoPEConfig.from_profile("paper", train_length=512), 64, 2)
        return cls(model.config, torch.bfloat16, 4, 2, 64, *model.coefficient_shape)


_compared: dict[tuple[torch.device, Case, str], Backend] = {}


def choose(wanted: str, device: torch.device, case: Case | None = None, rows: int = 1) -> Backend:
    """The implementation that rotates tensors on a device.

    Args:
        wanted: "torch", "triton", or "auto", which takes the Triton kernels on a GPU on which they pass a
            comparison with PyTorch, once per case and process, and PyTorch elsewhere.
        device: where queries and keys are.
        case: the layer's; None: some.
        rows: of the basis, which decide between two kernels.

    Raises:
        UserError: "triton" was asked for and cannot run.
    """
    if wanted == "triton":
        check_available(wanted, device)
        return Backend("triton", "asked for", _triton())
    if wanted == "torch" or device.type != "cuda":
        reason = "asked for" if wanted == "torch" else f"on the {device.type.upper()}"
        return Backend("torch", reason, torch_rotary.rotate)
    case = case or Case.small()
    key = (device, case, _variant(case, rows))
    if key not in _compared:
        chosen = _compare(*key)
        if chosen is None:
            return Backend("torch", "a CUDA graph is captured before the first step", torch_rotary.rotate)
        _compared[key] = chosen
    return _compared[key]


def _variant(case: Case, rows: int) -> str:
    from megatron_fope.kernels.ops import choose_variant

    return choose_variant(case.config, rows, case.coefficient_heads, case.d_in, case.d_out)


def _compare(device: torch.device, case: Case, variant: str) -> Backend | None:
    """Triton's kernels if they run and agree with PyTorch; None: not possible now."""
    why_not = kernels.available(device)
    if why_not is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        why_not = torch.compiler.disable(_self_check)(_triton(), device, case, variant)
    if why_not is None:
        return Backend("triton", "they agree with PyTorch on this GPU", _triton())
    logger.warning("FoPE rotates with PyTorch instead of its Triton kernels: %s", why_not)
    return Backend("torch", why_not, torch_rotary.rotate)


def _triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from megatron_fope.kernels.ops import rotate_triton

    return rotate_triton


def check_available(wanted: str, device: torch.device | None = None) -> None:
    """Refuse what was asked for and cannot run, before anything is built.

    Args:
        wanted: "auto", "torch" or "triton".
        device: where it shall run; None: :func:`current_device`.

    Raises:
        UserError: "triton" was asked for and cannot run.
    """
    if wanted == "triton" and (why_not := kernels.available(device or current_device())):
        raise UserError(f"--fope-backend is 'triton', but {why_not}; allowed: auto, torch")


def current_device() -> torch.device:
    """Where this process trains."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _self_check(
    rotate: Callable[..., tuple[Tensor, Tensor]], device: torch.device, case: Case, variant: str
) -> str | None:
    """Rotate a few tokens both ways, forward and backward; a sentence when the results differ.

    Runs wherever a model is built or first used, so nothing here depends on the default dtype or device, on
    inference mode, autocast, or PyTorch's matmul precision.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = functional.random_coefficients(shape, "eye_norm", 1.0, generator)
        return numbers.to(device=device, dtype=dtype)

    heads = (case.heads, case.groups, case.groups)
    results = []
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device(device),
        ):
            mixed = random(70, 2, sum(heads), case.head_dim, dtype=case.dtype)
            upstream = random(70, 2, sum(heads[:2]), case.head_dim, dtype=case.dtype).split(heads[:2], dim=2)
            sin_basis, cos_basis = (random(70, case.d_in).sin() for _ in range(2))
            # Positive: some settings divide them by their sum.
            shape = (case.coefficient_heads, case.d_in, case.d_out)
            coefficients = {name: random(*shape).abs() for name in case.config.coefficient_names}
            for way in (functools.partial(rotate, variant=variant), torch_rotary.rotate):
                query, key, _ = mixed.clone().requires_grad_().split(heads, dim=2)
                leaves = [query, key]
                if case.config.learnable:
                    leaves += [value.requires_grad_() for value in coefficients.values()]
                rotated = way(query, key, sin_basis, cos_basis, coefficients, case.config)
                results.append((*rotated, *torch.autograd.grad(rotated, leaves, upstream)))
            worst = max(itertools.starmap(_difference, zip(*results, strict=True)))
    except Exception as error:  # whatever a compiler or driver may say
        return f"a first try failed with {type(error).__name__}: {str(error).splitlines()[0]}"
    return None if worst <= 1e-4 else f"their results differ from PyTorch's by {worst:.1e} on this GPU"


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value, without one rounding to 16 bit."""
    rounding = torch.finfo(b.dtype).eps * b.abs().double() if b.dtype.itemsize == 2 else 0.0
    size = max(1.0, b.abs().max().item())
    worst = ((a.double() - b.double()).abs() - rounding).max().item() / size
    return math.inf if math.isnan(worst) else worst
