"""The function-preserving start: from RoPE to FoPE over a number of iterations.

While a start is annealed, queries and keys are rotated by tables between those of the RoPE model and those of
the FoPE model with its final coefficients. :mod:`megatron_fope.formula.schedule` gives weights from 0 to 1
for every step, ``c_j`` of the clip of pair j, ``p`` of the padding and ``s`` of the series::

    T_j(m) = (1 - s) * RoPE_j(m) + s * FoPE_j(m)                       a pair that keeps a frequency
    T_j(m) = (1 - c_j) * RoPE_j(m) + c_j * (0, 1) + p * (pad - (0, 1)) a pair that loses it

Without a schedule of their own all weights are one, ``a`` = annealed iterations / N, and every table is
``(1 - a) * RoPE(m) + a * FoPE(m)``.

This is one Fourier series over the frequencies of both and a constant (for the padded pairs), mixed by
``[(1 - w) identity; w coefficients; constant]``. So the stored coefficients have their final shape and
values from the first iteration, every way to rotate works unchanged, and at the end the plain FoPE model is
left.

Why not lower the clipped frequencies to zero and scale the random part instead: a lower frequency changes
angles in proportion to the position, by whole cycles for late tokens, and ends at sin 0 and cos 1, not at
the padding. The price of interpolating tables is that a clipped pair is no rotation halfway: at ``a = 1/2``
its size goes from 0.2 to 1.2 with the position.

The weights depend on the iteration alone. A checkpoint stores the schedule and the iteration at which the
start began with its arguments; loading one in the middle, to train or to evaluate, gives the weights that
come next. Under CUDA graphs the weights are numbers in device memory that change between the steps; a graph
that was captured before the end keeps computing the longer series until the job restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fope.common.log import announce
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.folding import FACTOR
from megatron_fope.formula.geometry import Geometry, effective_coefficients, rotary_frequencies
from megatron_fope.formula.schedule import Schedule
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


def current_step() -> int:
    """Iterations done since the start; negative before it."""
    return _progress.completed - _progress.start


def current_weight(anneal_iters: int) -> float:
    """How far the start is, 0 to 1; 1 without annealing. Without a schedule FoPE's share of the tables."""
    if not anneal_iters:
        return 1.0
    return min(1.0, max(0.0, current_step() / anneal_iters))


@contextmanager
def training_step(
    model: Iterable[torch.nn.Module], iteration: int, args: Any, geometry: Callable[[], Geometry]
) -> Iterator[None]:
    """Around one training step: the weights of its iteration inside, those of the next one afterwards.

    Args:
        model: the chunks that are trained.
        iteration: iterations done before.
        args: Megatron's arguments.
        geometry: gives FoPE's; asked before the end only.
    """
    total = args.fope_anneal_iters
    _progress.completed = iteration
    if current_weight(total) == 1.0:
        yield
        return
    advance(iteration, model)
    shares = _shares(geometry())
    yield
    advance(iteration + 1, model)
    _log(iteration + 1, shares, args)
    if current_weight(total) == 1.0:
        announce(f"iteration {iteration + 1} was the last with RoPE; from here on it is FoPE")


def _shares(geometry: Geometry) -> dict[str, float]:
    """What of FoPE is in the tables now, by the names that TensorBoard gets."""
    shares = {"fope-weight": current_weight(geometry.config.anneal_iters)}
    schedule = Schedule.of(geometry.config)
    if not schedule.is_plain:
        weights = schedule.weights(current_step(), len(geometry.leaving))
        shares["fope-clip"] = float(weights.clip.mean()) if weights.clip.numel() else 1.0
        shares |= {"fope-padding": weights.padding, "fope-series": weights.series}
    return shares


def _log(iteration: int, shares: dict[str, float], args: Any) -> None:
    """The weights of one iteration, where Megatron's other numbers go."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if iteration % args.log_interval == 0:
        weight, *parts = shares.items()
        more = ", ".join(f"{name.removeprefix('fope-')} {value:g}" for name, value in parts)
        more = f" ({more})" if more else ""
        announce(f"iteration {iteration} had FoPE's weight {weight[1]:g} against RoPE{more}")
    if iteration % args.tensorboard_log_interval:
        return
    if writer := get_tensorboard_writer():
        for name, value in shares.items():
            writer.add_scalar(name, value, iteration)
    if writer := get_wandb_writer():
        writer.log(shares, iteration)


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
    weights: Tensor
    """``[4, head_dim / 2]`` float32, by pair: of FoPE, of RoPE, and the constants of sin and of cos."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry, self.fope, self.num_pairs = geometry, geometry.config, geometry.head_dim // 2
        fope = self.fope
        self.schedule = Schedule.of(fope)
        self._written = 0
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
        """The frequencies of RoPE and of FoPE, and the weights that were written last."""
        both = torch.cat((rotary_frequencies(self.fope, 2 * self.num_pairs), self.geometry.inv_freq))
        return {"inv_freq": both, "weights": self._weights(self._written)}

    @property
    def active(self) -> bool:
        """Whether the model is not FoPE yet."""
        return current_weight(self.fope.anneal_iters) < 1.0

    def update(self) -> None:
        """Write the weights of the current step to the device."""
        step = min(self.schedule.steps, max(0, current_step()))
        if step != self._written:
            self.weights.copy_(self._weights(step))
            self._written = step

    def _weights(self, step: int) -> Tensor:
        leaving = self.geometry.leaving
        now = self.schedule.weights(step, len(leaving))
        # Whole numbers first: deepspeed.zero.Init rounds new floating tensors to the training dtype.
        weights = torch.zeros(4, self.num_pairs, dtype=torch.int32, device="cpu").float()
        factor, pairs = self.fope.attention_scaling, slice(self.geometry.d_out, None)
        weights[0] = now.series
        weights[0, leaving.start :] = now.clip
        weights[1] = factor * (1.0 - weights[0])
        none = (0.0, 1.0)
        if self.fope.fold_padding:
            # Folded weights make these pairs shorter; what is RoPE's, or none, is longer by as much.
            weights[1, pairs] /= FACTOR
            none = self.fope.pad
        for row, pad, rest in zip(weights[2:], self.fope.pad, none, strict=True):
            row[pairs] = factor * (weights[0, pairs] * rest + now.padding * (pad - rest))
        return weights

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
        # No count of writes, as for frozen coefficients in FourierEmbedding.
        of_fope, of_rope, sin_constant, cos_constant = self.weights.data

        def between(coefficients: Tensor, constant: Tensor) -> Tensor:
            heads, _, d_out = coefficients.shape
            fope = F.pad(coefficients, (0, self.num_pairs - d_out)) * of_fope
            rope = torch.diag(of_rope).expand(heads, -1, -1)
            constant = constant.expand(heads, 1, -1)
            return torch.cat((rope.to(fope.dtype), fope, constant.to(fope.dtype)), dim=1)

        return {"sin_coef": between(sin_coef, sin_constant), "cos_coef": between(cos_coef, cos_constant)}
