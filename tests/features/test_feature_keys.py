"""The key names all that decides a feature but the image; the id names the image."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest
from feature_cases import make_key

from edgetune.features import FeatureKey, entry_id, weights_sha256


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("format_version", 2),
        ("weights_sha256", "cd" * 32),
        ("architecture", "vit_base_patch16_224"),
        ("split_block", 3),
        ("tokens", (16, 8, 3)),
        ("token_score", "distance"),
        ("pooled", True),
        ("preprocess", {"size": 56, "mean": [0.5, 0.5, 0.5], "decode": {"draft": False}}),
        ("precision", "float16"),
        ("stored_tokens", 5),
        ("width", 7),
    ],
)
def test_every_field_makes_another_store(field: str, other: Any) -> None:
    key, changed = make_key(), make_key(**{field: other})
    assert key.sha256() != changed.sha256()
    assert key.folder_name() != changed.folder_name()


def test_no_field_is_left_out_above() -> None:
    (mark,) = test_every_field_makes_another_store.pytestmark  # type: ignore[attr-defined]
    assert {field for field, _ in mark.args[1]} == set(FeatureKey.__struct_fields__)


def test_the_order_in_which_preprocessing_is_named_does_not_matter() -> None:
    there = make_key(preprocess={"size": 56, "crop": 0.9})
    back = make_key(preprocess={"crop": 0.9, "size": 56})
    assert there.sha256() == back.sha256()


def test_the_key_reads_back_from_its_text() -> None:
    assert msgspec.json.decode(make_key().as_text(), type=FeatureKey) == make_key()


def test_an_entry_of_no_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        make_key(width=0)


def test_bytes_of_an_entry() -> None:
    assert make_key(precision="float32").entry_bytes == 4 * 6 * 4
    assert make_key(precision="float16").entry_bytes == 4 * 6 * 2


def test_ids_tell_images_and_their_views_apart() -> None:
    ids = {entry_id("ab"), entry_id("ab", "flip"), entry_id("abf", "lip"), entry_id("abflip"), entry_id("", "abflip")}
    assert len(ids) == 5
    assert {len(one) for one in ids} == {16}
    assert entry_id("ab", "flip") == entry_id("ab", "flip")


def test_the_digest_of_weights_is_that_of_their_names_types_shapes_and_bytes() -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(1.5).reshape(())}
    expected = hashlib.sha256(
        b'["a", "<f4", [2, 3]]' + weights["a"].tobytes() + b'["b", "<f4", []]' + weights["b"].tobytes()
    )
    assert weights_sha256(weights.items()) == expected.hexdigest()


def test_any_change_of_a_weight_changes_the_digest() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    changed = array.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    cases = [("a", array), ("b", array), ("a", array.reshape(3, 2)), ("a", array.view(np.int32)), ("a", changed)]
    assert len({weights_sha256([case]) for case in cases}) == len(cases)


def test_a_view_in_another_order_of_memory_has_the_digest_of_its_values() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert weights_sha256([("a", np.asfortranarray(array))]) == weights_sha256([("a", array)])
