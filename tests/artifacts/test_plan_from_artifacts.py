"""A run from artifacts is planned from what its variants were measured to take: micro-batches, then tokens, then the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts_cases import SHAPE, make_artifacts

from edgetune.artifacts.manifest import Manifest
from edgetune.artifacts.plan import choices, plan, predicted_phases, variants_that_fit
from edgetune.errors import ArtifactsError, DoesNotFit, UsageError
from edgetune.methods import METHODS, space_of
from edgetune.planner import CacheRequest, PlanRequest
from edgetune.store import _contradictions
from edgetune.units import MIB

RUNTIME = 60 * MIB


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_artifacts(tmp_path / "artifacts")


def request(cap_mib: int, method: str = "alast", **changes: Any) -> PlanRequest:
    options = {name: changes.pop(name, None) for name in ("trained_blocks", "split_block")}
    return PlanRequest(
        shape=SHAPE,
        space=space_of(METHODS[method], SHAPE, **options),
        **{"batch_size": 8, "optimizer": "adamw", "cap_bytes": cap_mib * MIB, "runtime_bytes": RUNTIME, **changes},
    )


def test_with_room_everything_may_train_on_all_tokens_in_one_micro_batch(manifest: Manifest) -> None:
    made = plan(manifest, request(1000))
    assert (made.split_block, made.micro_batch, made.token_ceiling) == (0, 8, (16,) * 4)
    assert not made.memory_binds
    assert made.prefix is None
    assert _contradictions(made, METHODS["alast"]) == []


def test_less_room_costs_micro_batches_first_then_tokens_then_the_split(manifest: Manifest) -> None:
    caps = range(1000, 70, -1)
    steps: list[tuple[int, int, int]] = []
    for cap in caps:
        try:
            made = plan(manifest, request(cap))
        except DoesNotFit:
            break
        step = (made.split_block, -made.token_ceiling[-1], -made.micro_batch)
        assert made.predicted_peak_bytes <= cap * MIB
        if not steps or steps[-1] != step:
            steps.append(step)
    assert steps[0] == (0, -16, -8)
    assert steps == sorted(steps)
    assert {split for split, _, _ in steps} == {0, 2}
    assert {size for split, _, size in steps if split == 0} >= {-8, -1}


def test_what_does_not_fit_is_refused_with_the_smallest_cap_that_would(manifest: Manifest) -> None:
    with pytest.raises(DoesNotFit, match="needs at least") as refused:
        plan(manifest, request(70))
    smallest = refused.value.smallest_cap_bytes
    wanted = msgspec.structs.replace(request(70), cap_bytes=smallest)
    assert plan(manifest, wanted).predicted_peak_bytes == smallest
    with pytest.raises(DoesNotFit):
        plan(manifest, msgspec.structs.replace(wanted, cap_bytes=smallest - 1))


def test_a_cached_prefix_takes_less_than_one_that_is_computed_in_every_step(manifest: Manifest) -> None:
    cache = CacheRequest(train_images=40, val_images=10, steps=50)
    choice = next(iter(choices(manifest, request(1000, split_block=2))))
    with_cache = predicted_phases(manifest, request(1000, split_block=2, cache=cache), choice)
    without = predicted_phases(manifest, request(1000, split_block=2), choice)
    assert with_cache["train"] < without["train"]
    assert "cache" in with_cache
    made = plan(manifest, request(1000, split_block=2, cache=cache))
    assert made.prefix is not None
    assert made.prefix.blocks == 2


def test_a_later_plan_stands_on_the_cache_that_there_is(manifest: Manifest) -> None:
    there = CacheRequest(train_images=40, val_images=10, steps=50, blocks=2)
    assert plan(manifest, request(1000, cache=there)).split_block == 2


def test_more_images_more_tokens_and_more_state_never_take_less(manifest: Manifest) -> None:
    wanted = request(1000)
    made = list(choices(manifest, wanted))
    peaks = {
        (each.variant.name, each.lossy.token_ceiling, each.micro_batch): max(
            predicted_phases(manifest, wanted, each).values()
        )
        for each in made
    }
    for (name, tokens, size), peak in peaks.items():
        for (other, fewer, smaller), lower in peaks.items():
            if (
                name == other
                and smaller <= size
                and all(less <= more for less, more in zip(fewer, tokens, strict=True))
            ):
                assert lower <= peak


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute": "block"}, "--recompute"),
        ({"updates_in_backward": True}, "--step-in-backward"),
        ({"half_frozen": True}, "--frozen-weights"),
        ({"split_block": 3}, r"begin to train at block 3; these artifacts hold all \(from block 0 up\)"),
        ({"method": "last-k", "trained_blocks": 3}, "would begin to train at block 1"),
    ],
)
def test_what_artifacts_can_not_do_is_refused_by_its_flag(
    manifest: Manifest, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        plan(manifest, request(1000, **changes))


def test_what_is_offered_in_place_of_a_split_can_be_asked_for(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"Choose --split 0 or 2, --method head, or export with --split N\.$"):
        plan(manifest, request(1000, split_block=3))
    for asked in ({"split_block": 0}, {"split_block": 2}, {"method": "head"}):
        assert plan(manifest, request(1000, **asked))
    head = msgspec.structs.replace(manifest, variants=manifest.variants[-1:])
    with pytest.raises(UsageError, match=r"Choose --method head, or export"):
        plan(head, request(1000, split_block=3))
    first = msgspec.structs.replace(manifest.variants[0], name="full", embeddings_train=True)
    full = msgspec.structs.replace(manifest, variants=(first, manifest.variants[1]))
    with pytest.raises(UsageError, match=r"Choose --split 2, --method full, or export"):
        plan(full, request(1000, split_block=3))


def test_without_measurements_no_cap_can_be_held(tmp_path: Path) -> None:
    manifest = make_artifacts(tmp_path / "artifacts")
    bare = tuple(msgspec.structs.replace(variant, measured=None) for variant in manifest.variants)
    with pytest.raises(ArtifactsError, match="without measurements"):
        plan(msgspec.structs.replace(manifest, variants=bare), request(1000))


def test_an_export_keeps_the_variants_that_a_device_has_room_for(manifest: Manifest) -> None:
    assert variants_that_fit(manifest, 500 * MIB) == manifest.variants
    assert [variant.name for variant in variants_that_fit(manifest, 30 * MIB)] == ["upper-2", "head"]
    with pytest.raises(DoesNotFit, match="smallest variant"):
        variants_that_fit(manifest, 5 * MIB)
