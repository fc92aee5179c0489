"""Where to split, from a look at some images: the arithmetic against trying, and what is chosen in clear cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from doubles import FakeBackend, make_images
from jobs import make_shape
from running import Witness, finetune, interrupt_after, losses, resume
from running import settings as run_settings
from safetensors.numpy import load_file

from edgetune import look, splits
from edgetune.backends.base import Array, Images, Looked
from edgetune.cost import TokenScore
from edgetune.errors import Interrupted
from edgetune.features import LookedFeatures
from edgetune.look import Found, Sample, Way, candidate_splits, choose_split, find, loses_nothing, small
from edgetune.methods import METHODS, space_of
from edgetune.planner import PlanRequest, smallest_cap_bytes
from edgetune.planner import plan as make_plan
from edgetune.prepare import why_not_looked
from edgetune.report import read_report
from edgetune.splits import _batch_that_fits, _planned
from edgetune.units import GIB, MIB


def right(share: float, count: int = 200, seed: int = 0) -> np.ndarray:
    """So large a share of the images told right, which ones by seed."""
    found = np.zeros(count, np.bool_)
    found[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return found


@pytest.mark.parametrize(("depth", "expected"), [(12, (4, 6, 8)), (24, (8, 12, 16)), (2, (1,)), (1, ())])
def test_splits_are_looked_for_in_the_middle_of_the_model(depth: int, expected: tuple[int, ...]) -> None:
    assert candidate_splits(depth) == expected


def test_the_deepest_split_that_loses_nothing_is_taken() -> None:
    best = right(0.9)
    assert choose_split({4: right(0.895), 6: best, 8: right(0.9)}) == 8
    assert choose_split({4: right(0.9), 6: right(0.9), 8: right(0.7)}) == 6
    assert choose_split({4: right(0.95), 6: right(0.6), 8: right(0.5)}) == 4


def test_a_loss_within_what_the_sample_can_show_is_none() -> None:
    """10 images lost and 7 won of 50 is a draw; 10 lost and none won is not."""
    best = np.ones(50, np.bool_)
    best[40:47] = False
    drawn = best.copy()
    drawn[:10], drawn[40:47] = False, True
    lost = best.copy()
    lost[:10] = False
    assert loses_nothing(drawn, best)
    assert not loses_nothing(lost, best)


def test_pixels_are_means_over_squares() -> None:
    images = np.arange(2 * 3 * 70 * 64, dtype=np.float32).reshape(2, 3, 70, 64)
    found = small(images)
    assert found.shape == (2, 3 * 23 * 21)
    assert found[1, 0] == pytest.approx(images[1, 0, :3, :3].mean())
    assert small(images[:, :, :32, :32]).shape == (2, 3 * 32 * 32)


class _Telling(FakeBackend):
    """What is put out after so many blocks, with so many tokens, tells the class as well as `signal` says: of tokens that
    were chosen by distance under their count and BY_DISTANCE.
    """

    BY_DISTANCE = 100

    def __init__(self, labels: np.ndarray, signal: dict[tuple[int, int], float]) -> None:
        super().__init__(2, 4)
        self._labels, self._signal = labels, signal
        self.to_end: list[int] = []  # images a pass

    def _summary(self, start: int, count: int, block: int, tokens: int) -> Array:
        labels = self._labels[start : start + count]
        values = np.random.default_rng([start, block, tokens]).standard_normal((count, 4))
        values[np.arange(count), labels] += self._signal[block, tokens]
        return values.astype(np.float32)

    def look(self, inputs: Images, blocks: Sequence[int], *, scored: bool) -> Looked:
        """The images say which they are; so do tokens, of which the last one's say how many there are."""
        start, count = int(inputs[0, 0, 0, 0]), len(inputs)
        tokens = np.zeros((count, 17, 4), np.float32)
        tokens[:, 0, 0], tokens[:, 0, 1] = np.arange(start, start + count), 16
        scores: dict[TokenScore, Array] = {}
        if scored:
            scores = {"attention": np.zeros((count, 17)), "distance": np.full((count, 17), float(self.BY_DISTANCE))}
        return Looked([self._summary(start, count, block, 16) for block in blocks], tokens, scores)

    def pruned(self, tokens: Array, scores: Array, leaving: int) -> Array:
        left: Array = tokens.copy()
        left[:, 0, 1] = leaving + scores[:, 0]
        return left

    def at_end(self, tokens: Array, blocks: int) -> Array:
        self.to_end.append(len(tokens))
        return self._summary(int(tokens[0, 0, 0]), len(tokens), 12, int(tokens[0, 0, 1]))


