"""numpy arrays update as torch's tensors do: the same rules, the same numbers, and no memory of a parameter's size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgetune.backends.arrays import ArrayTensor
from edgetune.optim import STATE_KEYS, Optimizer, OptimizerName, OptimizerSettings

SHAPES = {"blocks.0.weight": (37, 19), "blocks.0.bias": (23,), "patch.weight": (5, 3, 4, 4), "large": (300, 200)}


@pytest.mark.parametrize("name", list(STATE_KEYS))
def test_five_updates_are_torchs(name: OptimizerName) -> None:
    rng = np.random.default_rng(0)
    settings = OptimizerSettings(name=name, weight_decay=0.1)
    start = {key: rng.standard_normal(shape, np.float32) for key, shape in SHAPES.items()}
    arrays = {key: ArrayTensor(value.copy()) for key, value in start.items()}
    tensors = {key: torch.from_numpy(value.copy()) for key, value in start.items()}
    one, other = Optimizer(settings), Optimizer(settings)
    for step in range(5):
        for key, shape in SHAPES.items():
            gradient = rng.standard_normal(shape, np.float32) * 10.0 ** (step - 2)
            arrays[key].grad = ArrayTensor(gradient.copy())
            tensors[key].grad = torch.from_numpy(gradient)
        one.step(arrays.items(), 1e-2)
        with torch.no_grad():
            other.step(tensors.items(), 1e-2)
        for key, array in arrays.items():
            np.testing.assert_allclose(array.values, tensors[key].numpy(), rtol=2e-6, atol=1e-6)
            for part, state in one.state.get(key, {}).items():
                np.testing.assert_allclose(
                    state.numpy(), other.state[key][part].numpy(), rtol=1e-5, atol=1e-6 * 10.0 ** max(0, step - 2)
                )
    assert all((arrays[key].values != value).any() for key, value in start.items())


def test_a_gradient_that_is_no_number_updates_nothing() -> None:
    array = ArrayTensor(np.ones(4, np.float32), ArrayTensor(np.array([1, np.inf, 1, 1], np.float32)))
    optimizer = Optimizer(OptimizerSettings(name="sgd"))
    assert not optimizer.update_one("x", array, 0.1)
    np.testing.assert_array_equal(array.values, 1)


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_an_update_takes_the_scratch_it_says_and_little_more(name: OptimizerName) -> None:
    settings = OptimizerSettings(name=name, weight_decay=0.1)
    size = 2_000_000
    array = ArrayTensor(
        np.ones((size // 1000, 1000), np.float32), ArrayTensor(np.ones((size // 1000, 1000), np.float32))
    )
    optimizer = Optimizer(settings)
    optimizer.reserve([("x", array)])
    tracemalloc.start()
    optimizer.step([("x", array)], 1e-3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * size + 300_000  # one copy: the scratch that `scratch_floats` counts
