"""Resuming the distributed optimizer with PyTorch's own Adam."""

from __future__ import annotations

from typing import Any

import torch


def _create_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Create what ``torch.optim.Adam`` creates in its first step, with a step count of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state.setdefault("step", torch.tensor(0.0))
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)


def install() -> None:
    """Let ``DistributedOptimizer`` load a checkpoint without Apex or Transformer Engine.

    Two methods are wrapped, both only for Adam from PyTorch, which counts steps per parameter:

    * ``state_dict`` asserts that one step count exists. Before the first step there is none, and loading
      needs the state dict as a template: the state is created beforehand.
    * ``load_state_dict`` hands one and the same step tensor to every parameter, and PyTorch then counts
      it up once per parameter in every step: each parameter gets its own copy.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam):
            _create_adam_state(self.optimizer)
        return original_state_dict(self, *args, **kwargs)

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original_load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    cls.state_dict = state_dict
    cls.load_state_dict = load_state_dict