def _look(
    signal: dict[tuple[int, int], float],
    *,
    lowest: int = 0,
    scores: Sequence[TokenScore] = ("attention",),
    pixels_tell: bool = False,
    to_end: int = 96,
    kept: Callable[[int], LookedFeatures | None] = lambda _split: None,
) -> tuple[Found, _Telling, list[tuple[int, int]]]:
    labels = np.arange(96) % 2
    backend = _Telling(labels, signal)
    loaded = []

    def load(start: int, stop: int) -> Images:
        images = np.random.default_rng(start).standard_normal((stop - start, 3, 8, 8)).astype(np.float32)
        if pixels_tell:
            images += 4 * labels[start:stop, None, None, None]
        images[:, 0, 0, 0] = np.arange(start, stop)
        loaded.append((start, stop))
        return images

    turns: list[int] = []
    sample = Sample(np.arange(96), labels, to_end, 8, load, lambda: turns.append(1))
    found = find(
        backend, make_shape(depth=12), sample, kept, lambda _done, _total: None, lowest_split=lowest, scores=scores
    )
    assert len(turns) >= len(loaded)  # after each few images
    assert len(found.lines) == 1 + (len(scores) > 0 and not pixels_tell)
    return found, backend, loaded


def _found(signal: dict[tuple[int, int], float], **how: Any) -> tuple[int, float]:
    found = _look(signal, **how)[0]
    return found.split_block, found.split_tokens


EVERYWHERE = {(block, 16): 9.0 for block in (4, 6, 8, 12)}


def test_the_look_finds_the_split_and_the_tokens() -> None:
    splits = {(4, 16): 9.0, (6, 16): 9.0, (8, 16): 0.0}
    tokens = {(12, 8): 9.0, (12, 16): 9.0}  # 0.4 and 0.67 of 16 go up to 8 and 16
    assert _found(splits | tokens) == (6, 0.4)
    assert _found(splits | {(8, 16): 9.0} | tokens) == (8, 0.4)
    assert _found(splits | {(6, 16): 0.0} | tokens) == (4, 0.4)
    assert _found(splits | tokens | {(12, 8): 0.0}) == (6, 0.67)
    assert _found(splits | tokens, scores=()) == (6, 1.0)
    assert _found(splits | tokens, lowest=6) == (6, 0.4)
    assert _found({(10, 16): 9.0} | tokens, lowest=10) == (10, 0.4)


def test_the_fewest_tokens_that_lose_nothing_are_kept_distance_before_attention() -> None:
    shift = _Telling.BY_DISTANCE

    def told(few: float, few_by_distance: float) -> tuple[float, str]:
        signal = EVERYWHERE | {(12, 8): few, (12, 8 + shift): few_by_distance}
        found = _look(signal, scores=("attention", "distance"))[0]
        return found.split_tokens, found.token_score

    assert told(0.0, 9.0) == (0.4, "distance")
    assert told(9.0, 9.0) == (0.4, "distance")
    assert told(9.0, 0.0) == (0.4, "attention")
    assert told(0.0, 0.0) == (0.67, "distance")  # which goes up to all 16


def test_where_fewer_tokens_always_lose_something_all_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "WAYS", (Way("distance", 0.4), Way("attention", 0.4)))
    signal = EVERYWHERE | {(12, 8): 1.5, (12, 8 + _Telling.BY_DISTANCE): 0.0}
    found = _look(signal, scores=("attention", "distance"))[0]
    # Above the split tokens are dropped all the same.
    assert (found.split_tokens, found.token_score) == (1.0, "attention")
    assert found.lines[1].endswith("all go on at the split, by attention")


def test_where_the_frozen_end_tells_less_than_the_split_how_few_tokens_do_is_not_asked_of_it() -> None:
    signal = EVERYWHERE | {(12, 16): 0.5, (12, 8): 0.5, (12, 8 + _Telling.BY_DISTANCE): 0.5}
    found, backend, _ = _look(signal, scores=("attention", "distance"))
    assert (found.split_block, found.split_tokens) == (8, 1.0)
    assert found.lines[1].endswith("at the split 100.0%: what is above learns anew, from all patch tokens")
    assert sum(backend.to_end) == 96  # all tokens, once


