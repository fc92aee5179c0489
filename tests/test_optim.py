"""The optimizers equal torch's to the last bit, and bring nothing of torch.optim with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from edgetune.errors import UnsupportedModel
from edgetune.optim import STATE_KEYS, Optimizer, OptimizerName, OptimizerSettings, decays, state_floats, state_shapes

STEPS = 20
RULES: tuple[OptimizerName, ...] = get_args(OptimizerName)


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 17), nn.LayerNorm(17), nn.Linear(17, 5))
    model.register_parameter("pos_embed", nn.Parameter(torch.randn(1, 1, 8, 8)))
    return model


def _loss(model: nn.Module, step: int) -> Tensor:
    torch.manual_seed(1000 + step)
    images = torch.randn(4, 3, 8, 8) + model.pos_embed
    # A gradient of nearly nothing in one step: the end of AdamW's division where epsilon counts.
    scale = 1e-10 if step == 3 else 0.1
    return (model[4](model[3](model[2](model[1](model[0](images))))) * scale).square().mean()


def _torch_optimizer(
    name: OptimizerName, parameters: dict[str, nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for n, p in parameters.items() if decays(n, p.ndim)], "weight_decay": weight_decay},
        {"params": [p for n, p in parameters.items() if not decays(n, p.ndim)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=1.0, foreach=False)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, foreach=False, fused=False)
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9 if name == "momentum" else 0.0, foreach=False, fused=False)


def _rate(step: int) -> float:
    return 1e-2 / (1 + step % 5)


def _train(model: nn.Module, update: Callable[[float], None]) -> None:
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        _loss(model, step).backward()
        update(_rate(step))


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("name", RULES)
def test_twenty_steps_equal_torchs_to_the_last_bit(name: OptimizerName, weight_decay: float) -> None:
    ours, theirs = _model(), _model()
    optimizer = Optimizer(OptimizerSettings(name=name, weight_decay=weight_decay))
    reference = _torch_optimizer(name, dict(theirs.named_parameters()), weight_decay)

    def our_update(rate: float) -> None:
        with torch.no_grad():
            optimizer.step(ours.named_parameters(), rate)

    def their_update(rate: float) -> None:
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()

    _train(ours, our_update)
    _train(theirs, their_update)
    before = dict(_model().named_parameters())
    for (key, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.isfinite(mine).all(), key
        assert torch.equal(mine, yours), key
        assert not torch.equal(mine, before[key]), key
    _check_state(optimizer, reference, dict(theirs.named_parameters()))


def _check_state(optimizer: Optimizer, reference: torch.optim.Optimizer, theirs: dict[str, nn.Parameter]) -> None:
    for key, parameter in theirs.items():
        their_state = {part.removesuffix("_buffer"): value for part, value in reference.state[parameter].items()}
        their_state = {part: value for part, value in their_state.items() if part != "step" and value is not None}
        own_state = optimizer.state.get(key, {})
        assert own_state.keys() == their_state.keys()
        assert all(torch.equal(own_state[part], their_state[part]) for part in own_state), key
        assert sum(value.numel() for value in own_state.values()) == state_floats(
            optimizer.settings.name, tuple(parameter.shape)
        )


SHAPES: tuple[tuple[int, ...], ...] = (
    (), (1,), (7,), (40_000,), (1, 1), (5, 3), (1, 9), (9, 1), (257, 300), (2, 3, 4), (8, 3, 5, 5), (1, 2, 1, 3, 2),
)  # fmt: skip


def _gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Of every size that a gradient may have, and now and then with rows of nothing."""
    gradient = torch.randn(shape) * 10.0 ** ((step * 7) % 23 - 15)
    if step % 4 == 3 and len(shape) > 1:
        gradient[0] = 0
    return gradient


