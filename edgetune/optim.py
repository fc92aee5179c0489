"""AdamW, SGD and Adafactor, equal to torch's to the last bit, without `torch.optim` (whose first use imports torch._dynamo: 60 MiB).

What comes in: named parameters with gradients. State is keyed by parameter name, so a checkpoint loads whatever is
trained next. Nothing here imports torch: the updates are methods of the tensors themselves, in the order in which
torch's single-tensor implementations call them.

An allocation that fails leaves no parameter half updated. State and one scratch buffer are taken before anything
changes; the rules work in views of the buffer, and whatever small thing they still allocate comes before their first
change of a parameter or its state. `scratch_floats` and `transient_floats` say how much that is, for the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from edgetune.errors import UnsupportedModel

OptimizerName = Literal["adamw", "momentum", "sgd", "adafactor"]
Shape = tuple[int, ...]
# What each may keep of a parameter, in the order of the checkpoint's keys. `state_shapes` says which, and their shapes.
STATE_KEYS: dict[OptimizerName, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "momentum": ("momentum",),
    "sgd": (),
    "adafactor": ("row_var", "col_var", "variance"),
}
FLOAT32_EPSILON = 2.0**-23
SMALL_ROOM_BYTES = 16 * 1024


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`beta1`, `beta2`, `epsilon` are AdamW's, `momentum` is SGD's; the last three are Adafactor's (torch's names in brackets).

    Adafactor takes a learning rate as torch's does: the largest change of a step in units of the parameter's root mean
    square (of `smallest_scale` where that is larger), lowered to 1/sqrt(step) once that is less.
    """

    name: OptimizerName = "adamw"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9
    beta2_decay: float = -0.8
    smallest_scale: float = 1e-3  # [eps2]
    clip_threshold: float = 1.0  # [d]


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies: to matrices and kernels, as timm does; not to biases, norms, tokens, positions."""
    return dimensions >= 2 and not name.endswith(("pos_embed", "cls_token", "reg_token", "dist_token"))


def state_shapes(optimizer: OptimizerName, shape: Shape) -> dict[str, Shape]:
    """What an optimizer keeps of a parameter of this shape: array by key, all float32."""
    if optimizer != "adafactor":
        return dict.fromkeys(STATE_KEYS[optimizer], shape)
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def named_state(
    optimizer: OptimizerName, arrays: Mapping[str, Any], shape_of: Callable[[str], Shape]
) -> Iterator[tuple[str, str, Any]]:
    """(parameter, key, array) of what a checkpoint names `parameter|key`.

    Raises: RuntimeError for what this optimizer does not keep of a parameter of that shape; what `shape_of` raises.
    """
    for key, array in arrays.items():
        name, _, part = key.rpartition("|")
        wanted = state_shapes(optimizer, shape_of(name))
        if wanted.get(part) != array.shape:
            raise RuntimeError(f"{key} is {array.shape}, not {wanted.get(part)}")
        yield name, part, array


def state_floats(optimizer: OptimizerName, shape: Shape) -> int:
    """Float32 values that an optimizer keeps of a parameter of this shape."""
    return sum(math.prod(part) for part in state_shapes(optimizer, shape).values())


def scratch_floats(optimizer: OptimizerName, shape: Shape, *, decayed: bool) -> int:
    """Float32 values of scratch that the update of one parameter takes; a step reserves the largest of its parameters'.

    `decayed`: weight decay is not 0 and reaches this parameter (`decays`).

    ============  ==================================================================
    adamw         one copy: the denominator
    momentum,sgd  one copy where decayed, the gradient with the decay in it; else none
    adafactor     one copy: the update; a second for 0 or 1 dimensions: the new variance
    ============  ==================================================================
    """
    return _scratch_copies(optimizer, len(shape), decayed) * math.prod(shape)


def transient_floats(optimizer: OptimizerName, shape: Shape) -> int:
    """The most float32 values that live beside the scratch for an instant of one parameter's update.

    Adafactor's row and column means, for 2 dimensions or more; nothing otherwise. Not counted: the 12 bytes in which
    torch wraps a number.
    """
    if optimizer != "adafactor" or len(shape) < 2 or not math.prod(shape):
        return 0
    rows, columns = (math.prod(part) for part in state_shapes(optimizer, shape).values())
    matrices = math.prod(shape[:-2])
    # Each mean beside its new average; then both averages and the mean over rows.
    return max(2 * rows, rows + 2 * columns, rows + columns + matrices)


def _scratch_copies(optimizer: OptimizerName, dimensions: int, decayed: bool) -> int:
    if optimizer == "adamw":
        return 1
    if optimizer == "adafactor":
        return 1 if dimensions >= 2 else 2
    return int(decayed)


class Optimizer:
    """Updates parameters in place; keeps `state[name][key]` and `steps[name]`.

    `updated` holds the names that were updated in the step in progress; they are skipped until `finish`. So a step that
    ran out of memory half-way is simply called again. All updates are to be called under no_grad.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.state: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, int] = {}
        self.updated: set[str] = set()
        self._scratch: Any = None  # (floats,) float32

    def reserve(self, named_parameters: Iterable[tuple[str, Any]]) -> None:
        """Make the state of all parameters that may ever be updated, so that memory does not creep up as they are."""
        for name, parameter in named_parameters:
            shapes = state_shapes(self.settings.name, tuple(parameter.shape))
            if name not in self.state and shapes:
                # Not new_zeros: memory that is only asked for as zeros may stay untouched, and come later.
                self.state[name] = {key: parameter.new_empty(shape).zero_() for key, shape in shapes.items()}

    def evict(self, keep: Container[str]) -> None:
        """Drop state and step counts of all parameters but those in `keep`: one that comes back starts afresh."""
        for name in [name for name in self.steps.keys() | self.state.keys() if name not in keep]:
            self.state.pop(name, None)
            self.steps.pop(name, None)

    def reserve_scratch(self, named_parameters: Iterable[tuple[str, Any]]) -> None:
        """Take the scratch buffer for the updates of any of these parameters, until `drop_scratch`.

        Raises: UnsupportedModel if one is not float32, or if they lie on several devices.
        """
        floats = 0
        device = None
        for name, parameter in named_parameters:
            if not str(parameter.dtype).endswith("float32") or device not in (None, parameter.device):
                raise UnsupportedModel(
                    f"Parameters in training must be float32 on one device; {name} is {parameter.dtype} on "
                    f"{parameter.device}. Try model.float() and model.to(device) first."
                )
            device = parameter.device
            shape = tuple(parameter.shape)
            decayed = self._decay(name, parameter) != 0
            needed = scratch_floats(self.settings.name, shape, decayed=decayed)
            if needed > floats:
                floats, largest = needed, parameter
        held = 0 if self._scratch is None or self._scratch.device != device else self._scratch.numel()
        if floats > held:
            self._scratch = None  # freed before the larger one is asked for
            self._scratch = largest.new_empty((floats,))

    def drop_scratch(self) -> None:
        self._scratch = None

    def step(self, named_parameters: Iterable[tuple[str, Any]], learning_rate: float) -> None:
        """Update each parameter that has a gradient and was not updated since `finish`; then finish.

        If an allocation fails, each parameter is as before or wholly updated: call it again, with the same gradients.
        Gradients are taken as they are: whether all are finite is to be checked before.
        """
        due = [(name, value) for name, value in named_parameters if value.grad is not None and name not in self.updated]
        with_own_scratch = self._scratch is None
        try:
            self.reserve_scratch(due)
            self.reserve(due)
            for name, parameter in due:
                self._update(name, parameter, learning_rate)
        finally:
            if with_own_scratch:
                self.drop_scratch()
        self.finish()

    def update_one(self, name: str, parameter: Any, learning_rate: float) -> bool:
        """Update one parameter from its gradient, as `step` would: for the hooks of a backward pass.

        Uses the scratch of `reserve_scratch` (without it, its own for this once). Leaves alone what was updated since
        `finish` or has no gradient.

        Returns: False if the gradient is not finite, which leaves everything as it was.
        """
        if parameter.grad is None or name in self.updated:
            return True
        # One infinite or missing number makes the sum one; so does a sum beyond float32, which no sound gradient has.
        if not math.isfinite(parameter.grad.sum().item()):
            return False
        with_own_scratch = self._scratch is None
        try:
            self.reserve_scratch([(name, parameter)])
            self.reserve([(name, parameter)])
            self._update(name, parameter, learning_rate)
        finally:
            if with_own_scratch:
                self.drop_scratch()
        return True

    def finish(self) -> None:
        """End the step in progress, done or given up: the next one may update every parameter again."""
        self.updated.clear()

    def _update(self, name: str, parameter: Any, learning_rate: float) -> None:
        decay = self._decay(name, parameter)
        step = self.steps.get(name, 0) + 1
        size = parameter.numel()
        # Asked for and let go: where there is no room for the few bytes in which torch wraps each number that a rule
        # multiplies by, that shows here and not between two changes.
        bytearray(SMALL_ROOM_BYTES)
        if size:  # nothing to update otherwise, and no mean to take
            copies = _scratch_copies(self.settings.name, parameter.ndim, decay != 0)
            scratch = [self._scratch[i * size : (i + 1) * size].view(parameter.shape) for i in range(copies)]
            rule = _RULES[self.settings.name]
            rule(self.settings, parameter, self.state.get(name, {}), scratch, step, learning_rate, decay)
        self.steps[name] = step
        self.updated.add(name)

    def _decay(self, name: str, parameter: Any) -> float:
        return self.settings.weight_decay if decays(name, parameter.ndim) else 0.0


