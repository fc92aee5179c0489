"""Runs whose frozen blocks are computed once: the same results, in less memory, whatever happens to the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import make_images
from feature_cases import make_ids, make_key, read
from running import SECONDS, Witness, command, environment, finetune, interrupt_after, losses, resume

pytest.importorskip("torch")
pytest.importorskip("timm")

import timm
import torch
from PIL import Image

from edgetune import caching, planner, trainer
from edgetune.caching import CachedImages
from edgetune.data import images as decoding
from edgetune.errors import DoesNotFit, FeaturesDamaged, Interrupted, UsageError
from edgetune.features import FeatureStore
from edgetune.inference import evaluate, load_run
from edgetune.planner import Plan, PlanRequest
from edgetune.report import RunReport, read_report
from edgetune.store import read_stored

# 32 training images and 8 for validation: an epoch is four steps.
RUN: dict[str, Any] = {"epochs": 3, "steps": None, "method": "last-k", "split_block": 8, "seed": 2}
EXACT = RUN | {"cache_precision": "float32"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"ant": 20, "bee": 20})


def run(images: Path, folder: Path, **changes: Any) -> tuple[RunReport, list[str]]:
    witness = Witness()
    return finetune(images, folder, witness, **changes), witness.notes


def said(notes: list[str], *words: str) -> bool:
    return any(all(word in note for word in words) for note in notes)


def chunks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock"))


# ------------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("method", ["last-k", "random-k", "alast"])
def test_a_cached_run_has_the_losses_of_one_that_computes_everything(images: Path, tmp_path: Path, method: str) -> None:
    changes = EXACT | {"method": method}
    report, _ = run(images, tmp_path / "cached", **changes)
    plain, _ = run(images, tmp_path / "plain", **changes, prefix_cache=False)
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    assert report.val_accuracy == plain.val_accuracy
    assert report.val_loss == plain.val_loss
    assert (report.cached_blocks, plain.cached_blocks) == (8, 0)
    assert report.flops is not None
    assert plain.flops is not None
    assert report.flops < 0.7 * plain.flops


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_an_image_is_decoded_once_from_the_scan_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    fresh = make_images(tmp_path / "images", {"ant": 10, "bee": 10})
    opened: list[str] = []
    plain = decoding._open_and_decode

    def counted(name: str, *rest: Any) -> Any:
        opened.append(name)
        return plain(name, *rest)

    monkeypatch.setattr(decoding, "_open_and_decode", counted)
    changes = EXACT if cached else {**EXACT, "split_block": 0, "method": "full"}
    report, _ = run(fresh, tmp_path / "run", **changes)
    assert report.cached_blocks == (8 if cached else 0)
    assert sorted(opened) == sorted(str(path) for path in fresh.rglob("*.png"))
    assert report.pictures_written_bytes == 20 * 32 * 32 * 3
    opened.clear()
    # A limit that binds nothing, but says how much may lie on the disk.
    limited, _ = run(fresh, tmp_path / "limited", **changes, cache_limit_bytes=1 << 30)
    assert limited.pictures_written_bytes == 0
    assert len(opened) >= 20
    assert losses(tmp_path / "limited") == losses(tmp_path / "run")


def test_micro_batches_and_short_last_batches_come_from_the_cache_too(images: Path, tmp_path: Path) -> None:
    changes = EXACT | {"batch_size": 10, "accumulation": 3}
    run(images, tmp_path / "cached", **changes)
    run(images, tmp_path / "plain", **changes, prefix_cache=False)
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")


@pytest.mark.parametrize("score", ["attention", "distance"])
def test_tokens_dropped_at_the_split_are_dropped_in_the_cache(images: Path, tmp_path: Path, score: str) -> None:
    changes = EXACT | {"split_tokens": 0.4, "method": "alast", "token_score": score}
    report, _ = run(images, tmp_path / "cached", **changes)
    plain, _ = run(images, tmp_path / "plain", **changes, prefix_cache=False)
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    assert report.val_accuracy == plain.val_accuracy
    assert report.evaluation_tokens == plain.evaluation_tokens
    assert report.token_score == score


@pytest.mark.parametrize("score", ["attention", "distance"])
def test_a_saved_model_is_evaluated_with_the_tokens_that_served_it_by_their_score(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    monkeypatch.setattr(trainer, "_better", lambda scores, best, *, balanced: True)  # as trained, and the last epoch
    report, _ = run(images, tmp_path / "run", **EXACT, split_tokens=0.25, token_score=score)
    config = json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert config["edgetune_evaluation_tokens"][-1] == report.evaluation_tokens
    assert config["edgetune_token_score"] == score
    loaded = load_run(tmp_path / "run", threads=1)
    plain = loaded.logits(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy())
    config["edgetune_token_score"] = "attention" if score == "distance" else "distance"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    other = load_run(tmp_path / "run", threads=1)
    assert not (
        plain == other.logits(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy())
    ).all()
    found = evaluate(loaded, None, batch_size=8, note=lambda text: None)
    assert found["accuracy"] == report.val_accuracy


def test_fixed_views_are_the_same_from_the_cache(images: Path, tmp_path: Path) -> None:
    changes = EXACT | {"augment": True, "augment_views": 2, "epochs": 5}
    report, _ = run(images, tmp_path / "cached", **changes)
    run(images, tmp_path / "plain", **changes, prefix_cache=False)
    assert report.cached_blocks == 8
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    epochs = [losses(tmp_path / "cached")[start : start + 4] for start in range(0, 20, 4)]
    assert len({epoch[0][1] for epoch in epochs}) == 5


@pytest.mark.parametrize(
    ("change", "views", "words"),
    [
        ({"epochs": 6}, 3, "3 fixed views of each image"),
        ({"epochs": 3}, None, "anew, since views pay from 4 passes"),
        ({"epochs": 6, "cache_limit_bytes": 1000}, None, "anew, since the cache has no room for 2 views"),
        ({"epochs": 6, "prefix_cache": False}, None, "anew, since --no-cache"),
        ({"epochs": 6, "split_block": 0, "method": "alast"}, None, "anew, since nothing is cached"),
    ],
)
def test_views_that_are_left_open_are_cached_or_new_every_epoch_and_it_is_said_which(
    images: Path, tmp_path: Path, change: dict[str, Any], views: int | None, words: str
) -> None:
    report, notes = run(images, tmp_path / "run", **(EXACT | {"augment": True, "augment_views": 0} | change))
    assert read_stored(tmp_path / "run").settings.augment_views == views
    assert (report.cached_blocks != 0) == (views is not None)
    assert said(notes, "--augment-views auto: ", words)
    assert any(words in note for note in report.notes)
    run(images, tmp_path / "same", **(EXACT | {"augment": True, "augment_views": views} | change))
    assert losses(tmp_path / "run") == losses(tmp_path / "same")


def test_a_mirrored_image_is_kept_once_however_many_views_show_it(images: Path, tmp_path: Path) -> None:
    plain, _ = run(images, tmp_path / "plain", **EXACT)
    report, _ = run(images, tmp_path / "views", **EXACT, hflip=0.5, augment_views=2)
    assert plain.cache_bytes is not None
    assert report.cache_bytes is not None
    assert plain.cache_bytes < report.cache_bytes < 1.9 * plain.cache_bytes


def test_a_head_keeps_the_class_token_alone(images: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 3, "steps": None, "method": "head", "cache_precision": "float32"}
    report, notes = run(images, tmp_path / "cached", **changes)
    run(images, tmp_path / "plain", **changes, prefix_cache=False)
    assert report.cached_blocks == 12
    assert report.cache_bytes is not None
    assert report.cache_bytes < 40 * (96 * 4 + 200) + 4000
    assert said(notes, "the class token")
    for (_, one, _), (_, other, _) in zip(losses(tmp_path / "cached"), losses(tmp_path / "plain"), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5)  # the norm's gradient is summed in another order


def test_half_precision_changes_little(images: Path, tmp_path: Path) -> None:
    half, _ = run(images, tmp_path / "half", **RUN)
    whole, _ = run(images, tmp_path / "whole", **EXACT)
    assert (half.cache_precision, whole.cache_precision) == ("float16", "float32")
    assert half.cache_bytes is not None
    assert whole.cache_bytes is not None
    assert half.cache_bytes == pytest.approx(whole.cache_bytes / 2, rel=0.05)
    for (_, one, _), (_, other, _) in zip(losses(tmp_path / "half"), losses(tmp_path / "whole"), strict=True):
        assert float(one) == pytest.approx(float(other), rel=0.05)


def test_what_half_precision_cant_hold_is_kept_as_float32(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.backends.pytorch import TorchBackend

    plain = TorchBackend.features
    monkeypatch.setattr(TorchBackend, "features", lambda *args, **more: 1e6 * plain(*args, **more))
    report, notes = run(images, tmp_path / "run", **RUN)
    assert report.cache_precision == "float32"
    assert said(notes, "float16", "float32")


# -------------------------------------------------------------------------------------------- the prefix leaves memory


def test_the_prefix_leaves_memory_and_comes_back_in_what_is_saved(images: Path, tmp_path: Path) -> None:
    report, notes = run(images, tmp_path / "run", **RUN)
    reference = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, num_heads=3, num_classes=2
    )
    below = sum(
        value.nbytes
        for name, value in reference.named_parameters()
        if name.startswith(("patch_embed", "cls_token", "pos_embed"))
        or name.split(".")[1:2] in [[str(n)] for n in range(8)]
    )
    assert report.dropped_weights_bytes == below
    assert said(notes, "leave memory")
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    state = model.state_dict()
    start = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=False).state_dict()
    assert any(not torch.equal(state[name], start[name]) for name in state if name.startswith("blocks.0."))


def test_the_saved_model_is_the_one_of_the_run_that_computes_everything(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "cached", **EXACT)
    run(images, tmp_path / "plain", **EXACT, prefix_cache=False)
    assert (tmp_path / "cached" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


# ---------------------------------------------------------------------------------------------------- used again, or not


def test_another_run_with_the_same_prefix_writes_nothing(images: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "shared")
    first, _ = run(images, tmp_path / "one", **RUN, cache_dir=cache, prefix_cache=True)
    second, _ = run(images, tmp_path / "two", **RUN, cache_dir=cache, prefix_cache=True, learning_rate=3e-3)
    assert first.cache_written_bytes
    assert second.cache_written_bytes == 0
    assert second.cache_bytes == first.cache_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"split_block": 9},
        {"image_px": 40},
        {"cache_precision": "float32"},
        {"split_tokens": 0.5},
        {"split_tokens": 0.25, "token_score": "distance"},
    ],
)
def test_a_cache_of_something_else_is_not_used(images: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    cache = str(tmp_path / "shared")
    run(images, tmp_path / "one", **(RUN | {"split_tokens": 0.25}), cache_dir=cache, prefix_cache=True)
    other, _ = run(images, tmp_path / "two", **(RUN | change), cache_dir=cache, prefix_cache=True)
    assert other.cache_written_bytes
    assert other.cached_blocks == change.get("split_block", 8)


def put_through(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
    """How many images each call puts through the frozen blocks; `meanwhile` is what happens during the first."""
    from edgetune.backends.pytorch import TorchBackend

    counts: list[int] = []
    plain = TorchBackend.features

    def counted(self: TorchBackend, inputs: Any, *rest: Any, **more: Any) -> Any:
        if not counts:
            meanwhile()
        counts.append(len(inputs))
        return plain(self, inputs, *rest, **more)

    monkeypatch.setattr(TorchBackend, "features", counted)
    return counts


def test_what_another_run_caches_meanwhile_is_not_computed_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.features import chunks as chunk_files

    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 100_000)  # six images
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with monkeypatch.context() as patch:
        alone = put_through(patch)
        run(images, tmp_path / "one", **EXACT, cache_dir=str(theirs), prefix_cache=True)
    computed = put_through(monkeypatch, lambda: shutil.copytree(theirs, ours))
    witness, told = Witness(), []
    witness.progress = lambda *what: told.append(what)  # type: ignore[method-assign]
    report = finetune(images, tmp_path / "two", witness, **EXACT, cache_dir=str(ours), prefix_cache=True)
    assert told.count(("cache training images", 32, 32)) == 1
    assert sum(alone) == 40
    # What was put through, or loaded for it, before the first chunk was to be written.
    assert sum(computed) <= 3 * max(alone)
    assert report.cache_written_bytes == 0
    assert chunks(ours) == [ours / path.relative_to(theirs) for path in chunks(theirs)]
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.parametrize("views", [1, 3])
def test_runs_that_go_side_by_side_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int) -> None:
    key, ids = make_key(stored_tokens=1, width=1), make_ids(1200)
    monkeypatch.setattr("edgetune.features.chunks.CHUNK_BYTES", 16 * key.entry_bytes)
    values, computed = np.arange(1200, dtype=np.float32).reshape(-1, 1, 1), []
    stores = [FeatureStore.open(tmp_path, key, ids) for _ in range(3)]
    parts = [[CachedImages(store, 1200 // views, views, (1,))] for store in stores]
    # 7 divides no view's images.
    waiting = [caching._still_missing(part, store.missing(), 7) for part, store in zip(parts, stores, strict=True)]
    for batches in zip_longest(*waiting):
        for store, batch in zip(stores, batches, strict=True):
            if batch is not None:
                assert len(set(batch[1] // (1200 // views))) == 1
                store.add(batch[1], values[batch[1]])
                computed.extend(batch[1])
    for store in stores:
        store.close()
        assert store.is_whole
        np.testing.assert_array_equal(read(store, range(1200)), values)
    assert len(computed) < 1.5 * 1200


def test_two_runs_that_start_together_on_one_cache_write_it_once_within_its_limit(images: Path, tmp_path: Path) -> None:
    alone, _ = run(images, tmp_path / "alone", **EXACT)
    assert alone.cache_bytes is not None
    cache = tmp_path / "shared"
    flags = ["--model", "edgetune_micro", "--device", "jetson-nano", "-b", "8", "--threads", "1", "--seed", "2"]
    flags += ["--epochs", "3", "--method", "last-k", "--split", "8", "--cache-precision", "float32"]
    flags += ["--data", str(images), "--cache", str(cache), "--cache-limit", str(alone.cache_bytes + 1000)]
    folders, met = [tmp_path / "one", tmp_path / "two"], tmp_path / "met"
    met.mkdir()
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from edgetune.backends.pytorch import TorchBackend\n"
        "plain, met, end = TorchBackend.features, Path(sys.argv.pop(1)), time.monotonic() + 60\n"
        "def both(*args, **more):\n"
        "    (met / str(os.getpid())).touch()\n"
        "    while len(list(met.iterdir())) < 2 and time.monotonic() < end:\n"
        "        time.sleep(0.01)\n"
        "    return plain(*args, **more)\n"
        "TorchBackend.features = both\n"
        "from edgetune.__main__ import entry\n"
        "entry()\n"
    )
    start = [command()[0], "-c", script, str(met), "finetune", *flags, "--output"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    runs = [subprocess.Popen([*start, str(folder)], **quiet) for folder in folders]
    assert [process.wait(SECONDS) for process in runs] == [0, 0]
    reports = [read_report(folder) for folder in folders]
    assert sum(report.cache_written_bytes or 0 for report in reports) == sum(
        path.stat().st_size for path in cache.rglob("*") if path.is_file()
    )
    for folder, report in zip(folders, reports, strict=True):
        assert report.dropped_weights_bytes == alone.dropped_weights_bytes != 0  # its cache is whole
        assert losses(folder) == losses(tmp_path / "alone")


def test_an_image_that_changed_is_computed_again_and_no_other(tmp_path: Path) -> None:
    images, cache = make_images(tmp_path / "images", {"ant": 20, "bee": 20}), str(tmp_path / "shared")
    first, _ = run(images, tmp_path / "one", **EXACT, cache_dir=cache, prefix_cache=True)
    changed = images / "ant" / "003.png"
    before = changed.stat()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    second, _ = run(images, tmp_path / "two", **EXACT, cache_dir=cache, prefix_cache=True)
    plain, _ = run(images, tmp_path / "plain", **EXACT, prefix_cache=False)
    assert first.cache_written_bytes is not None
    assert second.cache_written_bytes is not None
    assert 0 < second.cache_written_bytes < first.cache_written_bytes / 10
    assert losses(tmp_path / "two") == losses(tmp_path / "plain")
    assert second.val_loss == plain.val_loss


def test_a_damaged_chunk_is_said_and_computed_again(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "shared"
    run(images, tmp_path / "one", **EXACT, cache_dir=str(cache), prefix_cache=True)
    chunk = max(chunks(cache), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    report, notes = run(images, tmp_path / "two", **EXACT, cache_dir=str(cache), prefix_cache=True)
    assert report.cache_written_bytes
    assert said(notes, "computed again")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


# --------------------------------------------------------------------------------------------------------- why it is not


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 1}, ["each image is seen once"]),
        ({"hflip": 0.5}, ["--augment-views"]),
        ({"prefix_cache": False}, ["--no-cache"]),
        ({"method": "full", "split_block": None}, ["the lowest block may train"]),
    ],
)
def test_it_says_why_nothing_is_cached(images: Path, tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    report, notes = run(images, tmp_path / "run", **(RUN | change))
    assert report.cached_blocks == 0
    assert report.cache_bytes is None
    assert not (tmp_path / "run" / "cache").exists()
    assert said(notes, "prefix not cached", *words)


# ------------------------------------------------------------------------------------------------------ a full disk


def test_under_a_limit_some_are_kept_and_the_run_is_the_same(images: Path, tmp_path: Path) -> None:
    limit = 500_000
    report, notes = run(images, tmp_path / "part", **EXACT, cache_limit_bytes=limit)
    plain, _ = run(images, tmp_path / "plain", **EXACT, prefix_cache=False)
    assert report.cache_bytes is not None
    assert limit / 2 < report.cache_bytes <= limit
    assert report.dropped_weights_bytes == 0
    assert said(notes, "only", "cache")
    assert losses(tmp_path / "part") == losses(tmp_path / "plain")
    assert report.val_loss == plain.val_loss


def test_a_disk_that_fills_up_meanwhile_does_not_fail_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.features import chunks

    def full(*_args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(chunks, "write_chunk", full)
    report, notes = run(images, tmp_path / "part", **EXACT)
    plain, _ = run(images, tmp_path / "plain", **EXACT, prefix_cache=False)
    assert said(notes, "nothing can be cached in", str(tmp_path / "part"), os.strerror(28))
    assert any("nothing can be cached" in note for note in report.notes)
    assert losses(tmp_path / "part") == losses(tmp_path / "plain")
    assert report.val_loss == plain.val_loss


def test_where_the_run_needs_the_cache_to_fit_a_full_disk_says_so(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.engines import torch as engine
    from edgetune.features import chunks

    def full(*_args: object) -> None:
        raise OSError(28, os.strerror(28))

    def none_fits(request: PlanRequest, **_: object) -> Plan:
        if request.cache is None or request.cache.blocks is None:
            return planner.plan(request)
        raise DoesNotFit("needs more", 2**30)

    monkeypatch.setattr(chunks, "write_chunk", full)
    monkeypatch.setattr(engine, "make_plan", none_fits)
    with pytest.raises(DoesNotFit, match=r"cached .*No space left.* in memory"):
        run(images, tmp_path / "run", **EXACT)


# --------------------------------------------------------------------------------------------------- stopped, killed


@pytest.mark.parametrize("score", ["attention", "distance"])
def test_a_cached_run_that_was_stopped_goes_on_as_if_it_had_not(images: Path, tmp_path: Path, score: str) -> None:
    changes = RUN | {"method": "alast", "checkpoint_every": 2, "split_tokens": 0.6, "token_score": score}
    run(images, tmp_path / "whole", **changes)
    with pytest.raises(Interrupted):
        finetune(images, tmp_path / "stopped", interrupt_after(5), **changes)
    report = resume(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert report.dropped_weights_bytes
    assert report.pictures_written_bytes == read_report(tmp_path / "whole").pictures_written_bytes != 0


def test_a_run_whose_cache_is_removed_meanwhile_says_so_and_can_be_gone_on_with(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "whole", **EXACT)
    folder, cache = tmp_path / "run", tmp_path / "run" / "cache"
    witness = Witness(lambda event: shutil.rmtree(cache) if event.step == 6 else None)
    with pytest.raises(FeaturesDamaged) as ended:
        finetune(images, folder, witness, **EXACT)
    assert re.fullmatch(
        rf"training stopped after step 6: Cached features can't be read back: {cache}/\S+\.chunk is not there any more\. "
        rf"What is missing or damaged is computed again by: edgetune finetune --resume {folder}",
        str(ended.value),
    )
    assert (read_report(folder).stopped_because, read_report(folder).steps) == ("failed", 6)
    report = resume(folder)
    assert report.cache_written_bytes
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_run_killed_while_it_caches_goes_on_with_what_is_there(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, tmp_path / "whole", **EXACT)
    folder = tmp_path / "killed"
    script = (
        "import os, signal, sys, time\n"
        "from edgetune.features import chunks\n"
        "chunks.CHUNK_BYTES = 100_000\n"
        "plain = chunks.write_chunk\n"
        "def slow(*args):\n"
        "    found = plain(*args)\n"
        "    time.sleep(0.3)\n"
        "    return found\n"
        "chunks.write_chunk = slow\n"
        "from edgetune.__main__ import entry\n"
        "entry()\n"
    )
    flags = ["--model", "edgetune_micro", "--device", "jetson-nano", "-b", "8", "--threads", "1", "--seed", "2"]
    flags += ["--epochs", "3", "--method", "last-k", "--split", "8", "--cache-precision", "float32"]
    flags += ["--data", str(images), "--output", str(folder)]
    arguments = [command()[0], "-c", script, "finetune", *flags]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    cache, end = folder / "cache", time.monotonic() + SECONDS
    while len(chunks(cache) if cache.exists() else []) < 3:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = sum(path.stat().st_size for path in chunks(cache))
    report = resume(folder)
    assert report.cache_bytes is not None
    assert report.cache_written_bytes is not None
    assert 0 < report.cache_written_bytes <= report.cache_bytes - there + 100_000
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_stop_while_it_caches_leaves_a_folder_that_goes_on(images: Path, tmp_path: Path) -> None:
    witness = Witness()

    def stop(what: str, _done: int, _total: int) -> None:
        if what.startswith("cache"):
            signal.raise_signal(signal.SIGINT)

    witness.progress = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        finetune(images, tmp_path / "run", witness, **EXACT)
    assert read_report(tmp_path / "run").stopped_because == "interrupted"
    resume(tmp_path / "run")
    run(images, tmp_path / "whole", **EXACT)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_cache_in_a_file_s_place_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"ant": 6, "bee": 6})
    (tmp_path / "photo.jpg").write_bytes(b"not a folder")
    for place in (tmp_path / "photo.jpg", tmp_path / "photo.jpg" / "cache"):
        with pytest.raises(UsageError, match=r"photo\.jpg is a file"):
            finetune(images, tmp_path / "run", split_block=8, method="alast", cache_dir=str(place))
    assert not (tmp_path / "run").exists()
