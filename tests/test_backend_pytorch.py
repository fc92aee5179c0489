"""One optimizer step: however it is cut, whatever is frozen, and when its loss is no number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.backends import nnpack

from edgetune.backends.base import Backend, Images, Labels, StepResult
from edgetune.backends.pytorch import TorchBackend, own_kernels, warm_up
from edgetune.cost import Selection
from edgetune.optim import STATE_KEYS, OptimizerName, OptimizerSettings
from edgetune.regions import region_of
from edgetune.vit.loop import named_regions

DEPTH, CLASSES, TOKENS = 4, 3, 16
ALL = Selection((True,) * DEPTH, (TOKENS,) * DEPTH, embeddings_train=True)
PRUNED = Selection((False, True, False, True), (16, 16, 12, 9))


def _model(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": DEPTH, "num_heads": 3, "num_classes": CLASSES,
        "init_values": 0.5,
    }  # fmt: skip
    model = VisionTransformer(**(sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _backend(optimizer: OptimizerName = "adamw", weight_decay: float = 0.05, **options: object) -> TorchBackend:
    settings = OptimizerSettings(name=optimizer, weight_decay=weight_decay)
    return TorchBackend(_model(), settings, **options)  # type: ignore[arg-type]


def _images(count: int, seed: int = 0) -> tuple[Images, Labels]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, 32, 32), np.float32), rng.integers(0, CLASSES, count)


def _step(
    backend: Backend,
    selection: Selection = ALL,
    *,
    count: int = 6,
    cut: int = 6,
    seed: int = 0,
    weights: np.ndarray | None = None,
    rate: float = 1e-2,
) -> StepResult:
    inputs, labels = _images(count, seed)

    def batches() -> Iterator[tuple[Images, Labels]]:
        for start in range(0, count, cut):
            yield inputs[start : start + cut], labels[start : start + cut]

    weight_sum = float(count if weights is None else weights[labels].sum())
    return backend.step(
        batches(), selection, images=count, weight_sum=weight_sum, learning_rate=rate, seed=seed, with_deltas=True
    )


def _values(backend: TorchBackend) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in backend.model_tensors().items()}


def _changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name, value in before.items() if value.tobytes() != after[name].tobytes()}


def _record_gradients(backend: TorchBackend) -> dict[str, Tensor]:
    """The gradients with which the next step updates, once it has run."""
    seen: dict[str, Tensor] = {}
    update = backend.optimizer.step

    def step(named: Iterator[tuple[str, nn.Parameter]], rate: float) -> None:
        parameters = list(named)
        seen.clear()
        seen.update({name: value.grad.clone() for name, value in parameters if value.grad is not None})
        update(parameters, rate)

    backend.optimizer.step = step  # type: ignore[assignment,method-assign]
    return seen


@pytest.mark.parametrize("selection", [ALL, PRUNED], ids=["all", "pruned"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, np.array([0.2, 1.0, 3.0], np.float32)], ids=["unweighted", "weighted"])
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(
    selection: Selection, smoothing: float, weights: np.ndarray | None
) -> None:
    whole_gradients, results = None, []
    for cut in (7, 3, 1):  # 3 leaves a remainder of one
        backend = _backend("sgd", class_weights=weights, label_smoothing=smoothing)
        gradients = _record_gradients(backend)
        results.append(_step(backend, selection, count=7, cut=cut, weights=weights))
        if whole_gradients is None:
            whole_gradients = gradients
        assert gradients.keys() == whole_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    whole = results[0]
    assert whole.class_token_deltas is not None
    for result in results[1:]:
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert result.class_token_deltas == pytest.approx(whole.class_token_deltas, rel=1e-5)
        assert (result.correct, result.images) == (whole.correct, whole.images) == (whole.correct, 7)


@pytest.mark.parametrize("weights", [None, np.array([0.2, 1.0, 3.0], np.float32)], ids=["unweighted", "weighted"])
def test_the_loss_and_its_gradient_are_torchs_own_mean(weights: np.ndarray | None) -> None:
    backend, model = _backend("sgd", class_weights=weights, label_smoothing=0.1), _model()
    gradients = _record_gradients(backend)
    result = _step(backend, weights=weights)
    inputs, labels = _images(6)
    logits = model.train()(torch.from_numpy(inputs))
    weight = None if weights is None else torch.from_numpy(weights)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels), weight=weight, label_smoothing=0.1)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.correct == int((logits.argmax(1).numpy() == labels).sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


ROTATION = [
    PRUNED,
    Selection((True, False, False, False), (16,) * 4),
    ALL,
    Selection((False,) * 4, (16,) * 4),
    Selection((False, False, True, False), (16, 16, 16, 5)),
    Selection((False, False, True, False), (16, 12, 9, 5)),
    Selection((True,) * 4, (16, 8, 4, 2)),
    PRUNED,
]


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_after_every_change_of_the_trained_set_what_trains_moves_and_all_else_is_bit_equal(
    optimizer: OptimizerName,
) -> None:
    backend = _backend(optimizer, weight_decay=0.5)
    gradients = _record_gradients(backend)
    ever: set[str] = set()
    for number, selection in enumerate(ROTATION):
        before = _values(backend)
        _step(backend, selection, seed=number, cut=4)
        trained = {
            name
            for region, name, _ in named_regions(backend.model)
            if region == "head" or (selection.trains[region] if isinstance(region, int) else selection.embeddings_train)
        }
        ever |= trained
        assert backend.trained_names(selection) == trained
        assert gradients.keys() == trained
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        assert _changed(before, _values(backend)) == trained
        assert set(backend.optimizer_steps()) == ever
        assert all(parameter.grad is None for parameter in backend.model.parameters())


def test_frozen_values_stay_bit_equal_over_many_steps_with_weight_decay() -> None:
    backend = _backend("adamw", weight_decay=1.0)
    _step(backend, ALL)  # so that there are gradients and state that could leak
    before = _values(backend)
    for number in range(5):
        _step(backend, PRUNED, seed=number)
        backend.evaluate(_images(2)[0])
    frozen = {name for name in before if region_of(name) in ("embeddings", 0, 2)}
    assert not _changed(before, _values(backend)) & frozen


@pytest.mark.parametrize("bad_batch", [0, 1])
def test_a_loss_that_is_no_number_leaves_everything_unchanged(bad_batch: int) -> None:
    backend = _backend()
    _step(backend)
    before = _values(backend)
    state = {name: np.array(value) for name, value in backend.optimizer_tensors()}
    steps = backend.optimizer_steps()
    inputs, labels = _images(6)
    inputs[3 * bad_batch] = math.nan
    batches = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    result = backend.step(batches, ALL, images=6, weight_sum=6.0, learning_rate=0.1, seed=1, with_deltas=True)
    assert not result.updated
    assert math.isnan(result.loss)
    assert not _changed(before, _values(backend))
    assert not _changed(state, dict(backend.optimizer_tensors()))
    assert backend.optimizer_steps() == steps
    # And no gradient of the good half is left to the next step.
    assert all(parameter.grad is None for parameter in backend.model.parameters())
    other = _backend()
    _step(other)
    assert _step(backend, seed=2) == _step(other, seed=2)
    assert not _changed(_values(backend), _values(other))


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_a_restored_backend_goes_on_bit_identically(optimizer: OptimizerName) -> None:
    straight = _backend(optimizer)
    for number, selection in enumerate(ROTATION[:2]):
        _step(straight, selection, seed=number)
    model = _values(straight)
    state = {name: np.array(value) for name, value in straight.optimizer_tensors()}
    for array in (*model.values(), *state.values()):
        array.flags.writeable = False  # as arrays over a file's bytes are
    steps = straight.optimizer_steps()
    resumed = TorchBackend(_model(num_classes=CLASSES), OptimizerSettings(name=optimizer))
    _step(resumed, seed=99)  # whatever it did before is gone
    resumed.restore(model, state, steps)
    assert {name for name, _ in resumed.optimizer_tensors()} == set(state)
    for number, selection in enumerate(ROTATION[2:]):
        assert _step(straight, selection, seed=number) == _step(resumed, selection, seed=number)
    assert not _changed(_values(straight), _values(resumed))
    assert straight.optimizer_steps() == resumed.optimizer_steps()
    assert not _changed(dict(straight.optimizer_tensors()), dict(resumed.optimizer_tensors()))
    # The restored state is its own: training went on without changing what it was restored from.
    assert all(not array.flags.writeable for array in state.values())


def test_part_of_the_values_can_be_restored_alone() -> None:
    backend, other = _backend(), _backend()
    _step(backend)
    moved = {name: value for name, value in _values(backend).items() if name.startswith("blocks.3.")}
    other.restore(moved, {}, {})
    assert _changed(_values(other), _values(_backend())) == set(moved)
    assert other.optimizer_steps() == {}


def test_what_a_checkpoint_asks_for_is_named_as_timm_names_it() -> None:
    backend = _backend("adamw")
    _step(backend, Selection((False, False, False, True), (16,) * 4))
    assert list(backend.model_tensors()) == list(backend.model.state_dict())
    trained = {name for name in dict(backend.model.named_parameters()) if region_of(name) in (3, "head")}
    assert {name for name, _ in backend.optimizer_tensors()} == {
        f"{name}|{key}" for name in trained for key in STATE_KEYS["adamw"]
    }


def test_reserved_state_is_there_before_the_first_step_and_changes_no_bit() -> None:
    plain, reserved = _backend(), _backend()
    space = Selection((False, True, False, True), (16,) * 4)
    reserved.reserve(space)
    assert {name.rpartition("|")[0] for name, _ in reserved.optimizer_tensors()} == reserved.trained_names(space)
    assert _step(plain, PRUNED) == _step(reserved, PRUNED)
    assert not _changed(_values(plain), _values(reserved))


def test_evaluation_is_plain_timms_on_all_tokens_and_touches_nothing() -> None:
    # With drop path: a model left in eval mode would train without it.
    backend, undisturbed = (TorchBackend(_model(drop_path_rate=0.5), OptimizerSettings()) for _ in range(2))
    inputs, _ = _images(5, seed=3)
    for number in range(3):
        before = _values(backend)
        logits = backend.evaluate(inputs)
        assert not _changed(before, _values(backend))
        plain = _model()
        plain.load_state_dict(backend.model.state_dict())
        with torch.no_grad():
            assert np.array_equal(logits, plain.eval()(torch.from_numpy(inputs)).numpy())
        assert _step(backend, PRUNED, seed=number) == _step(undisturbed, PRUNED, seed=number)
    assert not _changed(_values(backend), _values(undisturbed))


def test_dropout_draws_from_the_steps_seed_alone() -> None:
    def losses(seed: int, global_seed: int) -> float:
        backend = TorchBackend(_model(drop_path_rate=0.5, proj_drop_rate=0.3), OptimizerSettings())
        torch.manual_seed(global_seed)
        return _step(backend, seed=seed).loss

    assert losses(1, 5) == losses(1, 6)
    assert losses(1, 5) != losses(2, 5)


def test_one_image_and_one_class_more_than_the_batch_work() -> None:
    result = _step(_backend(), PRUNED, count=1, cut=1)
    assert result.updated
    assert result.images == 1


def test_without_deltas_none_are_reported() -> None:
    inputs, labels = _images(2)
    result = _backend().step(
        [(inputs, labels)], ALL, images=2, weight_sum=2.0, learning_rate=0.1, seed=0, with_deltas=False
    )
    assert result.class_token_deltas is None


def test_the_peak_is_looked_at_in_every_micro_batch() -> None:
    held: list[int] = []
    backend = _backend(at_peak=lambda: held.append(1))
    _step(backend, count=7, cut=3)
    assert len(held) == 3


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_the_warm_up_runs(optimizer: OptimizerName) -> None:
    warm_up(OptimizerSettings(name=optimizer))


def test_a_finite_loss_with_a_gradient_that_is_not_changes_nothing() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=3)
    backend = TorchBackend(model, OptimizerSettings())
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, labels = np.ones((2, 3, 16, 16), np.float32), np.array([0, 1])
    result = backend.step(
        [(inputs, labels)],
        Selection((True, True), (4, 4)),
        images=2,
        weight_sum=2.0,
        learning_rate=0.1,
        seed=0,
        with_deltas=False,
    )
    assert not result.updated
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert backend.optimizer_steps() == {}


def test_what_frozen_blocks_put_out_of_an_image_does_not_depend_on_how_many_go_with_it() -> None:
    # 16 images of 16 px patches are what NNPACK would take over; a cache is made in other batches than steps are done in.
    model = VisionTransformer(img_size=224, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=2)
    backend = TorchBackend(model, OptimizerSettings())
    images = np.random.default_rng(0).standard_normal((16, 3, 224, 224)).astype(np.float32)
    onednn = torch.backends.mkldnn.enabled
    with nnpack.flags(enabled=True):
        own_kernels()
        whole = backend.features(images, (196, 196), pooled=False)
        for size in (1, 8):
            parts = [
                backend.features(images[start : start + size], (196, 196), pooled=False) for start in range(0, 16, size)
            ]
            assert np.concatenate(parts).tobytes() == whole.tobytes()
    torch.backends.mkldnn.enabled = onednn