def test_only_so_many_images_are_put_through_the_whole_model_and_each_way_no_longer_than_it_takes() -> None:
    signal = EVERYWHERE | {(12, 8): 9.0, (12, 8 + _Telling.BY_DISTANCE): 9.0}
    found, backend, loaded = _look(signal, scores=("attention", "distance"), to_end=20)
    assert found.split_tokens == 0.4
    assert sum(backend.to_end) == 2 * 20  # all tokens, and by distance; attention is not asked
    assert loaded[:13] == [
        *((start, min(start + 8, 20)) for start in (0, 8, 16)),
        *((start, min(start + 8, 96)) for start in range(20, 96, 8)),
    ]
    assert loaded[13:] == loaded[:3]  # nothing was kept


def test_what_is_kept_of_the_first_pass_is_not_computed_again(tmp_path: Path) -> None:
    signal = EVERYWHERE | {(12, 8): 0.0, (12, 8 + _Telling.BY_DISTANCE): 0.0}
    for split, again in ((8, 0), (6, 3)):  # what was kept was of block 8
        own = signal | {(8, 16): 9.0 if split == 8 else 0.0}

        def kept(blocks: int) -> LookedFeatures:
            return LookedFeatures(
                tmp_path, np.arange(96), blocks=blocks, tokens=17, width=4, scores=("attention", "distance"),
                precision="float16", limit_bytes=MIB,
            )  # fmt: skip

        found, _, loaded = _look(own, scores=("attention", "distance"), to_end=20, kept=kept)
        assert found.split_block == split
        assert found.looked is not None
        assert found.looked.blocks == split
        assert len(loaded) == 13 + again
        assert found.looked.count == (96 if split == 8 else 20)
        found.looked.close()


def test_where_bare_pixels_tell_more_than_the_pretrained_blocks_nothing_is_frozen() -> None:
    nothing = {(block, tokens): 0.0 for block in (4, 6, 8, 12) for tokens in (8, 16)}
    assert _found(nothing, pixels_tell=True) == (0, 1.0)
    assert _found(nothing, pixels_tell=True, to_end=32) == (0, 1.0)
    # What only the last blocks make of images is something, too.
    found, _, _ = _look(nothing | {(12, 8): 9.0, (12, 16): 9.0}, scores=())
    assert found.fits


def make_request(method: str) -> PlanRequest:
    shape = make_shape(depth=12)
    space = space_of(METHODS[method], shape, trained_blocks=None, split_block=None)
    return PlanRequest(
        shape=shape, space=space, cap_bytes=GIB, batch_size=8, optimizer="adamw", runtime_bytes=MIB,
    )  # fmt: skip


def test_what_a_look_frees_is_kept_only_where_the_cap_has_room_for_it_twice_beside_what_the_run_takes() -> None:
    request = make_request("alast")

    def fits(cap_bytes: int) -> tuple[int, int, int]:
        asked = msgspec.structs.replace(request, cap_bytes=cap_bytes)
        return _batch_that_fits(asked, plan)

    plan = make_plan(msgspec.structs.replace(request, cap_bytes=64 * GIB))
    batch, peak, holes = fits(64 * GIB)
    assert holes > 0
    at_least = max(peak, plan.predicted_peak_bytes) + 2 * holes
    assert fits(at_least) == (batch, peak, holes)
    tight = fits(max(peak, plan.predicted_peak_bytes) + holes)
    assert tight[0] == batch
    assert tight[1] < peak
    assert tight[2] == 0
    assert fits(MIB)[0] == 0


BADLY = Found(0, 1.0, ("why",), fits=False)


@pytest.mark.parametrize("method", ["alast", "random-k"])
def test_where_the_pretrained_blocks_fit_badly_all_of_the_model_trains_on_all_tokens(method: str) -> None:
    request, found = _planned(make_request(method), BADLY, prunes=True)
    assert (found.split_block, found.trained_blocks, found.embeddings_train) == (0, request.shape.depth, True)
    assert found.token_floor == 1.0
    assert set(found.token_ceiling) == {request.shape.patch_tokens}
    assert "and the embeddings" in " ".join(found.explanation)


def test_under_a_cap_that_binds_as_much_of_it_trains_as_fits_and_then_what_else_would() -> None:
    generous = make_request("alast")
    whole = _planned(generous, BADLY, prunes=True)[0]
    needed, usual = smallest_cap_bytes(whole), smallest_cap_bytes(generous)
    assert usual < needed
    seen = []
    for cap in (needed, needed - 1, usual):
        _, found = _planned(msgspec.structs.replace(generous, cap_bytes=cap), BADLY, prunes=True)
        assert found.predicted_peak_bytes <= cap
        seen.append(found.token_floor == 1.0)
    assert seen == [True, False, False]


