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

    Three methods are wrapped, all only for Adam from PyTorch, which counts steps per parameter:

    * ``state_dict`` asserts that one step count exists. Before the first step there is none, and loading
      needs the state dict as a template: the state is created beforehand.
    * ``load_state_dict`` leaves every parameter with one and the same step tensor, which PyTorch would count
      up once per parameter in every step, or with the zero of the template: the step count that the
      checkpoint holds per group is given to each parameter as a tensor of its own.
    * ``_set_main_param_and_optimizer_states`` expects every tensor of a parameter's state in what it loads,
      but some checkpoint formats leave the step count out: the present one is added.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict
    original_set_states = cls._set_main_param_and_optimizer_states

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam):
            _create_adam_state(self.optimizer)
        return original_state_dict(self, *args, **kwargs)

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        # 0.17 copies into main parameters that require gradients without leaving autograd first.
        with torch.no_grad():
            result = original_load(self, *args, **kwargs)
        if isinstance(self.optimizer, torch.optim.Adam):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
        return result

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        present = self._get_main_param_and_optimizer_states(model_param)
        if "step" in present:
            tensors.setdefault("step", present["step"])
        original_set_states(self, model_param, tensors)

    cls._set_main_param_and_optimizer_states = set_states
    cls.state_dict = state_dict
    cls.load_state_dict = load_state_dict