# (settings, parameter, its state, views of the scratch in the parameter's shape, step from 1, learning rate, decay)
_Rule = Callable[[OptimizerSettings, Any, dict[str, Any], list[Any], int, float, float], None]


def _adamw(
    settings: OptimizerSettings, parameter: Any, state: dict[str, Any], scratch: list[Any],
    step: int, learning_rate: float, decay: float,
) -> None:  # fmt: skip
    gradient, average, square = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
    (denominator,) = scratch
    parameter.mul_(1 - learning_rate * decay)
    average.lerp_(gradient, 1 - settings.beta1)
    square.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
    step_size = learning_rate / (1 - settings.beta1**step)
    denominator.copy_(square).sqrt_().div_((1 - settings.beta2**step) ** 0.5).add_(settings.epsilon)
    parameter.addcdiv_(average, denominator, value=-step_size)


def _sgd(
    settings: OptimizerSettings, parameter: Any, state: dict[str, Any], scratch: list[Any],
    _step: int, learning_rate: float, decay: float,
) -> None:  # fmt: skip
    update = parameter.grad
    if decay:
        update = scratch[0].copy_(update).add_(parameter, alpha=decay)
    if settings.name == "momentum":
        update = state["momentum"].mul_(settings.momentum).add_(update)
    parameter.add_(update, alpha=-learning_rate)


