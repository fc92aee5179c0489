"""The page's own loop in Node trains as torch does, holds its cap, and says in words what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is what the page is compared with")

import torch
from parity import Uniform, furthest, named, rate_at, step, torch_side

from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.reading import read_manifest
from edgetune.optim import OptimizerSettings

PLAIN = [[16] * 4] * 5
PRUNED = [[16, 16, 16, 16], [16, 16, 16, 11], [16, 16, 16, 7], [16, 16, 16, 13], [16, 16, 16, 9]]
PRUNED_FROM_THE_START = [[16, 15, 13, 11], [16, 16, 9, 9], [16, 12, 12, 7], [16, 14, 11, 10], [16, 13, 8, 8]]
# Rounding that a gradient of nothing but rounding has (a key's bias) counts against the largest of all.
NOISE_SHARE = 1e-3


@pytest.fixture(scope="module")
def manifest(artifacts: Path) -> Manifest:
    return read_manifest(artifacts)


def make_batches(folder: Path, tokens: list[list[int]], seed: int, images: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    batches = []
    for number, counts in enumerate(tokens):
        values = rng.standard_normal((images, 3, 32, 32), np.float32)
        file = folder / f"batch-{seed}-{number}"
        values.tofile(file)
        labels = rng.integers(0, 4, images).tolist()
        batches.append({"images": file, "labels": labels, "tokens": counts})
    return batches


def images_of(batch: dict[str, Any]) -> Any:
    return np.fromfile(batch["images"], np.float32).reshape(-1, 3, 32, 32)


def schedule(peak: float, warmup: int, total: int) -> dict[str, Any]:
    return {"peakRate": peak, "warmupSteps": warmup, "totalSteps": total}


def flats(out: Path, steps: int) -> Any:
    return np.fromfile(out, "<f4").reshape(steps, -1)


@pytest.mark.parametrize(
    ("variant", "tokens"),
    [("all", PLAIN), ("all", PRUNED_FROM_THE_START), ("upper-2", PLAIN), ("upper-2", PRUNED), ("head", PLAIN)],
)
def test_five_sgd_steps_are_torchs(
    core: Any, ort_web: Path, artifacts: Path, manifest: Manifest, tmp_path: Path, variant: str, tokens: list[list[int]]
) -> None:
    batches = make_batches(tmp_path, tokens, 1)
    out = tmp_path / "out"
    found = core(
        "steps", artifacts=artifacts, ort=ort_web, variant=variant, optimizer="sgd", schedule=schedule(1e-2, 2, 6),
        batches=batches, out=out,
    )  # fmt: skip
    side, chosen = torch_side(artifacts, manifest, "sgd"), manifest.variant(variant)
    for number, (batch, one) in enumerate(zip(batches, found["steps"], strict=True)):
        rate = rate_at(number, 1e-2, 2, 6)
        other = step(side, chosen, images_of(batch), batch["labels"], batch["tokens"], rate)
        assert one["updated"]
        assert one["loss"] == pytest.approx(other.loss, abs=1e-5)
        assert one["correct"] == other.correct
        above = slice(chosen.split_block, None)
        assert one["deltas"][above] == pytest.approx(other.class_token_deltas[above], rel=1e-4, abs=1e-5)
        assert furthest(side, flats(out, 5)[number], chosen) < 1e-5
    np.testing.assert_allclose(found["logits"], side.evaluate(images_of(batches[0])), atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "tokens"), [("all", PRUNED_FROM_THE_START), ("upper-2", PLAIN), ("upper-2", PRUNED)]
)
def test_five_adamw_steps_have_torchs_losses(
    core: Any, ort_web: Path, artifacts: Path, manifest: Manifest, tmp_path: Path, variant: str, tokens: list[list[int]]
) -> None:
    batches = make_batches(tmp_path, tokens, 2)
    found = core(
        "steps", artifacts=artifacts, ort=ort_web, variant=variant, optimizer="adamw", schedule=schedule(1e-4, 2, 6),
        batches=batches, out=tmp_path / "out",
    )  # fmt: skip
    side, chosen = torch_side(artifacts, manifest, "adamw"), manifest.variant(variant)
    losses = []
    for number, (batch, one) in enumerate(zip(batches, found["steps"], strict=True)):
        rate = rate_at(number, 1e-4, 2, 6)
        other = step(side, chosen, images_of(batch), batch["labels"], batch["tokens"], rate)
        assert one["loss"] == pytest.approx(other.loss, abs=1e-5)
        losses.append(one["loss"])
    # The same batches without an update in between would have other losses: this can fail.
    still = torch_side(artifacts, manifest, "adamw")
    last = step(still, chosen, images_of(batches[-1]), batches[-1]["labels"], batches[-1]["tokens"], 0.0)
    assert abs(last.loss - losses[-1]) > 1e-4


def gradients(
    core: Any, ort_web: Path, artifacts: Path, variant: str, batch: dict[str, Any], at: Any, folder: Path
) -> Any:
    """The runtime hands none out: an SGD step at a large rate shows them."""
    rate = 1024.0
    start = folder / "at"
    at.astype("<f4").tofile(start)
    core(
        "steps", artifacts=artifacts, ort=ort_web, variant=variant, optimizer="sgd", schedule=schedule(rate, 0, 10**6),
        batches=[batch], each_from=start, out=folder / "moved",
    )  # fmt: skip
    return (at.astype(np.float64) - np.fromfile(folder / "moved", "<f4")) / rate


@pytest.mark.parametrize(("variant", "tokens"), [("all", PRUNED_FROM_THE_START[:1]), ("upper-2", PRUNED[1:2])])
def test_gradients_at_the_same_parameters_are_torchs(
    core: Any, ort_web: Path, artifacts: Path, manifest: Manifest, tmp_path: Path, variant: str, tokens: list[list[int]]
) -> None:
    (batch,) = make_batches(tmp_path, tokens, 3)
    side, chosen = torch_side(artifacts, manifest, "sgd"), manifest.variant(variant)
    own = side.model_tensors()
    flat = np.concatenate([np.asarray(own[each.name], np.float32).ravel() for each in chosen.parameters])
    found = named(gradients(core, ort_web, artifacts, variant, batch, flat, tmp_path), chosen)
    seen: dict[str, Any] = {}

    class Recorder(Uniform):
        def step(self, named_parameters: Any, learning_rate: float) -> None:
            seen.update({name: value.grad.numpy().copy() for name, value in named_parameters})

    side.optimizer = Recorder(OptimizerSettings(name="sgd"))
    step(side, chosen, images_of(batch), batch["labels"], batch["tokens"], 1.0)
    assert seen.keys() == {each.name for each in chosen.parameters if each.trained}
    largest = max(float(np.abs(value).max()) for value in seen.values())
    for name, value in seen.items():
        scale = max(float(np.abs(value).max()), NOISE_SHARE * largest)
        assert np.abs(found[name] - value).max() / scale < 1e-5, name
    for each in chosen.parameters:
        if not each.trained:
            assert not found[each.name].any()


def test_adamws_rule_alone_is_torchs(
    core: Any, ort_web: Path, artifacts: Path, manifest: Manifest, tmp_path: Path
) -> None:
    batches, chosen = make_batches(tmp_path, PLAIN[:3], 4), manifest.variant("head")
    core(
        "steps", artifacts=artifacts, ort=ort_web, variant="head", optimizer="adamw", schedule=schedule(1e-3, 0, 10**6),
        batches=batches, out=tmp_path / "out",
    )  # fmt: skip
    after = flats(tmp_path / "out", 3)
    own = torch_side(artifacts, manifest, "adamw").model_tensors()
    before = np.concatenate([np.asarray(own[each.name], np.float32).ravel() for each in chosen.parameters])
    tensors = {name: torch.from_numpy(value.copy()) for name, value in named(before, chosen).items()}
    rule = Uniform(OptimizerSettings(name="adamw", weight_decay=manifest.weight_decay))
    for number, batch in enumerate(batches):
        at = before if number == 0 else after[number - 1]
        for name, value in named(gradients(core, ort_web, artifacts, "head", batch, at, tmp_path), chosen).items():
            tensors[name].grad = torch.from_numpy(value.astype(np.float32))
        with torch.no_grad():
            rule.step(list(tensors.items()), 1e-3)
        for name, value in named(after[number], chosen).items():
            assert np.abs(tensors[name].numpy() - value).max() < 1e-6, name


def test_a_step_does_not_depend_on_how_it_is_cut(core: Any, ort_web: Path, artifacts: Path, tmp_path: Path) -> None:
    (whole,) = make_batches(tmp_path, PRUNED[1:2], 5, images=5)
    request = {
        "artifacts": artifacts, "ort": ort_web, "variant": "upper-2", "optimizer": "sgd", "schedule": schedule(1e-2, 0, 9),
    }  # fmt: skip
    one = core("steps", **request, batches=[whole], out=tmp_path / "one")
    other = core("steps", **request, batches=[{**whole, "cut": 2}], out=tmp_path / "other")
    assert one["steps"][0]["loss"] == pytest.approx(other["steps"][0]["loss"], abs=1e-6)
    assert one["steps"][0]["deltas"] == pytest.approx(other["steps"][0]["deltas"], rel=1e-5)
    np.testing.assert_allclose(np.fromfile(tmp_path / "one", "<f4"), np.fromfile(tmp_path / "other", "<f4"), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- the whole loop


SETTINGS = {
    "optimizer": "sgd", "rate": 0.05, "epochs": 4, "batch": 4, "microBatch": 3, "prunes": True, "seed": 7, "classes": 2,
}  # fmt: skip


def looped(core: Any, ort_web: Path, artifacts: Path, folder: Path, name: str, **changes: Any) -> Any:
    rng = np.random.default_rng(0)
    labels = [0, 1] * 6
    images = (
        rng.standard_normal((12, 3, 32, 32), np.float32) * 0.3 + np.asarray(labels, np.float32)[:, None, None, None]
    )
    images.tofile(folder / "images")
    settings = {**SETTINGS, **changes.pop("settings", {})}
    return core(
        "train", artifacts=artifacts, ort=ort_web, variant="upper-2", settings=settings, images=folder / "images",
        labels=labels, out=folder / name, **changes,
    )  # fmt: skip


def test_the_loop_learns_prunes_and_sees_every_image_once_an_epoch(
    core: Any, ort_web: Path, artifacts: Path, tmp_path: Path
) -> None:
    found = looped(core, ort_web, artifacts, tmp_path, "out", settings={"epochs": 10})
    steps = found["state"]["steps"]
    aside = found["aside"]
    assert len(aside) == 2  # one of every five in a class
    assert len(steps) == 30
    for epoch in range(10):
        seen = [place for each in steps[3 * epoch : 3 * epoch + 3] for place in each["places"]]
        assert sorted([*seen, *aside]) == list(range(12))
    assert [each["places"] for each in steps[:3]] != [each["places"] for each in steps[3:6]]
    assert np.mean([each["loss"] for each in steps[-3:]]) < 0.5 * np.mean([each["loss"] for each in steps[:3]])
    assert min(each["tokens"][3] for each in steps) < 16
    assert found["epochs"][-1] == {"epoch": 10, "right": 2}


# Of 30 steps 3 warm up, 3 are an epoch: stopped in the warm-up, at an epoch's end, and within a later one.
@pytest.mark.parametrize("step", [2, 6, 16])
def test_a_loop_that_is_gone_on_with_ends_with_the_same_bits(
    core: Any, ort_web: Path, artifacts: Path, tmp_path: Path, step: int
) -> None:
    whole = looped(core, ort_web, artifacts, tmp_path, "whole", settings={"epochs": 10})
    parts = looped(core, ort_web, artifacts, tmp_path, "parts", settings={"epochs": 10}, interrupted_at=step)
    assert whole["state"] == parts["state"]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_nothing_is_freed_that_is_on_the_runtimes_stack(core: Any, ort_web: Path, artifacts: Path) -> None:
    """As the runtime itself does when parameters are read or loaded, which damages its heap."""
    found = core("frees", artifacts=artifacts, ort=ort_web, variant="head")
    assert len(found["on_stack"]) > 0
    assert len(found["freed"]) > 0
    assert not set(found["on_stack"]) & set(found["freed"])


def test_a_rate_at_which_it_diverges_ends_in_words(core: Any, ort_web: Path, artifacts: Path, tmp_path: Path) -> None:
    found = looped(core, ort_web, artifacts, tmp_path, "out", settings={"rate": 1e30, "epochs": 9})
    assert "the training diverged. Try a lower learning rate" in found["failed"]


# ------------------------------------------------------------------------------------------------------ errors, the cap


WORDS = {
    "label": "A label is out of range: 4; this model has classes 0 to 3.",
    "version": "of another version: format 1 (onnxruntime-training), runtime 1.20.0",
    "format": "of another version: format 2",
    "json": "manifest.json is damaged",
    "variant": "no variant upper-99: all, upper-2, head",
    "short": "model.safetensors is damaged: 3 bytes instead of",
    "changed": "its bytes are not those that were exported",
    "schedule": "The optimizer graph is damaged",
    "kept": "Kept parameters don't fit: 3 values, and head has",
    "shape": "5 values are no 1 images of 17 × 48",
    "tokens": "Token counts 1, 2, 3, 4 don't fit 4 blocks of 16",
}


def test_what_goes_wrong_is_said_in_words(core: Any, ort_web: Path, artifacts: Path) -> None:
    found = core("errors", artifacts=artifacts, ort=ort_web, cases=list(WORDS))
    for name, words in WORDS.items():
        assert found[name] is not None, name
        assert found[name]["words"], found[name]
        assert words in found[name]["message"]
        assert not found[name]["fatal"]


def test_memory_over_the_cap_is_refused_in_words_and_the_heap_stays_under(
    core: Any, ort_web: Path, artifacts: Path
) -> None:
    free = core("errors", artifacts=artifacts, ort=ort_web, cases=["memory"])
    assert free["memory"] is None
    assert free["heap_bytes"] > 64 * 2**20
    capped = core("errors", artifacts=artifacts, ort=ort_web, cases=["memory"], cap_mib=40)
    assert "Memory was refused while training" in capped["memory"]["message"]
    assert "the cap is 40 MiB" in capped["memory"]["message"]
    assert capped["memory"]["fatal"]
    assert capped["heap_bytes"] <= 40 * 2**20
    with pytest.raises(AssertionError, match=r"begins with 16 MiB and the cap is 8\.0 MiB"):
        core("errors", artifacts=artifacts, ort=ort_web, cases=["memory"], cap_mib=8)
