"""Peak memory does not depend on how much is stored."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from feature_cases import start_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Writes a store, opens it again and reads all of it, shuffled; prints the growth of the peak by then, in bytes.
CHILD = """
import sys
from pathlib import Path
import numpy as np
from feature_cases import make_ids, make_key
from edgetune.features import FeatureStore

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder, count, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
key = make_key(stored_tokens=tokens, width=1024)
values = np.zeros((2, tokens, 1024), np.float32)
before = peak()
with FeatureStore.open(folder, key, make_ids(count)) as store:
    for place in range(0, count, 2):
        values[:, 0, 0] = place, place + 1
        store.add([place, place + 1], values)
written = store.stored_bytes
del store
store = FeatureStore.open(folder, key, make_ids(count))
assert store.is_whole
for places in np.random.default_rng(0).permutation(count).reshape(-1, 2):
    store.read(places, values)
    assert (values[:, 0, 0] == places).all()
print(written, peak() - before)
"""


# Opens a store of its own, into whose folder all of another's then comes, and adds to it; prints as above.
TAKES = (
    CHILD.split("with FeatureStore")[0]
    + """
import shutil
store = FeatureStore.open(folder / "own", key, make_ids(count + 32))  # a chunk more
shutil.copytree(folder / "others", folder / "own")
for place in range(count, count + 32):
    store.add([place], values[:1])
assert store.is_whole
for places in np.random.default_rng(0).permutation(count).reshape(-1, 2):
    store.read(places, values)
    assert (values[:, 0, 0] == places).all()
print(store.stored_bytes, peak() - before)
"""
)


def printed(script: str, *arguments: object) -> list[int]:
    with start_python(script, *arguments) as child:
        out, _ = child.communicate(timeout=300)
    assert child.returncode == 0
    return [int(word) for word in out.split()]


def measured(folder: Path, count: int, tokens: int) -> list[int]:
    """[bytes stored, growth of the peak] of a process of its own; the store is deleted."""
    try:
        return printed(CHILD, folder, count, tokens)
    finally:
        shutil.rmtree(folder)


def test_ten_times_as_much_takes_the_same_memory(tmp_path: Path) -> None:
    (small, before), (large, after) = (
        measured(tmp_path / "small", 40, 64),
        measured(tmp_path / "large", 400, 64),
    )  # 256 KiB an entry
    assert small > 10e6
    assert large > 100e6
    assert after - before < 1e6
    # One chunk and what checks it: less is not possible, much more would be a second copy.
    assert 8e6 < before < 12e6


def test_taking_what_another_run_wrote_takes_the_same_memory_however_much_it_is(tmp_path: Path) -> None:
    grown = []
    for count in (40, 400):
        folder = tmp_path / str(count)
        printed(CHILD, folder / "others", count, 64)
        stored, growth = printed(TAKES, folder, count, 64)
        shutil.rmtree(folder)
        assert stored > count * 256 * 1024
        grown.append(growth)
    before, after = grown
    assert after - before < 1e6
    assert 8e6 < before < 12e6


@pytest.mark.slow
def test_a_gigabyte_takes_the_memory_of_ten_megabytes(tmp_path: Path) -> None:
    (small, before), (large, after) = (
        measured(tmp_path / "small", 12, 256),
        measured(tmp_path / "large", 1024, 256),
    )  # 1 MiB an entry
    assert small > 10e6
    assert large > 1e9
    assert after - before < 1e6


@pytest.mark.slow
def test_the_index_takes_a_few_bytes_an_image(tmp_path: Path) -> None:
    """Of 400,000 images of 4 KiB, none stored: 29 bytes each stay, sorting takes some more for a moment."""
    child = CHILD.split("before = peak()")[0] + (
        "ids = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)\n"
        "FeatureStore.open(folder, key, ids[:100])\n"
        "before = peak()\n"
        "store = FeatureStore.open(folder, key, ids)\n"
        "arrays = [value for value in vars(store._index).values() if isinstance(value, np.ndarray)]\n"
        "print(sum(array.nbytes for array in arrays), peak() - before)\n"
    )
    held, growth = printed(child, tmp_path, 400_000, 1)
    assert held <= 29 * 400_000 + 1000
    assert growth < 50 * 400_000
