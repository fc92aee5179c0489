"""AdamW and SGD, equal to torch's to the last bit, without `torch.optim` (whose first use imports torch._dynamo: 60 MiB).

What comes in: named parameters with gradients. State is keyed by parameter name, so a checkpoint loads whatever is
trained next; it appears at a parameter's first update and only grows. Nothing here imports torch: the updates are
methods of the tensors themselves, in the order in which torch's single-tensor implementations call them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

OptimizerName = Literal["adamw", "momentum", "sgd"]
# What each keeps of a parameter, in the order of the checkpoint's keys.
STATE_KEYS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "momentum": ("momentum",), "sgd": ()}


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True):
    name: OptimizerName = "adamw"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies: to matrices and kernels, as timm does; not to biases, norms, tokens, positions."""
    return dimensions >= 2 and not name.endswith(("pos_embed", "cls_token", "reg_token", "dist_token"))


class Optimizer:
    """Updates parameters in place; keeps `state[name][key]` and `steps[name]`."""

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.state: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, int] = {}

    def reserve(self, named_parameters: Iterable[tuple[str, Any]]) -> None:
        """Make the state of all parameters that may ever be updated, so that memory does not creep up as they are."""
        for name, parameter in named_parameters:
            if name not in self.state and STATE_KEYS[self.settings.name]:
                # clone first: memory that is only asked for as zeros is not touched, and would come later.
                self.state[name] = {key: parameter.detach().clone().zero_() for key in STATE_KEYS[self.settings.name]}

    def step(self, named_parameters: Iterable[tuple[str, Any]], learning_rate: float) -> None:
        """Update each parameter that has a gradient. Call it under no_grad."""
        update = {"adamw": self._adamw, "momentum": self._sgd, "sgd": self._sgd}[self.settings.name]
        for name, parameter in named_parameters:
            if parameter.grad is not None:
                decay = self.settings.weight_decay if decays(name, parameter.ndim) else 0.0
                self.steps[name] = self.steps.get(name, 0) + 1
                update(name, parameter, parameter.grad, learning_rate, decay)

    def _adamw(self, name: str, parameter: Any, gradient: Any, learning_rate: float, decay: float) -> None:
        settings = self.settings
        self.reserve([(name, parameter)])
        state = self.state[name]
        step = self.steps[name]
        parameter.mul_(1 - learning_rate * decay)
        state["exp_avg"].lerp_(gradient, 1 - settings.beta1)
        state["exp_avg_sq"].mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        step_size = learning_rate / (1 - settings.beta1**step)
        denominator = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - settings.beta2**step)).add_(settings.epsilon)
        parameter.addcdiv_(state["exp_avg"], denominator, value=-step_size)

    def _sgd(self, name: str, parameter: Any, gradient: Any, learning_rate: float, decay: float) -> None:
        if decay:
            gradient = gradient.add(parameter, alpha=decay)
        if self.settings.name == "momentum":
            self.reserve([(name, parameter)])
            self.state[name]["momentum"].mul_(self.settings.momentum).add_(gradient)
            gradient = self.state[name]["momentum"]
        parameter.add_(gradient, alpha=-learning_rate)
