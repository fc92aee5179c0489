"""Artifacts load in the runtime they are for, hold what the manifest says, and train as torch does."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra makes artifacts")
torch = pytest.importorskip("torch")

from edgetune.artifacts.manifest import MOST_IR, MOST_OPSET, Manifest, Schedule
from edgetune.artifacts.reading import check_files, read_manifest
from edgetune.backends.ort import OrtBackend, load_variant
from edgetune.backends.ort_runtime import training_api
from edgetune.backends.pytorch import TorchBackend
from edgetune.cost import Selection
from edgetune.errors import ArtifactsError, DataError, UnsupportedModel
from edgetune.export.parity import batches, selections
from edgetune.optim import OptimizerSettings
from edgetune.vit.models import ModelSource, load_saved

ALL = (16,) * 4


@pytest.fixture(scope="module")
def manifest(artifacts: Path) -> Manifest:
    return read_manifest(artifacts)


def torch_side(artifacts: Path, manifest: Manifest, optimizer: str = "sgd", **more: Any) -> TorchBackend:
    """The same weights in torch."""
    from edgetune.checkpoint import load_tensors
    from edgetune.vit.models import load_model

    model = load_model(ModelSource(name=manifest.model, pretrained=False), manifest.shape.classes).model
    values = load_tensors(artifacts / manifest.weights)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return TorchBackend(model, OptimizerSettings(name=optimizer), **more)  # type: ignore[arg-type]


def ort_side(artifacts: Path, manifest: Manifest, variant: str, optimizer: str = "sgd", **more: Any) -> OrtBackend:
    return OrtBackend(artifacts, manifest, manifest.variant(variant), OptimizerSettings(name=optimizer), **more)  # type: ignore[arg-type]


def step(side: Any, parts: list[Any], selection: Selection, **changes: Any) -> Any:
    images = sum(len(labels) for _, labels in parts)
    given: dict[str, Any] = {
        "images": images, "weight_sum": float(images), "learning_rate": 1e-2, "seed": 0, "with_deltas": True,
    }  # fmt: skip
    return side.step(parts, selection, **(given | changes))


def worst(one: Any, other: Any) -> float:
    values = other.model_tensors()
    return max(float(np.abs(value - values[name]).max()) for name, value in one.model_tensors().items())


def test_every_file_is_listed_and_every_graph_is_one_that_the_runtime_takes(
    artifacts: Path, manifest: Manifest
) -> None:
    check_files(artifacts, manifest)
    graphs = [name for name in manifest.files if name.endswith(".onnx")]
    assert len(graphs) == 2 * 3 + 2 + 4
    for name in graphs:
        graph = onnx.load(str(artifacts / name), load_external_data=False)
        assert graph.ir_version <= MOST_IR
        assert all(each.version <= MOST_OPSET for each in graph.opset_import)
        for tensor in graph.graph.initializer:
            places = {entry.key: entry.value for entry in tensor.external_data}
            assert places.get("location", manifest.weights) == manifest.weights  # beside it, and nowhere else
    for variant in manifest.variants:
        load_variant(artifacts, variant, 1)


def test_prefixes_hold_no_weights_of_their_own(artifacts: Path, manifest: Manifest) -> None:
    weights = manifest.files[manifest.weights].bytes
    for variant in manifest.variants[1:]:
        assert variant.prefix_graph is not None
        assert manifest.files[variant.prefix_graph].bytes < weights / 4


def test_what_trains_is_by_name_and_number_what_trains_in_torch(artifacts: Path, manifest: Manifest) -> None:
    side = torch_side(artifacts, manifest)
    own = dict(side.model.named_parameters())
    for variant in manifest.variants:
        space = Selection(tuple(block >= variant.split_block for block in range(4)), ALL)
        names = {each.name for each in variant.parameters if each.trained}
        assert names == side.trained_names(space)
        for each in variant.parameters:
            assert math.prod(each.shape) == own[each.name].numel()


def test_the_flat_buffer_is_in_the_order_of_the_manifest(artifacts: Path, manifest: Manifest) -> None:
    live = load_variant(artifacts, manifest.variant("upper-2"), 1)
    flat = live.module.get_contiguous_parameters(False).numpy()
    wanted = np.concatenate([live.values[each.name].reshape(-1) for each in live.variant.parameters])
    np.testing.assert_array_equal(flat, wanted)


def test_losses_deltas_and_weights_are_torchs_through_every_variant_with_changing_tokens(
    artifacts: Path, manifest: Manifest
) -> None:
    one, other = torch_side(artifacts, manifest), ort_side(artifacts, manifest, "all")
    data = batches(manifest, 7)
    for variant in manifest.variants:
        other.use_variant(variant)
        for selection, batch in islice(zip(selections(manifest, variant, 3), data, strict=False), 3):
            here, there = step(one, [batch], selection), step(other, [batch], selection)
            assert there.loss == pytest.approx(here.loss, abs=1e-5)
            assert there.class_token_deltas == pytest.approx(here.class_token_deltas, rel=1e-4, abs=1e-5)
            assert there.correct == here.correct
        assert worst(one, other) < 1e-5


def test_it_is_no_accident_other_tokens_give_another_loss(artifacts: Path, manifest: Manifest) -> None:
    batch = next(batches(manifest, 7))
    trains = (True,) * 4
    losses = {
        step(ort_side(artifacts, manifest, "all"), [batch], Selection(trains, tokens)).loss
        for tokens in (ALL, (16, 9, 9, 9), (16, 16, 16, 9), (16, 9, 7, 7))
    }
    assert len(losses) == 4


def test_a_step_does_not_depend_on_how_it_is_cut_and_weighs_classes_as_torch_does(
    artifacts: Path, manifest: Manifest
) -> None:
    rng = np.random.default_rng(5)
    images, labels = rng.standard_normal((5, 3, 32, 32), np.float32), rng.integers(0, 4, 5)
    weights = np.array([0.5, 1.0, 2.0, 0.25], np.float32)
    more: dict[str, Any] = {"class_weights": weights, "label_smoothing": 0.1}
    total = float(weights[labels].sum())
    selection = Selection((False, False, True, True), (16, 16, 16, 11))
    one = torch_side(artifacts, manifest, "adamw", **more)
    whole, cut = (ort_side(artifacts, manifest, "upper-2", "adamw", **more) for _ in range(2))
    parts = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    wanted = step(one, parts, selection, weight_sum=total)
    for side, given in ((whole, [(images, labels)]), (cut, parts)):
        found = step(side, given, selection, weight_sum=total)
        assert found.loss == pytest.approx(wanted.loss, abs=1e-6)
        assert found.class_token_deltas == pytest.approx(wanted.class_token_deltas, rel=1e-5)
    np.testing.assert_allclose(whole.evaluate(images), cut.evaluate(images), atol=1e-5)
    np.testing.assert_allclose(whole.evaluate(images), one.evaluate(images), atol=1e-4)


def test_cached_features_are_what_the_prefix_gives_and_lead_to_the_same_step(
    artifacts: Path, manifest: Manifest
) -> None:
    images, labels = next(batches(manifest, 2))
    tokens = (16, 16, 12, 9)
    one, other = (ort_side(artifacts, manifest, "upper-2") for _ in range(2))
    features = one.features(images, (16, 16, 12), pooled=False)
    assert features.shape == (2, 1 + 12, 48)
    wanted = torch_side(artifacts, manifest).features(images, (16, 16, 12), pooled=False)
    np.testing.assert_allclose(features, wanted, atol=2e-5)
    selection = Selection((False, False, True, False), tokens)
    assert one.drop_prefix(2, {}) > 0
    cached = step(one, [(features, labels)], selection, cached_blocks=2)
    plain = step(other, [(images, labels)], selection)
    assert cached.loss == pytest.approx(plain.loss, abs=1e-6)
    assert cached.class_token_deltas[:2] == (0.0, 0.0)
    assert cached.class_token_deltas[2:] == pytest.approx(plain.class_token_deltas[2:], rel=1e-5)
    assert worst(one, other) < 1e-6
    head = ort_side(artifacts, manifest, "head")
    pooled = head.features(images, (16,) * 5, pooled=True)
    assert pooled.shape == (2, 1, 48)
    np.testing.assert_allclose(head.evaluate(pooled, 4), head.evaluate(images), atol=1e-6)


def test_what_a_step_does_not_draw_stays_to_the_bit_and_keeps_its_moments(artifacts: Path, manifest: Manifest) -> None:
    side = ort_side(artifacts, manifest, "all", "adamw")
    batch = next(batches(manifest, 1))
    before = {name: np.array(value) for name, value in side.model_tensors().items()}
    step(side, [batch], Selection((True, False, True, False), ALL))
    changed = {name for name, value in side.model_tensors().items() if not np.array_equal(value, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"0", "2"}
    assert {name for name in changed if not name.startswith("blocks")} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    moments = {name: np.array(value) for name, value in side.optimizer_tensors() if name.startswith("blocks.2")}
    step(side, [batch], Selection((True, False, False, False), ALL))
    assert moments
    for name, value in side.optimizer_tensors():
        if name in moments:
            np.testing.assert_array_equal(value, moments[name])
    assert side.optimizer_steps()["blocks.0.norm1.weight"] == 2
    assert side.optimizer_steps()["blocks.2.norm1.weight"] == 1


def test_a_restored_backend_goes_on_to_the_bit(artifacts: Path, manifest: Manifest) -> None:
    data = list(islice(batches(manifest, 4), 4))
    selection = Selection((False, False, True, True), (16, 16, 16, 10))
    one = ort_side(artifacts, manifest, "upper-2", "adamw")
    for batch in data[:2]:
        step(one, [batch], selection)
    model = {name: np.array(value) for name, value in one.model_tensors().items()}
    state = {name: np.array(value) for name, value in one.optimizer_tensors()}
    other = ort_side(artifacts, manifest, "upper-2", "adamw")
    other.restore(model, state, one.optimizer_steps())
    for batch in data[2:]:
        assert step(one, [batch], selection).loss == step(other, [batch], selection).loss
    assert worst(one, other) == 0
    with pytest.raises(KeyError):
        other.restore({"nothing": np.zeros(1)}, {}, {})
    with pytest.raises(RuntimeError, match="not"):
        other.restore({"head.bias": np.zeros(9, np.float32)}, {}, {})


def test_a_loss_that_is_no_number_changes_nothing(artifacts: Path, manifest: Manifest) -> None:
    side = ort_side(artifacts, manifest, "upper-2")
    images, labels = next(batches(manifest, 1))
    selection = Selection((False, False, True, True), ALL)
    before = {name: np.array(value) for name, value in side.model_tensors().items()}
    found = step(side, [(np.full_like(images, np.nan), labels)], selection)
    assert not found.updated
    for name, value in side.model_tensors().items():
        np.testing.assert_array_equal(value, before[name])
    assert step(side, [(images, labels)], selection).updated


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_refused_before_the_runtime_sees_it(
    artifacts: Path, manifest: Manifest, label: int
) -> None:
    images, labels = next(batches(manifest, 1))
    labels[1] = label
    with pytest.raises(DataError, match="labels must be from 0 to 3"):
        step(ort_side(artifacts, manifest, "head"), [(images, labels)], Selection((False,) * 4, ALL))


def test_what_a_variant_has_no_gradients_for_is_refused(artifacts: Path, manifest: Manifest) -> None:
    batch = next(batches(manifest, 1))
    with pytest.raises(UnsupportedModel, match="below its split"):
        step(ort_side(artifacts, manifest, "upper-2"), [batch], Selection((False, True, True, True), ALL))
    with pytest.raises(ArtifactsError, match="hold all"):
        ort_side(artifacts, manifest, "all").use_split(3, embeddings_train=False)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_built_in_schedule_is_the_one_in_words_where_the_rate_is_never_set(
    artifacts: Path, manifest: Manifest, kind: str
) -> None:
    schedule: Schedule = manifest.schedule
    live = load_variant(artifacts, manifest.variant("head"), 1)
    graph = str(artifacts / manifest.optimizers[kind].scheduled)
    optimizer = training_api().Optimizer(graph, live.module)
    rates = []
    features = np.random.default_rng(0).standard_normal((2, 1, 48), np.float32)
    for _ in range(schedule.total_steps + 1):
        live.module.train()
        live.module.lazy_reset_grad()
        live.module(features, np.full((2, 4), 0.125, np.float32))
        before = np.array(live.values["head.bias"])
        gradient = np.array(live.gradients["head.bias"])
        live.values["head.weight"][:] = 0  # so that the gradient of the bias hardly moves
        optimizer.step()
        change = before - live.values["head.bias"]
        rates.append(float(np.abs(change).max() / (np.abs(gradient).max() if kind == "sgd" else 1.0)))
    wanted = []
    for done in range(schedule.total_steps + 1):
        if done < schedule.warmup_steps:
            wanted.append(schedule.peak_rate * (done + 1) / schedule.warmup_steps)
        else:
            share = min(1.0, (done - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps))
            wanted.append(schedule.peak_rate * 0.5 * (1 + math.cos(math.pi * share)))
    if kind == "sgd":
        assert rates == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    else:  # Adam's first step is the rate itself, whatever the gradient
        assert rates[0] == pytest.approx(wanted[0], rel=1e-2)
        assert rates[-1] < schedule.peak_rate * 1e-3


def test_the_weights_are_the_models_own(artifacts: Path, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(__import__("json").dumps(manifest.config))
    model = load_saved(tmp_path, artifacts / manifest.weights, classes=4)
    images, _ = next(batches(manifest, 6))
    with torch.inference_mode():
        wanted = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(ort_side(artifacts, manifest, "upper-2").evaluate(images), wanted, atol=2e-5)