def test_a_floor_or_ceiling_that_was_asked_for_stays() -> None:
    asked = msgspec.structs.replace(make_request("alast"), token_floor=0.8)
    assert _planned(asked, BADLY, prunes=True, budgets_asked=True)[1].token_floor == 0.8
    asked = msgspec.structs.replace(make_request("alast"), token_ceiling=0.9)
    found = _planned(asked, BADLY, prunes=True, budgets_asked=True)[1]
    assert found.embeddings_train
    assert found.token_floor <= 0.9


def test_a_method_that_trains_the_last_blocks_alone_goes_on_doing_so() -> None:
    found = _planned(make_request("last-k"), BADLY, prunes=True)[1]
    assert not found.embeddings_train
    assert found.split_block == 8


@pytest.mark.parametrize(
    ("split", "score", "tokens", "changes", "taken"),
    [
        (8, "attention", 0.4, {}, 32),
        (8, "distance", 0.4, {}, 32),
        (8, "attention", 1.0, {"cache_precision": "float32"}, 32),
        (6, "distance", 0.4, {"cache_precision": "float32"}, 32),
        (8, "attention", 0.4, {"hflip": 0.5, "augment_views": 2}, None),  # but not those that are mirrored
        (8, "attention", 0.4, {"cache_limit_bytes": 10**9}, 0),
    ],
)
def test_the_cache_takes_what_the_look_made_and_holds_what_it_would_have_computed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: int,
    score: TokenScore,
    tokens: float,
    changes: dict[str, Any],
    taken: int | None,
) -> None:
    pytest.importorskip("torch")
    from edgetune.backends.pytorch import TorchBackend

    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})  # 32 are trained on
    common = {"steps": None, "epochs": 3, "method": "alast", "seed": 1} | changes
    monkeypatch.setattr(look, "loses_nothing", lambda *_correct: True)
    monkeypatch.setattr(look, "choose_split", lambda _told: split)
    monkeypatch.setattr(look, "WAYS", (Way(score, tokens),))
    computed, features = [], TorchBackend.features
    monkeypatch.setattr(
        TorchBackend,
        "features",
        lambda self, inputs, *rest, **more: computed.append(len(inputs)) or features(self, inputs, *rest, **more),
    )
    finetune(images, tmp_path / "found", **common, split="auto")
    found = sum(computed)
    computed.clear()
    finetune(images, tmp_path / "named", **common, split_block=split, split_tokens=tokens, token_score=score)
    named = sum(computed)
    assert (named - found == taken) if taken is not None else (0 < named - found < 32)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("found", "named"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "found") == losses(tmp_path / "named")
    written = [read_report(tmp_path / name).pictures_written_bytes for name in ("found", "named")]
    assert written[0] is not None
    assert written[1] is not None
    assert (written[0] > written[1]) == (taken != 0)
    assert list((tmp_path / "found").rglob("*.tmp")) == []


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_whose_split_was_found_is_replayed_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    pytest.importorskip("torch")
    from edgetune import run

    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})
    with monkeypatch.context() as patch:
        patch.setattr(look, "loses_nothing", lambda *_correct: fits)
        patch.setattr(look, "choose_split", lambda _told: 8)
        patch.setattr(look, "WAYS", (Way("distance", 0.4),))
        finetune(images, tmp_path / "run", steps=None, epochs=3, method="alast", split="auto")
    again = run.settings_of_replay(tmp_path / "run", run_settings(images))
    run.finetune(again, output=tmp_path / "again", listener=Witness())
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    report = read_report(tmp_path / "run")
    assert (report.split_block, report.token_score) == ((8, "distance") if fits else (0, "attention"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"steps": 2}, "3 passes over the images on, and these are 0.5"),
        ({"epochs": 3, "method": "full"}, "--method full leaves no split to choose"),
        ({"epochs": 3, "trained_blocks": 2}, "what trains is named"),
        ({"epochs": 3, "pretrained": False}, "the model is not pretrained"),
        ({"epochs": 3, "pretrained": False, "split": None}, "the model is not pretrained"),
        ({"steps": 2, "split": None}, "3 passes over the images on, and these are 0.5"),
        (
            {"epochs": 3, "val_share": 0.25},
            "30 training images share their class with another, and fewer than 32 tell nothing",
        ),
        ({"epochs": 3, "ram_cap_bytes": None}, None),
    ],
)
def test_where_nothing_is_looked_for_it_is_said_why_and_the_report_has_it(
    tmp_path: Path, changes: dict[str, Any], why: str | None
) -> None:
    pytest.importorskip("torch")
    images, witness = make_images(tmp_path / "images", {"ant": 20, "bee": 20}), Witness()
    options = {"steps": None, "method": "alast", "split": "auto"} | changes
    finetune(images, tmp_path / "run", witness, **options)
    notes = read_report(tmp_path / "run").notes
    if why is None:
        assert sum(note.startswith("split: ") for note in notes) in (1, 2)
    else:
        assert any(note.startswith("--split auto: not looked for, since ") and why in note for note in notes)
    assert set(notes) <= set(witness.notes) | {note for note in notes if "no val/" in note}


