"""The optimizers equal torch's to the last bit, and bring nothing of torch.optim with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from edgetune.optim import STATE_KEYS, Optimizer, OptimizerName, OptimizerSettings, decays

STEPS = 20


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


def _torch_optimizer(name: OptimizerName, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n, p.ndim)], "weight_decay": weight_decay},
        {"params": [p for n, p in model.named_parameters() if not decays(n, p.ndim)], "weight_decay": 0.0},
    ]
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
@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_twenty_steps_equal_torchs_to_the_last_bit(name: OptimizerName, weight_decay: float) -> None:
    ours, theirs = _model(), _model()
    optimizer = Optimizer(OptimizerSettings(name=name, weight_decay=weight_decay))
    reference = _torch_optimizer(name, theirs, weight_decay)

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
    torch_keys = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
    for key, parameter in theirs.named_parameters():
        for part in STATE_KEYS[name]:
            assert torch.equal(optimizer.state[key][part], reference.state[parameter][torch_keys[part]])


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
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
    assert all(set(state) == set(STATE_KEYS[name]) for state in optimizer.state.values())
    # Weight decay does not reach what has no gradient.
    assert all(torch.equal(frozen[key], value) for key, value in model[0].state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "momentum"])
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


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
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


def test_a_step_brings_no_module_that_torch_has_not() -> None:
    script = """
import json, sys, torch
before = set(sys.modules)
from edgetune.optim import Optimizer, OptimizerSettings
parameter = torch.nn.Parameter(torch.ones(3, 3))
for name in ("adamw", "momentum", "sgd"):
    parameter.grad = torch.ones(3, 3)
    with torch.no_grad():
        Optimizer(OptimizerSettings(name=name)).step([("weight", parameter)], 0.1)
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.startswith("torch."))))
print(json.dumps("torch._dynamo" in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    new, dynamo = map(json.loads, done.stdout.splitlines())
    assert new == []
    assert dynamo is False
