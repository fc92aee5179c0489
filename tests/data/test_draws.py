"""Random numbers are a function of (seed, purpose, counters), and the split keeps its promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data import balanced_sample, epoch_order, flip_draw, stratified_split
from edgetune.data.draws import augment_seeds
from edgetune.errors import DataError, UsageError

SEEDS = st.integers(0, 2**63)


@given(st.integers(0, 300), SEEDS, st.integers(0, 10**6))
def test_an_epochs_order_visits_every_image_once_and_is_the_same_every_time(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order) == list(range(count))
    assert order.tolist() == epoch_order(count, seed, epoch).tolist()


def test_epochs_seeds_and_purposes_draw_apart():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    draws = [flip_draw(s, e, i) for s in range(3) for e in range(3) for i in range(200)]
    assert len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert len({augment_seeds(0, 0, i) for i in range(100)}) == 100


def test_the_numbers_stay_what_they_are():
    """A stored run is resumed by later versions: these values are part of its format."""
    assert epoch_order(8, 0, 0).tolist() == [5, 0, 1, 4, 2, 6, 3, 7]
    assert flip_draw(0, 1, 2) == 0.9856299823628387


def test_a_negative_seed_is_a_usage_error():
    with pytest.raises(UsageError, match="-1"):
        epoch_order(3, -1, 0)


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    seed=SEEDS,
    val_share=st.floats(0.01, 0.99),
)
def test_every_class_gives_its_share_to_val_and_at_least_one_image_to_each_side(counts, seed, val_share):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    names = [f"c{label}" for label in range(len(counts))]
    train, val = stratified_split(range(len(labels)), labels, names, seed=seed, val_share=val_share)
    assert sorted(train + val) == list(range(len(labels)))
    assert (train, val) == (sorted(train), sorted(val))
    assert (train, val) == stratified_split(range(len(labels)), labels, names, seed=seed, val_share=val_share)
    for label, count in enumerate(counts):
        own = sum(labels[i] == label for i in val)
        assert 1 <= own < count
        assert abs(own - val_share * count) <= 1


@given(
    keys=st.lists(st.integers(0, 8), min_size=4, max_size=60).filter(lambda keys: len(set(keys)) >= 2),
    seed=SEEDS,
    val_share=st.floats(0.05, 0.95),
)
def test_equal_pictures_stay_on_one_side(keys, seed, val_share):
    train, val = stratified_split(keys, [0] * len(keys), ["all"], seed=seed, val_share=val_share)
    assert train
    assert val
    assert not {keys[i] for i in train} & {keys[i] for i in val}


@pytest.mark.parametrize(
    ("count", "message"), [(0, "no images"), (1, "one image"), (3, "3 images, all of them the same")]
)
def test_a_class_that_cannot_be_split_is_named(count, message):
    with pytest.raises(DataError, match=f"'newt' has {message}"):
        stratified_split(["a", "b", *["x"] * count], [0, 0, *[1] * count], ["cat", "newt"], seed=0)


def test_another_class_does_not_change_how_the_first_is_split():
    keys = list(range(40))
    alone = stratified_split(keys[:20], [0] * 20, ["a"], seed=3)
    both = stratified_split(keys, [0] * 20 + [1] * 20, ["a", "b"], seed=3)
    assert [i for i in both[1] if i < 20] == alone[1]


def test_a_sample_has_every_class_in_its_share() -> None:
    labels = [0] * 900 + [1] * 90 + [2] * 3
    chosen = balanced_sample(labels, seed=1, most=100)
    counts = np.bincount(np.asarray(labels)[chosen])
    assert len(chosen) == len(set(chosen.tolist()))
    assert counts.tolist() == [91, 9, 2]
    assert balanced_sample(labels, seed=1, most=100).tolist() == chosen.tolist()
    assert balanced_sample([0, 1], seed=1, most=100).tolist() == [0, 1]
