"""A small key, ids and values for the tests of the feature store, and folders on a disk of a chosen size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgetune.features import FeatureKey, FeatureStore, chunks, entry_id

Array = npt.NDArray[np.float32]


def make_key(**changes: Any) -> FeatureKey:
    fields: dict[str, Any] = {
        "weights_sha256": "ab" * 32,
        "architecture": "deit_tiny_patch16_224",
        "split_block": 2,
        "tokens": (16, 16, 3),
        "pooled": False,
        "preprocess": {"size": 56, "mean": [0.5, 0.5, 0.5], "decode": {"draft": True}},
        "precision": "float32",
        "stored_tokens": 4,
        "width": 6,
    }
    return FeatureKey(**{**fields, **changes})


def make_ids(count: int) -> list[bytes]:
    return [entry_id(f"image {number}") for number in range(count)]


def make_values(key: FeatureKey, count: int, seed: int = 0) -> Array:
    shape = (count, key.stored_tokens, key.width)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def read(store: FeatureStore, places: Any) -> Array:
    out = np.full((len(places), store.key.stored_tokens, store.key.width), np.nan, np.float32)
    store.read(places, out)
    return out


def fill(folder: Path, key: FeatureKey, ids: list[bytes], values: Array, **options: Any) -> FeatureStore:
    """A store to which all values were offered, closed."""
    with FeatureStore.open(folder, key, ids, **options) as store:
        store.add(range(len(ids)), values)
    return store


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.chunk"))


def stored_ids(folder: Path, key: FeatureKey) -> list[bytes]:
    """Of every entry on the disk."""
    found: list[bytes] = []
    for path in chunk_files(folder):
        with path.open("rb") as file:
            ids = chunks.read_header(file, key.sha256(), key.entry_bytes).ids
            found += [one.ljust(16, b"\0") for one in ids.tolist()]  # numpy leaves zeros at the end out
    return found


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that finds this module; what it prints can be read."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own at `folder`; the test is skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
