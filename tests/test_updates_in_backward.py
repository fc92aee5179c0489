"""The optimizer step inside the backward, and state that does not stay: the same bits, and nothing outlives its use."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from live_bytes import live_growth_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from edgetune.backends.base import StepResult
from edgetune.backends.pytorch import TorchBackend
from edgetune.cost import Recompute, Selection
from edgetune.optim import OptimizerName, OptimizerSettings
from edgetune.regions import region_of

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DEPTH = 3
ALL = Selection((True,) * DEPTH, (16,) * DEPTH, embeddings_train=True)
PRUNED = Selection((False, True, True), (16, 12, 9))
FIRST_ONLY = Selection((True, False, False), (16,) * DEPTH)


def _model(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": 3, "num_classes": 3}
    model = VisionTransformer(**{**sizes, "init_values": 0.5, "drop_path_rate": 0.3, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _backend(
    optimizer: OptimizerName = "adamw", model: VisionTransformer | None = None, **options: Any
) -> TorchBackend:
    return TorchBackend(model or _model(), OptimizerSettings(name=optimizer, **options))


def _step(
    backend: TorchBackend,
    selection: Selection = ALL,
    *,
    in_backward: bool = True,
    seed: int = 0,
    images: int = 4,
    keeps_state: bool = True,
) -> StepResult:
    px = backend.model.patch_embed.img_size
    rng = np.random.default_rng(seed)
    batch = (rng.standard_normal((images, 3, *px), np.float32), rng.integers(0, 3, images))
    return backend.step(
        [batch],
        selection,
        images=images,
        weight_sum=float(images),
        learning_rate=0.05,
        seed=seed,
        with_deltas=True,
        updates_in_backward=in_backward,
        keeps_state=keeps_state,
    )


def _everything(backend: TorchBackend) -> dict[str, bytes]:
    """All that training changes, to the bit."""
    tensors = {**backend.model_tensors(), **dict(backend.optimizer_tensors())}
    steps = {f"{name} steps": str(count).encode() for name, count in backend.optimizer_steps().items()}
    return {name: np.asarray(value).tobytes() for name, value in tensors.items()} | steps


def _is_clean(backend: TorchBackend) -> bool:
    """Nothing of a step is left: no gradient, no hook, no scratch."""
    return backend.optimizer._scratch is None and not any(
        parameter.grad is not None or parameter._post_accumulate_grad_hooks for parameter in backend.model.parameters()
    )


def _with(selection: Selection, level: Recompute) -> Selection:
    return Selection(selection.trains, selection.tokens, selection.embeddings_train, (level,) * DEPTH)


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_in_the_backward_equals_one_after_it_to_the_last_bit(optimizer: OptimizerName, level: Recompute) -> None:
    inside, after = _backend(optimizer), _backend(optimizer)
    for seed, selection in enumerate((ALL, PRUNED, FIRST_ONLY, ALL)):
        results = [
            _step(inside, _with(selection, level), seed=seed),
            _step(after, selection, seed=seed, in_backward=False),
        ]
        assert results[0] == results[1]
        assert results[0].updated
        assert _everything(inside) == _everything(after)
        assert _is_clean(inside)
    assert set(inside.optimizer_steps().values()) == {2, 3, 4}


@pytest.mark.parametrize("level", list(Recompute))
def test_no_more_than_one_layers_gradient_is_ever_there(level: Recompute) -> None:
    """Few tokens and wide layers, so that gradients are nearly all that a backward makes."""
    model = _model(embed_dim=384, num_heads=6, img_size=16, init_values=None)
    backend = _backend("sgd", model, weight_decay=0.0)
    blocks = Selection((True,) * DEPTH, (4,) * DEPTH, recompute=(level,) * DEPTH)
    layer = (4 * 384 + 1) * 384 * 4  # fc2; weight and bias come from one node
    trained = sum(value.numel() for name, value in model.named_parameters() if region_of(name) != "embeddings") * 4
    activations = DEPTH * 5 * 384 * 20 * 4
    assert activations < layer / 3
    peaks = {
        in_backward: max(live_growth_bytes(lambda: _step(backend, blocks, images=1, in_backward=in_backward)))  # noqa: B023
        for in_backward in (True, False)
    }
    assert trained < peaks[False]
    assert layer < peaks[True] < layer + activations
    assert peaks[True] < trained / 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_no_number_updates_nothing_from_there_down(optimizer: OptimizerName) -> None:
    backend = _backend(optimizer)
    _step(backend)
    before, steps = _everything(backend), backend.optimizer_steps()
    handle = backend.model.blocks[1].mlp.fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    result = _step(backend, seed=1)
    handle.remove()
    assert not result.updated
    assert math.isnan(result.loss)
    moved = {name for name, value in backend.optimizer_steps().items() if value != steps[name]}
    # fc1's bias may come first: both are of one node.
    assert {"head.weight", "norm.weight", "blocks.2.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= moved
    assert all(region_of(name) in ("head", 2) or name.startswith(("blocks.1.mlp.fc", "blocks.1.ls2")) for name in moved)
    assert "blocks.1.mlp.fc1.weight" not in moved
    now = _everything(backend)
    changed = {name.split("|")[0].split(" ")[0] for name, value in now.items() if value != before[name]}
    assert changed == moved
    assert all(np.isfinite(value).all() for value in backend.model_tensors().values())
    assert _is_clean(backend)
    assert _step(backend, seed=2).updated
    assert set(backend.optimizer_steps().values()) == {2, 3}


def test_a_loss_that_is_no_number_updates_nothing() -> None:
    backend = _backend()
    _step(backend)
    before = _everything(backend)
    backend.model.head.register_forward_hook(lambda _module, _inputs, output: output * math.nan)
    assert not _step(backend, seed=1).updated
    assert _everything(backend) == before
    assert _is_clean(backend)


def _fail_once(parameter: Tensor) -> None:
    """The next gradient of this parameter ends the backward."""

    def fail(_gradient: Tensor) -> None:
        handle.remove()
        raise RuntimeError("can't allocate memory")

    handle = parameter.register_hook(fail)


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize("name", ["head.weight", "blocks.1.mlp.fc1.weight", "blocks.0.norm1.weight", "pos_embed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_failed_in_its_backward_is_called_again_and_updates_each_parameter_once(
    optimizer: OptimizerName, name: str, level: Recompute
) -> None:
    backend = _backend(optimizer)
    _step(backend)
    start = _everything(backend)
    _fail_once(backend.model.get_parameter(name))
    with pytest.raises(RuntimeError, match="can't allocate"):
        _step(backend, _with(ALL, level), seed=1)
    assert _is_clean(backend)
    half_way = _everything(backend)
    done = set(backend.optimizer.updated)
    assert {key for key, count in backend.optimizer_steps().items() if count == 2} == done
    assert name not in done
    assert ("head.weight" in done) is (name != "head.weight")
    assert _step(backend, _with(ALL, level), seed=1).updated
    assert Counter(backend.optimizer_steps().values()) == {2: len(list(backend.model.parameters()))}
    end = _everything(backend)
    trained = [key for key, _ in backend.model.named_parameters()]
    assert all(start[key] != end[key] for key in trained)
    assert all(half_way[key] == (end if key in done else start)[key] for key in trained)
    assert _is_clean(backend)
    assert _step(backend, seed=2).updated
    assert set(backend.optimizer_steps().values()) == {3}


class _FailingAllocations(TorchDispatchMode):
    """Fails the allocation of a tensor numbered `fail_at`, counted from 0."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.left = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        if any(isinstance(value, Tensor) and _storage(value) not in known for value in tree_flatten(result)[0]):
            self.left -= 1
            if self.left == -1:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return result


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@pytest.mark.parametrize("level", [Recompute.NOTHING, Recompute.MLP, Recompute.BLOCK])
@pytest.mark.parametrize(("optimizer", "stride"), [("adamw", 23), ("adafactor", 29)])
def test_whichever_allocation_of_a_step_fails_it_can_be_called_again(
    optimizer: OptimizerName, stride: int, level: Recompute
) -> None:
    """Where no update was done before it failed, it then ends as if nothing had happened."""
    selection = _with(PRUNED, level)
    undisturbed = _backend(optimizer)
    expected = _step(undisturbed, selection, in_backward=False)
    for in_backward in (False, True):
        untouched = 0
        for fail_at in range(0, 5000, stride):
            backend = _backend(optimizer)
            try:
                with _FailingAllocations(fail_at):
                    _step(backend, selection, in_backward=in_backward)
                break
            except RuntimeError as error:
                assert "can't allocate memory" in str(error)
            assert _is_clean(backend)
            nothing_done = not backend.optimizer.updated
            untouched += nothing_done
            result = _step(backend, selection, in_backward=in_backward)
            assert result.updated
            assert set(backend.optimizer_steps().values()) == {1}
            assert backend.optimizer_steps().keys() == undisturbed.optimizer_steps().keys()
            if nothing_done:
                assert result == expected
                assert _everything(backend) == _everything(undisturbed)
        assert fail_at > 200
        assert untouched > 2


