"""The bundled sample unpacks once, safely, and can be made again byte for byte."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from edgetune import system
from edgetune.data import bundled_sample, open_folder
from edgetune.data.sample import unpack
from edgetune.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "tools" / "make_sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


SMALL = archive(**{"train/a/1.txt": b"one", "val/a/2.txt": b"two", "README.md": b"read"})


# ---- the sample itself


def test_the_sample_is_a_folder_of_ten_digits_split_without_overlap(tmp_path: Path):
    folder = open_folder(bundled_sample(tmp_path), seed=0)
    assert folder.classes == tuple("0123456789")
    assert len(folder.train.paths) + len(folder.val.paths) == 1797
    assert 0.19 < len(folder.val.paths) / 1797 < 0.21
    assert set(folder.val.labels) == set(range(10))
    assert (folder.notes, folder.bad) == ((), ())


def test_the_sample_carries_its_attribution(tmp_path: Path):
    text = (bundled_sample(tmp_path) / "README.md").read_text()
    for part in ("Alpaydin", "CC BY 4.0", "scikit-learn", "Changes:"):
        assert part in text


def test_the_cache_folder_is_the_users_or_the_environments(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path / "chosen"))
    assert bundled_sample().parent == tmp_path / "chosen"
    monkeypatch.delenv("EDGETUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert system.cache_dir().name == "edgetune"


# ---- unpacking


def test_unpacking_twice_writes_once(tmp_path: Path):
    folder = unpack(SMALL, tmp_path)
    assert (folder / "train/a/1.txt").read_bytes() == b"one"
    before = (folder / "README.md").stat().st_mtime_ns
    assert unpack(SMALL, tmp_path) == folder
    assert (folder / "README.md").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [folder]


def test_another_archive_gets_another_folder(tmp_path: Path):
    assert unpack(SMALL, tmp_path) != unpack(archive(x=b"other"), tmp_path)


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "emptied", "a file in its place"])
def test_a_damaged_folder_is_mended(tmp_path: Path, damage):
    folder = unpack(SMALL, tmp_path)
    if damage == "changed":
        (folder / "train/a/1.txt").write_bytes(b"ONE")
    elif damage == "missing":
        (folder / "val/a/2.txt").unlink()
    elif damage == "extra":
        (folder / "train/a/mine.png").touch()
    else:
        shutil.rmtree(folder)
        folder.mkdir() if damage == "emptied" else folder.write_bytes(b"")
    assert unpack(SMALL, tmp_path) == folder
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "README.md",
        "train/a/1.txt",
        "val/a/2.txt",
    ]
    assert (folder / "train/a/1.txt").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [folder]


def test_several_processes_at_once_all_get_a_whole_sample(tmp_path: Path):
    big = archive(**{f"train/{i % 7}/{i}.txt": bytes([i % 256]) * 500 for i in range(300)})
    broken = unpack(big, tmp_path)
    (broken / "train/0/0.txt").unlink()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=unpack, args=(big, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(broken.rglob("*.txt"))) == 300
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil"])
def test_an_archive_that_points_outside_its_folder_is_refused(tmp_path: Path, name):
    with pytest.raises(DataError, match="outside its folder"):
        unpack(archive(**{name: b"x"}), tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a zip", SMALL[:-30], SMALL.replace(b"one", b"eno")])
def test_a_damaged_archive_is_a_data_error(tmp_path: Path, content):
    with pytest.raises(DataError, match="install edgetune again"):
        unpack(content, tmp_path)


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path: Path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(70 * 2**20))
    with pytest.raises(DataError, match="larger"):
        unpack(data.getvalue(), tmp_path)


def test_a_cache_folder_that_cannot_be_written_is_named_with_a_way_out(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="EDGETUNE_CACHE_DIR"):
        unpack(SMALL, tmp_path / "file" / "cache")


# ---- making it


def test_the_tool_writes_the_same_bytes_every_time(tool: ModuleType, tmp_path: Path):
    levels = np.random.default_rng(0).integers(0, 17, (30, 8, 8)).astype(float)
    labels = [i % 3 for i in range(30)]
    for name in ("a.zip", "b.zip"):
        tool.write_archive(tmp_path / name, levels, labels, seed=0)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    tool.write_archive(tmp_path / "c.zip", levels, labels, seed=1)
    assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "c.zip").read_bytes()
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    assert names == sorted(names)
    assert sum(name.startswith("val/") for name in names) == 6


def test_the_tool_spreads_sixteen_levels_over_eight_bits(tool: ModuleType):
    levels = np.arange(64).reshape(8, 8) % 17
    with Image.open(io.BytesIO(tool.png(levels.astype(float)))) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), np.rint(levels * 255 / 16))


def test_the_bundled_archive_is_what_the_tool_makes(tool: ModuleType, tmp_path: Path):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    tool.write_archive(tmp_path / "digits.zip", digits.images, digits.target.tolist())
    assert (tmp_path / "digits.zip").read_bytes() == (ROOT / "edgetune" / "assets" / "digits.zip").read_bytes()
