"""How a RoPE model turns into FoPE step by step: the weights of clip, padding and series at every step.

Three things make a RoPE model FoPE, and each has a time of its own:

- the *clip*: channel pairs that lose their frequency go from RoPE's rotation to none (sin 0, cos 1), all
  together or one after another;
- the *padding*: the constant of those pairs goes from none to ``pad_value``;
- the *series*: the other pairs go from one frequency to their Fourier series.

At step 0 nothing of it has begun, at the last step all of it is done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig, flag


@dataclass(frozen=True)
class Weights:
    """FoPE's shares at one step, each from 0 (RoPE) to 1 (FoPE)."""

    clip: Tensor
    """Of every channel pair that loses its frequency, fastest first; float32 on the CPU."""
    padding: float
    series: float


@dataclass(frozen=True)
class Schedule:
    """When the parts of FoPE come in. Steps are iterations since the start from RoPE.

    A part that runs from step ``first`` to step ``last`` has weight 0 up to ``first`` and 1 from ``last`` on.

    Raises:
        UserError: a part that is no span of steps from 0 to ``steps``.
    """

    steps: int
    """After so many all of it is FoPE."""
    order: str
    """How pairs lose their frequency: "together", "slowest-first" or "slowest-last"."""
    clip: tuple[int, int]
    padding: tuple[int, int]
    series: tuple[int, int]

    @classmethod
    def of(cls, config: FoPEConfig) -> Schedule:
        """The schedule in FoPE's settings; a part that they leave open runs over all steps."""
        steps = config.anneal_iters
        parts = {}
        for part in ("clip", "padding", "series"):
            text = getattr(config, f"anneal_{part}")
            parts[part] = _span(flag(f"anneal_{part}"), text, steps) if text else (0, steps)
        return cls(steps, config.anneal_order, **parts)

    @property
    def is_plain(self) -> bool:
        """Whether all parts have the same weight at every step."""
        return self.order == "together" and {self.clip, self.padding, self.series} == {(0, self.steps)}

    def weights(self, step: int, leaving: int) -> Weights:
        """The shares of FoPE.

        Args:
            step: iterations done since the start; before it (negative) as at 0.
            leaving: number of channel pairs that lose their frequency.
        """
        number = torch.arange(leaving, device="cpu").float()
        clip = _ramp(step, self.clip)
        if self.order == "together":
            done = torch.full_like(number, clip)
        else:  # each has its own equal share of the time
            done = (clip * leaving - number).clamp(0, 1)
            done = done.flip(0) if self.order == "slowest-first" else done
        return Weights(done, _ramp(step, self.padding), _ramp(step, self.series))


def _ramp(step: int, span: tuple[int, int]) -> float:
    first, last = span
    return min(1.0, max(0.0, (step - first) / (last - first)))


def _span(name: str, text: str, steps: int) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not first < last <= steps:
        raise UserError(
            f"{name} is {text!r}; allowed: FIRST:LAST, iterations since the start with FIRST < LAST, LAST at "
            f"most the {steps} of {flag('anneal_iters')}"
        )
    return first, last