def _adafactor(
    settings: OptimizerSettings, parameter: Any, state: dict[str, Any], scratch: list[Any],
    step: int, learning_rate: float, decay: float,
) -> None:  # fmt: skip
    """Source: https://arxiv.org/abs/1804.04235, in torch's reading: the rate bounds the relative step, decay is decoupled."""
    gradient, update = parameter.grad, scratch[0]
    root_size = parameter.numel() ** 0.5
    share = step**settings.beta2_decay
    scale = max(settings.smallest_scale, parameter.norm(2).item() / root_size)
    rate = scale * min(learning_rate, 1 / step**0.5)
    if parameter.ndim < 2:
        new_state = {"variance": scratch[1]}
        update.copy_(gradient).mul_(gradient)
        update.copy_(scratch[1].copy_(state["variance"]).lerp_(update, share))
    else:
        new_state = _factors(gradient, state, share)
        rows, columns = new_state["row_var"], new_state["col_var"]
        # The outer product that torch takes as a matrix product of inner size 1, without its result's memory.
        update.copy_(rows).mul_(columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=FLOAT32_EPSILON))
    update.clamp_(min=FLOAT32_EPSILON**2).rsqrt_().mul_(gradient)
    clip = max(1.0, update.norm(2).item() / (root_size * settings.clip_threshold))
    # Up to here only scratch has changed; from here on nothing is allocated.
    for key, value in new_state.items():
        state[key].copy_(value)
    parameter.mul_(1 - learning_rate * decay)
    parameter.add_(update, alpha=-rate / clip)


def _factors(gradient: Any, state: dict[str, Any], share: float) -> dict[str, Any]:
    """The moved averages of the squared gradient's means over rows and columns."""
    factors = {}
    for key, dim in (("row_var", -1), ("col_var", -2)):
        mean = gradient.norm(2, dim=dim, keepdim=True).square_().div_(gradient.shape[dim])
        factors[key] = state[key].lerp(mean, share)
        del mean  # or it would outlive the next one's making
    return factors


_RULES: dict[OptimizerName, _Rule] = {"adamw": _adamw, "momentum": _sgd, "sgd": _sgd, "adafactor": _adafactor}