def test_who_names_what_trains_is_not_told_that_nothing_was_looked_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    images, witness = make_images(tmp_path / "images", {"ant": 20, "bee": 20}), Witness()
    finetune(images, tmp_path / "run", witness, steps=None, epochs=3, method="alast", split_block=8)
    assert not any("--split auto" in note for note in witness.notes)


@pytest.mark.parametrize(
    ("labels", "images"),
    [
        (range(2), 0),  # one image a class: nothing can tell it once it is left out
        ([0, 0, 1, 1, 2, 2], 6),
        (range(384), 0),
        ([*range(10, 100), *[0] * 31], 31),
        ([*range(10, 100), *[0] * 32], None),
        ([0, 1] * 16, None),
    ],
)
def test_too_few_images_tell_nothing_and_none_that_is_alone_in_its_class_counts(
    labels: Sequence[int], images: int | None
) -> None:
    settings = run_settings(None, steps=None, epochs=3)
    refusal = why_not_looked(settings, make_request("alast"), list(labels))
    assert refusal is None if images is None else f"{images} training images" in str(refusal)


def test_what_a_look_found_is_in_the_report_of_a_run_that_was_killed_after_it(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})
    options: dict[str, Any] = {"steps": None, "epochs": 3, "method": "alast", "split": "auto"}
    finetune(images, tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetune.run.train_and_report", _raise(Killed))
        with pytest.raises(Killed):
            finetune(images, tmp_path / "killed", **options)
    resume(tmp_path / "killed")
    whole, killed = (read_report(tmp_path / name) for name in ("whole", "killed"))
    found = [note for note in whole.notes if note.startswith("split: ")]
    assert found
    assert [note for note in killed.notes if note.startswith("split: ")] == found
    assert killed.look_seconds is not None


def _raise(kind: type[Exception]) -> Callable[..., None]:
    def raising(*_args: object, **_more: object) -> None:
        raise kind

    return raising


def test_a_run_on_a_task_that_the_model_fits_badly_trains_its_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})  # told by their colour
    changes = {"steps": None, "epochs": 3, "method": "alast", "split": "auto"}
    badly = Found(0, 1.0, ("why",), fits=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "find", lambda *_args, **_more: badly)
        finetune(images, tmp_path / "run", **changes)
        with pytest.raises(Interrupted):
            finetune(images, tmp_path / "stopped", interrupt_after(5), **changes)
    report = read_report(tmp_path / "run")
    assert (report.split_block, report.trained_blocks, report.tokens_share) == (0, 12, 1.0)
    resume(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "run")
    start, end = (
        load_file(path)
        for path in (tmp_path / "run" / "checkpoints" / "base.safetensors", tmp_path / "run" / "model.safetensors")
    )
    assert not np.array_equal(start["pos_embed"], end["pos_embed"])


@pytest.mark.parametrize(
    ("changes", "looked"),
    [
        ({"split": "auto"}, True),
        ({}, True),
        ({"split": "lowest"}, False),
        ({"method": "random-k"}, False),
        ({"method": "random-k", "split": "auto"}, True),
        ({"split": "auto", "split_block": 4}, False),
        ({"split": "auto", "trained_blocks": 3}, False),
        ({"split": "auto", "epochs": 2}, False),
        ({"split": "auto", "method": "full"}, False),
    ],
)
def test_a_run_looks_where_it_was_asked_to_and_it_pays(
    tmp_path: Path, changes: dict[str, object], looked: bool
) -> None:
    pytest.importorskip("torch")
    images = make_images(tmp_path / "images", {"ant": 20, "bee": 20})
    witness = Witness()
    finetune(images, tmp_path / "run", witness, **({"steps": None, "epochs": 3, "method": "alast"} | changes))
    report = read_report(tmp_path / "run")
    assert any(note.startswith("split: ") for note in witness.notes) == looked
    assert ("look" in report.phases) == looked == (report.look_seconds is not None)
    if looked:
        assert report.look_seconds is not None
        assert report.total_seconds is not None
        assert 0 < report.look_seconds < report.total_seconds
        assert report.split_block in (0, 4, 6, 8)
        assert report.predicted_phases["look"] > 0
