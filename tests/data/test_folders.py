"""What `open_folder` makes of folders as people have them: tidy, unbalanced, broken, hostile."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture
from PIL import Image

from edgetune.data import DataFolder, Preprocess, class_weights, load_batch, open_folder, open_for_evaluation
from edgetune.errors import DataError, UsageError


def paths_by_class(images) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for path, label in zip(images.paths, images.labels, strict=True):
        found.setdefault(label, []).append(path)
    return found


def notes(folder: DataFolder) -> str:
    return "\n".join(folder.notes)


# ---- layouts


def test_class_folders_alone_are_split_by_seed_class_by_class(two_classes: Path):
    folder = open_folder(two_classes, seed=0)
    assert folder.classes == ("cat", "dog")
    assert {label: len(paths) for label, paths in paths_by_class(folder.train).items()} == {0: 8, 1: 8}
    assert {label: len(paths) for label, paths in paths_by_class(folder.val).items()} == {0: 2, 1: 2}
    assert not set(folder.train.paths) & set(folder.val.paths)
    assert "16 images train and 4 validate" in notes(folder)
    assert folder == open_folder(two_classes, seed=0)
    assert folder.val != open_folder(two_classes, seed=1).val


@pytest.mark.parametrize("val_name", ["val", "valid", "validation", "Val"])
def test_train_and_val_folders_are_used_as_given(two_classes: Path, make_class, val_name):
    shutil.move(two_classes, two_classes.parent / "train")
    root = two_classes.parent
    make_class(root / val_name / "dog", 3, first=50)
    make_class(root / val_name / "cat", 2, first=60)
    folder = open_folder(root, seed=0)
    assert (len(folder.train.paths), len(folder.val.paths)) == (20, 5)
    assert {label: len(paths) for label, paths in paths_by_class(folder.val).items()} == {0: 2, 1: 3}
    assert folder.train.paths[0] == "train/cat/000.png"


def test_a_train_folder_alone_is_split_and_what_lies_beside_it_named(two_classes: Path, make_class):
    shutil.move(two_classes, two_classes.parent / "train")
    make_class(two_classes.parent / "test" / "cat", 2)
    folder = open_folder(two_classes.parent, seed=0)
    assert len(folder.train.paths) + len(folder.val.paths) == 20
    assert "test/ beside train/" in notes(folder)


@pytest.mark.parametrize("classes", [("bus", "train"), ("invalid", "valid")])
def test_train_and_valid_can_be_the_names_of_classes(tmp_path: Path, make_class, classes):
    for number, name in enumerate(classes):
        make_class(tmp_path / name, 4, first=10 * number)
    folder = open_folder(tmp_path, seed=0)
    assert folder.classes == classes
    assert ("valid/ is taken for a class" in notes(folder)) == ("valid" in classes)


def test_sub_folders_of_a_class_belong_to_it_and_the_order_is_stable(two_classes: Path, make_class):
    make_class(two_classes / "cat" / "holiday" / "2024", 2, first=80)
    folder = open_folder(two_classes, seed=0)
    cats = sorted(paths_by_class(folder.train)[0] + paths_by_class(folder.val)[0])
    assert "cat/holiday/2024/080.png" in cats
    assert len(cats) == 12
    assert list(folder.train.paths) == sorted(folder.train.paths)


def test_val_with_two_names_is_refused(two_classes: Path):
    for name in ("train", "val", "valid"):
        shutil.copytree(two_classes, two_classes.parent / "all" / name)
    with pytest.raises(DataError, match="val/ and valid/"):
        open_folder(two_classes.parent / "all", seed=0)


# ---- the classes are train's


@pytest.fixture
def with_val(two_classes: Path, make_class) -> Path:
    """`train/{cat,dog}` and `val/{cat,dog}`."""
    shutil.move(two_classes, two_classes.parent / "set" / "train")
    for name, first in (("cat", 40), ("dog", 50)):
        make_class(two_classes.parent / "set" / "val" / name, 2, first=first)
    return two_classes.parent / "set"


def test_a_class_missing_in_val_is_named_and_shifts_no_label(with_val: Path):
    shutil.rmtree(with_val / "val" / "cat")
    folder = open_folder(with_val, seed=0)
    assert set(folder.val.labels) == {1}
    assert "Without images to validate on: cat" in notes(folder)


def test_a_class_only_in_val_is_an_error(with_val: Path, make_class):
    make_class(with_val / "val" / "ant", 1)
    with pytest.raises(DataError, match=r"not trained on: ant"):
        open_folder(with_val, seed=0)


def test_an_empty_val_is_an_error(with_val: Path):
    shutil.rmtree(with_val / "val")
    (with_val / "val").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_folder(with_val, seed=0)


def test_a_name_composed_in_another_way_is_the_same_class(with_val: Path):
    (with_val / "train" / "cat").rename(with_val / "train" / unicodedata.normalize("NFC", "café"))
    (with_val / "val" / "cat").rename(with_val / "val" / unicodedata.normalize("NFD", "café"))
    folder = open_folder(with_val, seed=0)
    assert folder.classes == ("café", "dog")
    assert sorted(folder.val.labels) == [0, 0, 1, 1]


# ---- what is no image


def test_hidden_and_system_files_are_skipped_said_and_never_classes(two_classes: Path):
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found"):
        (two_classes / name).mkdir()
        picture().save(two_classes / name / "x.png")
    (two_classes / "cat" / ".ipynb_checkpoints").mkdir()
    picture().save(two_classes / "cat" / ".ipynb_checkpoints" / "x-checkpoint.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png"):
        (two_classes / "cat" / name).write_bytes(b"junk")
    folder = open_folder(two_classes, seed=0)
    assert folder.classes == ("cat", "dog")
    assert len(folder.train.paths) + len(folder.val.paths) == 20
    assert folder.bad == ()
    for name in (".ipynb_checkpoints", "__MACOSX", ".DS_Store", "Thumbs.db", "._ files"):
        assert name in notes(folder)


def test_ignored_files_are_counted_a_class_and_suffix(two_classes: Path):
    for name in ("a.txt", "b.txt", "c.json", "d.mp4", "e"):
        (two_classes / "dog" / name).write_bytes(b"not a picture")
    assert "dog: 5 files ignored (.txt 2, .json 1, .mp4 1, no suffix 1)" in notes(open_folder(two_classes, seed=0))


@pytest.mark.parametrize("suffix", [".heic", ".avif", ".JXL", ".cr2"])
def test_a_class_that_would_lose_pictures_to_their_format_is_an_error(two_classes: Path, suffix):
    (two_classes / "dog" / f"photo{suffix}").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=rf"'dog' would lose 1 of its 11 pictures: {suffix.lower()} 1"):
        open_folder(two_classes, seed=0)
    allowed = open_folder(two_classes, seed=0, max_bad=0.1)
    assert f"dog: 1 file ignored ({suffix.lower()} 1)" in notes(allowed)


def test_images_are_known_by_what_they_contain(two_classes: Path):
    picture(seed=90).save(two_classes / "cat" / "a.jfif", "JPEG")
    picture(seed=91).save(two_classes / "cat" / "b.tif")
    picture(seed=92).save(two_classes / "cat" / "c.JPEG")
    picture(seed=93).save(two_classes / "cat" / "no_suffix", "PNG")
    picture(seed=94).save(two_classes / "cat" / "renamed.heic", "JPEG")
    picture(seed=95).save(two_classes / "cat" / "really_webp.jpg", "WEBP")
    picture(seed=96).save(two_classes / "cat" / "backup.png~", "PNG")
    folder = open_folder(two_classes, seed=0)
    assert len(folder.train.paths) + len(folder.val.paths) == 26
    assert folder.bad == ()
    assert ".png~ 1" in notes(folder)


def test_images_outside_any_class_are_counted(two_classes: Path):
    picture().save(two_classes / "stray.png")
    assert "1 image directly in the folder, outside any class folder" in notes(open_folder(two_classes, seed=0))


# ---- bad images


def break_one(folder: Path) -> None:
    picture(90, 90).save(folder / "half.jpg", quality=95)
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])


def test_bad_images_are_named_counted_and_skipped(two_classes: Path, make_class):
    make_class(two_classes / "cat", 100, first=100)
    make_class(two_classes / "dog", 180, first=300)
    break_one(two_classes / "cat")
    (two_classes / "dog" / "empty.png").touch()
    (two_classes / "dog" / "gone.png").symlink_to("nowhere")
    folder = open_folder(two_classes, seed=0)
    assert [image.path for image in folder.bad] == ["cat/half.jpg", "dog/empty.png", "dog/gone.png"]
    assert "3 unreadable images skipped: cat/half.jpg (" in notes(folder)
    assert "an empty file" in notes(folder)
    assert len(folder.train.paths) + len(folder.val.paths) == 300


def test_more_bad_images_than_allowed_are_an_error_that_names_them(two_classes: Path):
    break_one(two_classes / "cat")
    with pytest.raises(DataError, match=r"1 of 21 images can't be used.*cat/half\.jpg.*--max-bad"):
        open_folder(two_classes, seed=0)
    assert len(open_folder(two_classes, seed=0, max_bad=0.05).bad) == 1


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_or_val_left_without_images_is_an_error(with_val: Path, part):
    for path in (with_val / part).rglob("*.png") if part == "val" else (with_val / part / "dog").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="unreadable"):
        open_folder(with_val, seed=0, max_bad=1)


def test_images_over_the_budget_are_bad_and_jpegs_are_drafted_instead(two_classes: Path):
    picture(1200, 1200).save(two_classes / "cat" / "large.png", compress_level=1)
    picture(1200, 1200).save(two_classes / "dog" / "large.jpg")
    preprocess = Preprocess(32, 32)
    folder = open_folder(two_classes, seed=0, max_bad=0.1, decode_budget_bytes=2_500_000, preprocess=preprocess)
    assert [image.path for image in folder.bad] == ["cat/large.png"]
    assert "1200 x 1200 pixels need" in folder.bad[0].reason
    assert folder.largest_pixels == 1200 * 1200
    assert 1_000_000 < folder.decode_peak_bytes <= 2_500_000


# ---- the scan's memory


def test_the_second_scan_decodes_nothing_and_finds_the_same(two_classes: Path, tmp_path: Path, monkeypatch):
    break_one(two_classes / "cat")
    seen: list[tuple[int, int]] = []
    first = open_folder(
        two_classes,
        seed=0,
        max_bad=0.1,
        cache_dir=tmp_path / "c",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 21) for done in range(1, 22)]
    monkeypatch.setattr("edgetune.data.scan.decode", lambda *_, **__: pytest.fail("decoded again"))
    assert open_folder(two_classes, seed=0, max_bad=0.1, cache_dir=tmp_path / "c") == first


def test_a_changed_file_is_decoded_again(two_classes: Path, tmp_path: Path):
    open_folder(two_classes, seed=0, cache_dir=tmp_path / "c")
    (two_classes / "cat" / "000.png").write_bytes(b"now broken")
    folder = open_folder(two_classes, seed=0, max_bad=0.1, cache_dir=tmp_path / "c")
    assert [image.path for image in folder.bad] == ["cat/000.png"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe", b"[" * 9999, b'{"version":1,"pillow":"x","records":{}}', None]
)
def test_a_damaged_cache_is_ignored_and_replaced(two_classes: Path, tmp_path: Path, damage):
    expected = open_folder(two_classes, seed=0, cache_dir=tmp_path / "c")
    (cache,) = (tmp_path / "c").iterdir()
    if damage is None:  # valid JSON with sizes no image has
        content = json.loads(cache.read_bytes())
        content["records"] = {
            key: [*record[:3], [0, -5, *record[3][2:]], ""] for key, record in content["records"].items()
        }
        damage = json.dumps(content).encode()
    cache.write_bytes(damage)
    assert open_folder(two_classes, seed=0, cache_dir=tmp_path / "c") == expected
    assert b"records" in cache.read_bytes()


def test_a_cache_folder_that_cannot_be_written_costs_no_run(two_classes: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    assert open_folder(two_classes, seed=0, cache_dir=tmp_path / "file" / "sub").classes == ("cat", "dog")


def test_an_interrupted_scan_goes_on_where_it_stopped(two_classes: Path, tmp_path: Path, monkeypatch):
    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_folder(two_classes, seed=0, cache_dir=tmp_path / "c", progress=stop)
    from edgetune.data import scan

    decoded = []
    real = scan.decode
    monkeypatch.setattr(scan, "decode", lambda path, **how: decoded.append(path) or real(path, **how))
    open_folder(two_classes, seed=0, cache_dir=tmp_path / "c")
    assert len(decoded) == 5


def test_another_budget_is_applied_to_what_was_remembered(two_classes: Path, tmp_path: Path):
    picture(900, 900).save(two_classes / "cat" / "large.png", compress_level=1)
    assert open_folder(two_classes, seed=0, cache_dir=tmp_path / "c").bad == ()
    tight = open_folder(two_classes, seed=0, max_bad=0.1, decode_budget_bytes=1_500_000, cache_dir=tmp_path / "c")
    assert [image.path for image in tight.bad] == ["cat/large.png"]
    assert open_folder(two_classes, seed=0, cache_dir=tmp_path / "c").bad == ()


# ---- links and copies


def test_links_are_followed_and_loops_broken(two_classes: Path, tmp_path: Path, make_class):
    make_class(tmp_path / "elsewhere", 3, first=70)
    (two_classes / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (two_classes / "cat" / "loop").symlink_to(two_classes / "cat")
    (two_classes / "cat" / "self").symlink_to("self")
    (two_classes / "bird").symlink_to(tmp_path / "elsewhere")
    folder = open_folder(two_classes, seed=0, max_bad=0.1)
    cats = paths_by_class(folder.train)[1] + paths_by_class(folder.val)[1]
    assert folder.classes == ("bird", "cat", "dog")
    assert len(cats) == 13
    assert "in two classes at once" in notes(folder)


@pytest.mark.parametrize("how", ["symbolic link", "hard link", "copy"])
def test_one_picture_in_train_and_val_is_told(with_val: Path, how):
    source, target = with_val / "train" / "cat" / "000.png", with_val / "val" / "cat" / "again.png"
    if how == "symbolic link":
        target.symlink_to(source)
    elif how == "hard link":
        os.link(source, target)
    else:
        shutil.copy(source, target)
    text = notes(open_folder(with_val, seed=0))
    assert "1 of 5 validation images also in train (val/cat/again.png" in text


def test_a_split_keeps_copies_on_one_side(two_classes: Path):
    for number in range(10):
        shutil.copy(two_classes / "cat" / f"{number:03d}.png", two_classes / "cat" / f"copy{number}.png")
    for seed in range(10):
        assert "also in train" not in notes(open_folder(two_classes, seed=seed))


# ---- names and folders that can't be used


def test_names_that_are_not_utf8_or_not_printable_are_used_and_shown_escaped(two_classes: Path, tmp_path: Path):
    (two_classes / "dog").rename(two_classes / os.fsdecode(b"d\xffg\n"))
    picture(seed=99).save(two_classes / "cat" / os.fsdecode(b"c\xe9t\x1b[31m.png"))
    (two_classes / "cat" / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    folder = open_folder(two_classes, seed=0, max_bad=0.1, cache_dir=tmp_path / "c")
    assert folder.classes == ("cat", "d\\udcffg\\n")
    assert folder.bad[0].path == "cat/bad\\udcff.png"
    assert all(note.isprintable() for note in folder.notes)
    assert open_folder(two_classes, seed=0, max_bad=0.1, cache_dir=tmp_path / "c") == folder
    inputs, _ = load_batch(folder.train, range(len(folder.train.paths)), Preprocess(8, 8), seed=0, epoch=0)
    assert len(inputs) == len(folder.train.paths)
    again = open_for_evaluation(two_classes, folder.classes, max_bad=0.1)
    assert len(again.val.paths) == len(folder.train.paths) + len(folder.val.paths)


def test_pipes_in_a_class_are_left_alone(two_classes: Path):
    os.mkfifo(two_classes / "cat" / "pipe.png")
    assert "not a regular file 1" in notes(open_folder(two_classes, seed=0))


def test_what_is_no_folder_of_classes_is_refused_with_a_way_out(tmp_path: Path, two_classes: Path, make_class):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.zip").touch()
    make_class(tmp_path / "flat", 3)
    make_class(tmp_path / "one" / "cat", 3)
    make_class(tmp_path / "hollow" / "cat", 3)
    (tmp_path / "hollow" / "dog").mkdir()
    (tmp_path / "nothing" / "cat").mkdir(parents=True)
    (tmp_path / "nothing" / "dog").mkdir()
    shutil.copytree(two_classes, tmp_path / "wrapped" / "dataset")
    for name, message in {
        "missing": "can't be read",
        "empty": "no class folders",
        "data.zip": "not a folder",
        "flat": "no class folders",
        "one": "only one class folder, 'cat'",
        "hollow": "no images in class 'dog'",
        "nothing": "2 folders and no images",
        "wrapped": r"did you mean .*wrapped/dataset\?",
        "null\0byte": "can't be read",
    }.items():
        with pytest.raises(DataError, match=message):
            open_folder(tmp_path / name, seed=0)


def test_a_class_of_one_image_cannot_be_split_and_is_named(two_classes: Path, make_class):
    make_class(two_classes / "newt", 1, first=77)
    with pytest.raises(DataError, match=r"'newt' has one image.*trained on and validated"):
        open_folder(two_classes, seed=0)


def test_a_folder_without_permission_is_a_data_error(two_classes: Path, monkeypatch):
    real = os.scandir

    def deny(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"dog can't be read: Permission denied"):
        open_folder(two_classes, seed=0)


def test_an_image_without_permission_is_bad_but_not_remembered_as_bad(two_classes: Path, tmp_path: Path, monkeypatch):
    real = Path.open

    def deny(self, *args, **kwargs):
        if self.name == "003.png":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", deny)
        folder = open_folder(two_classes, seed=0, max_bad=0.1, cache_dir=tmp_path / "c")
        assert [(image.path, image.reason) for image in folder.bad] == [("cat/003.png", "Permission denied")]
    assert open_folder(two_classes, seed=0, cache_dir=tmp_path / "c").bad == ()


@pytest.mark.parametrize(
    "options", [{"max_bad": -0.1}, {"max_bad": 2}, {"val_share": 0}, {"val_share": 1}, {"seed": -1}]
)
def test_shares_and_seeds_out_of_range_are_usage_errors(two_classes: Path, options):
    with pytest.raises(UsageError):
        open_folder(two_classes, **{"seed": 0, **options})


# ---- evaluation


def test_evaluation_takes_val_or_the_class_folders_with_the_models_labels(with_val: Path, two_classes: Path):
    from_val = open_for_evaluation(with_val, ("dog", "cat"))
    assert [label for _, label in sorted(zip(from_val.val.paths, from_val.val.labels, strict=True))] == [1, 1, 0, 0]
    assert from_val.train.paths == ()
    alone = open_for_evaluation(with_val / "val", ("ant", "cat", "dog"))
    assert sorted(set(alone.val.labels)) == [1, 2]
    assert "Without images to validate on: ant" in notes(alone)
    with pytest.raises(DataError, match="not trained on: dog"):
        open_for_evaluation(with_val, ("cat", "cow"))
    shutil.rmtree(with_val / "val")
    with pytest.raises(DataError, match="no val/"):
        open_for_evaluation(with_val, ("cat", "dog"))


# ---- weights


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200))
def test_class_weights_balance_the_classes_and_have_mean_one_over_the_samples(labels):
    weights = class_weights(labels, 8)
    assert (weights.dtype, weights.shape) == (np.float32, (8,))
    assert np.mean(weights[labels]) == pytest.approx(1, rel=1e-5)
    shares = [weights[label] * labels.count(label) for label in set(labels)]
    assert max(shares) == pytest.approx(min(shares), rel=1e-5)
    assert all(weights[label] == 0 for label in set(range(8)) - set(labels))


def test_class_weights_of_three_to_one():
    assert class_weights([0, 0, 0, 1], 2).tolist() == pytest.approx([4 / 6, 2.0])


def test_a_bomb_in_the_folder_is_bad_and_warns_nobody(two_classes: Path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    picture(20, 10).save(two_classes / "cat" / "bomb.png")
    folder = open_folder(two_classes, seed=0, max_bad=0.1)
    assert [image.path for image in folder.bad] == ["cat/bomb.png"]
    assert "limit" in folder.bad[0].reason