def _compare_with_torch(
    name: OptimizerName, parameters: dict[str, Tensor], weight_decay: float, steps: int, rate: float
) -> None:
    ours = {key: nn.Parameter(value.clone()) for key, value in parameters.items()}
    theirs = {key: nn.Parameter(value.clone()) for key, value in parameters.items()}
    optimizer = Optimizer(OptimizerSettings(name=name, weight_decay=weight_decay))
    reference = _torch_optimizer(name, theirs, weight_decay)
    for step in range(steps):
        for key, value in ours.items():
            value.grad = _gradient(tuple(value.shape), step).contiguous()
            theirs[key].grad = value.grad.clone()
        for group in reference.param_groups:
            group["lr"] = rate / (1 + step % 3)
        with torch.no_grad():
            optimizer.step(ours.items(), rate / (1 + step % 3))
        reference.step()
        for key, value in ours.items():
            assert torch.isfinite(value).all(), (key, step)
            assert torch.equal(value, theirs[key]), (key, step)
    _check_state(optimizer, reference, theirs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_parameters_of_all_shapes_equal_torchs_to_the_last_bit(name: OptimizerName, threads: int) -> None:
    torch.manual_seed(3)
    parameters = {f"p{number}": torch.randn(shape) * 0.02 for number, shape in enumerate(SHAPES)}
    # A bias or a LayerScale that starts at nothing: Adafactor's smallest scale.
    parameters["nothing"] = torch.zeros(11)
    parameters["channels_last"] = torch.randn(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Beyond 1/sqrt(step) too, where Adafactor's own schedule takes over; SGD would leave float32 at that rate.
        _compare_with_torch(name, parameters, 0.05, STEPS, 1e-3 if name in ("sgd", "momentum") else 0.9)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(RULES),
    shape=st.lists(st.integers(1, 9), max_size=5),
    weight_decay=st.sampled_from([0.0, 0.05, 1.0]),
    rate=st.floats(0, 0.5),
    size=st.sampled_from([0.0, 1e-30, 1e-4, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_rate_and_decay_equals_torchs(
    name: OptimizerName, shape: list[int], weight_decay: float, rate: float, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    _compare_with_torch(name, {"weight": torch.randn(shape) * size}, weight_decay, 3, rate)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
def test_a_parameter_of_no_elements_is_no_obstacle(name: OptimizerName, shape: tuple[int, ...]) -> None:
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer(OptimizerSettings(name=name))
    for _ in range(2):
        for parameter in (empty, other):
            parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            optimizer.step([("empty", empty), ("other", other)], 0.1)
            assert optimizer.update_one("empty", empty, 0.1)
    assert empty.shape == shape
    assert (other < 1).all()


@pytest.mark.parametrize("name", RULES)
def test_state_is_keyed_by_name_and_of_updated_parameters_only(name: OptimizerName) -> None:
    model = _model()
    model[0].requires_grad_(False)
    frozen = {key: value.clone() for key, value in model[0].state_dict().items()}
    optimizer = Optimizer(OptimizerSettings(name=name, weight_decay=0.5))
    for step in range(3):
        model.zero_grad(set_to_none=True)
        _loss(model, step).backward()
        with torch.no_grad():
            optimizer.step(model.named_parameters(), 0.1)
    updated = {key for key, value in model.named_parameters() if value.requires_grad}
    assert set(optimizer.steps) == updated
    assert set(optimizer.steps.values()) == {3}
    assert set(optimizer.state) == (updated if STATE_KEYS[name] else set())
    for key, parameter in model.named_parameters():
        if key in optimizer.state:
            made = {part: tuple(value.shape) for part, value in optimizer.state[key].items()}
            assert made == state_shapes(name, tuple(parameter.shape))
            assert set(made) <= set(STATE_KEYS[name])
    # Weight decay does not reach what has no gradient.
    assert all(torch.equal(frozen[key], value) for key, value in model[0].state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "momentum", "adafactor"])
def test_state_of_a_parameter_that_pauses_waits_for_it(name: OptimizerName) -> None:
    """A block that is drawn in steps 1 and 3 has the state of two steps, as if it had never paused."""

    def after(steps: list[bool]) -> tuple[Tensor, int]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        optimizer = Optimizer(OptimizerSettings(name=name))
        for number, drawn in enumerate(steps):
            parameter.grad = torch.full((2, 3), 0.3 + number // 2) if drawn else None
            with torch.no_grad():
                optimizer.step([("blocks.0.weight", parameter)], 0.1)
        return parameter.detach(), optimizer.steps["blocks.0.weight"]

    paused, paused_steps = after([True, False, True])
    straight, straight_steps = after([True, False, True, False])
    assert torch.equal(paused, straight)
    assert (paused_steps, straight_steps) == (2, 2)


def test_weight_decay_shrinks_matrices_and_nothing_else() -> None:
    names = {
        "blocks.0.attn.qkv.weight": (6, 2), "patch_embed.proj.weight": (2, 3, 4, 4), "head.weight": (3, 2),
        "blocks.0.attn.qkv.bias": (6,), "blocks.0.norm1.weight": (2,), "blocks.0.ls1.gamma": (2,),
        "pos_embed": (1, 5, 2), "cls_token": (1, 1, 2), "reg_token": (1, 4, 2), "dist_token": (1, 1, 2),
    }  # fmt: skip
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Optimizer(OptimizerSettings(name="adamw", weight_decay=0.1))
    with torch.no_grad():
        optimizer.step(parameters.items(), 0.5)
    shrunk = {name for name, parameter in parameters.items() if not torch.equal(parameter, torch.ones(names[name]))}
    assert shrunk == {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"}
    assert torch.equal(parameters["head.weight"], torch.full((3, 2), 1 - 0.5 * 0.1))


@pytest.mark.parametrize("name", RULES)
def test_reserving_state_beforehand_changes_no_bit(name: OptimizerName) -> None:
    results = []
    for reserves in (False, True):
        model = _model()
        optimizer = Optimizer(OptimizerSettings(name=name))
        if reserves:
            optimizer.reserve(model.named_parameters())
            made = {key for key, state in optimizer.state.items() if all(not value.any() for value in state.values())}
            assert made == ({key for key, _ in model.named_parameters()} if STATE_KEYS[name] else set())

        def update(rate: float, model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
            with torch.no_grad():
                optimizer.step(model.named_parameters(), rate)

        _train(model, update)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", RULES)
def test_state_that_went_through_arrays_goes_on_bit_identically(name: OptimizerName) -> None:
    straight, resumed = _model(), _model()
    optimizers = [Optimizer(OptimizerSettings(name=name)) for _ in range(2)]
    for step in range(6):
        if step == 3:
            parts = {
                f"{key}|{part}": value.numpy().copy()
                for key, s in optimizers[1].state.items()
                for part, value in s.items()
            }
            steps = dict(optimizers[1].steps)
            optimizers[1] = Optimizer(OptimizerSettings(name=name))
            for key, array in parts.items():
                owner, _, part = key.rpartition("|")
                optimizers[1].state.setdefault(owner, {})[part] = torch.from_numpy(array)
            optimizers[1].steps = steps
        for model, optimizer in zip((straight, resumed), optimizers, strict=True):
            model.zero_grad(set_to_none=True)
            _loss(model, step).backward()
            with torch.no_grad():
                optimizer.step(model.named_parameters(), 0.01)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in straight.state_dict().items())


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_whose_state_was_evicted_starts_afresh(name: OptimizerName) -> None:
    """Bias correction and Adafactor's averages at step 1, as if the parameter had never been trained before."""

    def updated(parameter: nn.Parameter, optimizer: Optimizer, step: int) -> Tensor:
        parameter.grad = torch.full((3, 4), 0.5 + step)
        with torch.no_grad():
            optimizer.step([("blocks.0.weight", parameter)], 0.01)
        return parameter.detach().clone()

    optimizer = Optimizer(OptimizerSettings(name=name))
    left, stays = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(2))
    stays.grad = torch.ones(2)
    with torch.no_grad():
        optimizer.step([("head.bias", stays)], 0.01)
    for step in range(3):
        updated(left, optimizer, step)
    head_state = dict(optimizer.state.get("head.bias", {}))
    optimizer.evict(keep={"head.bias"})
    assert optimizer.steps == {"head.bias": 1}
    assert optimizer.state == ({"head.bias": head_state} if head_state else {})
    optimizer.reserve([("blocks.0.weight", left)])
    assert all(not value.any() for value in optimizer.state.get("blocks.0.weight", {}).values())
    fresh = nn.Parameter(left.detach().clone())
    first = updated(fresh, Optimizer(OptimizerSettings(name=name)), 7)
    assert torch.equal(updated(left, optimizer, 7), first)
    assert optimizer.steps == {"head.bias": 1, "blocks.0.weight": 1}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_float32_on_one_device_is_refused_by_name(device: str) -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    if device == "meta":
        second = nn.Parameter(torch.ones(2, device="meta"))
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    optimizer = Optimizer(OptimizerSettings())
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=r"float32 on one device; second is"):
        optimizer.step([("first", first), ("second", second)], 0.1)
    assert torch.equal(first, torch.ones(2))
    assert (optimizer.state, optimizer.steps) == ({}, {})


def test_importing_the_optimizers_imports_no_torch() -> None:
    script = (
        "import sys, edgetune.optim; print([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_step_brings_no_module_that_torch_has_not() -> None:
    script = """
import json, sys, torch
before = set(sys.modules)
from edgetune.optim import Optimizer, OptimizerSettings
for name in ("adamw", "momentum", "sgd", "adafactor"):
    for shape in ((3, 3), (3,), (3, 2, 4, 4)):
        parameter = torch.nn.Parameter(torch.ones(shape))
        parameter.grad = torch.ones(shape)
        optimizer = Optimizer(OptimizerSettings(name=name))
        with torch.no_grad():
            optimizer.step([("weight", parameter)], 0.1)
            optimizer.reserve_scratch([("weight", parameter)])
            assert optimizer.update_one("weight", parameter, 0.1)
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.startswith("torch."))))
print(json.dumps("torch._dynamo" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new, dynamo = map(json.loads, done.stdout.splitlines())
    assert new == []
    assert dynamo is False