def test_hooks_that_could_not_be_set_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _backend()
    register, left = nn.Parameter.register_post_accumulate_grad_hook, 5

    def fail(parameter: Tensor, hook: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return register(parameter, hook)

    monkeypatch.setattr(nn.Parameter, "register_post_accumulate_grad_hook", fail)
    before = _everything(backend)
    with pytest.raises(MemoryError):
        _step(backend)
    monkeypatch.undo()
    assert _is_clean(backend)
    assert {name: value for name, value in _everything(backend).items() if "|" not in name} == before


def test_a_second_micro_batch_is_refused_rather_than_lost() -> None:
    backend = _backend()
    batch = (np.zeros((2, 3, 32, 32), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="one micro-batch"):
        backend.step(
            [batch, batch],
            ALL,
            images=4,
            weight_sum=4.0,
            learning_rate=0.1,
            seed=0,
            with_deltas=False,
            updates_in_backward=True,
        )
    assert _is_clean(backend)


# State that does not stay


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_of_what_trained_in_the_last_step_alone(optimizer: OptimizerName, in_backward: bool) -> None:
    backend = _backend(optimizer)
    for seed, selection in enumerate((ALL, PRUNED, FIRST_ONLY, PRUNED)):
        _step(backend, selection, seed=seed, keeps_state=False, in_backward=in_backward)
        trained = backend.trained_names(selection)
        assert set(backend.optimizer_steps()) == trained
        assert {name.rpartition("|")[0] for name, _ in backend.optimizer_tensors()} == (
            trained if optimizer != "sgd" else set()
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_comes_back_starts_afresh_and_what_stayed_goes_on(optimizer: OptimizerName) -> None:
    backend = _backend(optimizer)
    for seed, selection in enumerate((ALL, FIRST_ONLY)):
        _step(backend, selection, seed=seed, keeps_state=False)
    # The same values, and of the optimizer only what the last step trained.
    fresh = _backend(optimizer)
    fresh.restore(
        {name: np.array(value) for name, value in backend.model_tensors().items()},
        {name: np.array(value) for name, value in backend.optimizer_tensors()},
        backend.optimizer_steps(),
    )
    for each in (backend, fresh):
        _step(each, ALL, seed=2, keeps_state=False)
    assert _everything(backend) == _everything(fresh)
    steps = backend.optimizer_steps()
    assert {steps[name] for name in steps if region_of(name) in (0, "head")} == {3}
    assert {steps[name] for name in steps if region_of(name) not in (0, "head")} == {1}
    # Which is another step than with the state kept.
    keeping = _backend(optimizer)
    for seed, selection in enumerate((ALL, FIRST_ONLY, ALL)):
        _step(keeping, selection, seed=seed)
    assert (_everything(keeping) == _everything(backend)) is False
