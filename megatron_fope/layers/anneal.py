"""The function-preserving start: from RoPE to FoPE over a number of iterations.

While a start is annealed, queries and keys are rotated by tables between those of the RoPE model and those of
the FoPE model with its final coefficients::

    T(m) = (1 - a) * RoPE(m) + a * FoPE(m),    a = annealed iterations / N, from 0 to 1

This is one Fourier series over the frequencies of both and a constant (for the padded pairs), mixed by
``[(1 - a) identity; a coefficients; a padding]``. So the stored coefficients have their final shape and
values from the first iteration, gain and clip come in together, every way to rotate works unchanged, and at
``a = 1`` the plain FoPE model is left.

Why not lower the clipped frequencies to zero and scale the random part instead: a lower frequency changes
angles in proportion to the position, by whole cycles for late tokens, and ends at sin 0 and cos 1, not at
the padding. The price of interpolating tables is that a clipped pair is no rotation halfway: at ``a = 1/2``
its size goes from 0.2 to 1.2 with the position.

The weight ``a`` depends on the iteration alone. A checkpoint stores N and the iteration at which the start
began with its arguments; loading one in the middle, to train or to evaluate, gives the weight that comes
next. Under CUDA graphs the weight is a number in device memory that changes between the steps; a graph that
was captured before the end keeps computing the longer series until the job restarts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fope.common.log import announce
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry, effective_coefficients, rotary_frequencies
from megatron_fope.layers.precision import KeepsDtype


@dataclass
class _Progress:
    """Where this process is; one model is trained in a process."""

    start: int = 0
    """Iteration at which annealing began; may be negative after the iterations were counted anew."""
    completed: int = 0
    """Iterations of the run that are done."""


_progress = _Progress()


def begin(start: int, completed: int) -> None:
    """Set where annealing is; called when a checkpoint was loaded.

    Args:
        start: iteration at which the weight is 0.
        completed: iterations done.
    """
    _progress.start, _progress.completed = start, completed


def advance(completed: int, model: Iterable[torch.nn.Module] = ()) -> None:
    """Set how many iterations are done, and write the weight where a model's CUDA graphs read it."""
    _progress.completed = completed
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, Interpolation):
                module.update()


def current_weight(anneal_iters: int) -> float:
    """FoPE's share of the tables, 0 to 1; 1 without annealing."""
    if not anneal_iters:
        return 1.0
    return min(1.0, max(0.0, (_progress.completed - _progress.start) / anneal_iters))


@contextmanager
def training_step(model: Iterable[torch.nn.Module], iteration: int, args: Any) -> Iterator[None]:
    """Around one training step: the weight of its iteration inside, that of the next one afterwards.

    Args:
        model: the chunks that are trained.
        iteration: iterations done before.
        args: Megatron's arguments.
    """
    total = args.fope_anneal_iters
    _progress.completed = iteration
    weight = current_weight(total)
    if weight == 1.0:
        yield
        return
    advance(iteration, model)
    yield
    advance(iteration + 1, model)
    _log(iteration + 1, weight, args)
    if current_weight(total) == 1.0:
        announce(f"iteration {iteration + 1} was the last with RoPE; from here on it is FoPE")


def _log(iteration: int, weight: float, args: Any) -> None:
    """The weight of one iteration, where Megatron's other numbers go."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if iteration % args.log_interval == 0:
        announce(f"iteration {iteration} had FoPE's weight {weight:g} against RoPE")
    if iteration % args.tensorboard_log_interval:
        return
    if writer := get_tensorboard_writer():
        writer.add_scalar("fope-weight", weight, iteration)
    if writer := get_wandb_writer():
        writer.log({"fope-weight": weight}, iteration)


def annealed_iterations(stored_args: Any, iteration: int) -> int:
    """How far the start of a checkpoint is, at most its number of iterations.

    Args:
        stored_args: the arguments stored in the checkpoint.
        iteration: its iteration.
    """
    total = getattr(stored_args, "fope_anneal_iters", None) or 0
    start = getattr(stored_args, "fope_anneal_start", None) or 0
    return min(total, max(0, iteration - start))


def is_annealed(stored_args: Any, iteration: int) -> bool:
    """Whether a FoPE checkpoint is the plain FoPE model, never or completely annealed."""
    return annealed_iterations(stored_args, iteration) == (getattr(stored_args, "fope_anneal_iters", 0) or 0)


class Interpolation(KeepsDtype):
    """One layer's basis and coefficients between RoPE and FoPE.

    Args:
        geometry: FoPE's, of settings with ``anneal_iters``.
    """

    inv_freq: Tensor
    weight: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry, self.fope, self.num_pairs = geometry, geometry.config, geometry.head_dim // 2
        fope = self.fope
        self._written = 0.0
        for name, value in self.initial_tensors().items():
            self.register_buffer(name, value, persistent=False)
        self.settings = FoPEConfig.from_profile(
            fope.profile,
            train_length=fope.train_length,
            shared_layers=False,
            learnable=fope.learnable,
            backend=fope.backend,
        )
        """What the interpolated coefficients mean: nothing left to fold in, no pair without a series."""

    def initial_tensors(self) -> dict[str, Tensor]:
        """The frequencies of RoPE and of FoPE, and the weight that was written last."""
        both = torch.cat((rotary_frequencies(self.fope, 2 * self.num_pairs), self.geometry.inv_freq))
        weight = torch.full((), self._written, dtype=torch.float32, device="cpu")
        return {"inv_freq": both, "weight": weight}

    @property
    def active(self) -> bool:
        """Whether the weight is below 1."""
        return current_weight(self.fope.anneal_iters) < 1.0

    def update(self) -> None:
        """Write the current weight to the device, without waiting for it."""
        weight = current_weight(self.fope.anneal_iters)
        if weight != self._written:
            self.weight.fill_(weight)
            self._written = weight

    def basis(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``(sin, cos)``, each ``[..., head_dim / 2 + D_in + 1]``; the last is the constant 1 in both."""
        sin, cos = functional.fourier_basis(positions, self.inv_freq)
        return F.pad(sin, (0, 1), value=1.0), F.pad(cos, (0, 1), value=1.0)

    def coefficients(self, coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
        """``{"sin_coef": ..., "cos_coef": ...}``, each ``[H, head_dim / 2 + D_in + 1, head_dim / 2]``.

        Args:
            coefficients: the layer's own, possibly fewer heads.
        """
        sin_coef, cos_coef = effective_coefficients(self.fope, coefficients)
        pad_sin, pad_cos = self.fope.scaled_pad
        return {"sin_coef": self._between(sin_coef, pad_sin), "cos_coef": self._between(cos_coef, pad_cos)}

    def _between(self, coefficients: Tensor, pad: float) -> Tensor:
        heads, _, d_out = coefficients.shape
        padded = self.num_pairs - d_out
        constant = F.pad(coefficients.new_zeros(heads, 1, d_out), (0, padded), value=pad)
        fope = torch.cat((F.pad(coefficients, (0, padded)), constant), dim=1)
        rope = torch.eye(self.num_pairs, dtype=fope.dtype, device=fope.device).expand(heads, -1, -1)
        rope = rope * self.fope.attention_scaling
        weight = self.weight.data  # no count of writes, as for frozen coefficients in FourierEmbedding
        return torch.cat(((1.0 - weight) * rope, weight * fope), dim=1)
