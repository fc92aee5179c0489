"""Our safetensors files are the library's, and nothing in a damaged one gets through."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.checkpoint import load_tensors, read_tensors, save_tensors
from edgetune.checkpoint.tensors import open_tensors
from edgetune.errors import RunFolderError

DTYPES = ("u8", "i8", "f8", "f4", "u4", "i4", "f2", "u2", "i2", "i1", "u1", "?")


def all_kinds() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.é": rng.integers(0, 2, (2, i)).astype(code) for i, code in enumerate(DTYPES)}
    return tensors | {"scalar": np.full((), 3, np.float32), "empty": np.zeros((0, 4), np.float32)}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_files_equal_the_librarys_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = save_tensors(path, all_kinds(), {"format": "pt"})
    assert path.read_bytes() == safetensors.numpy.save(all_kinds(), {"format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tensors", [all_kinds(), {}])
def test_what_was_saved_is_loaded(tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    path = tmp_path / "a.safetensors"
    digest = save_tensors(path, tensors)
    for loaded in (load_tensors(path, digest), open_tensors(path, digest), safetensors.numpy.load_file(path)):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert loaded[name].tobytes() == tensor.tobytes()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(all_kinds(), tmp_path / "a", {"x": "y", "a": "b"})
    loaded = dict(read_tensors(tmp_path / "a"))
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in all_kinds().items())
    loaded["scalar"][...] = 4  # arrays of one's own


def test_strided_and_big_endian_arrays_are_stored_by_value(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_tensors(tmp_path / "a", {"t": rows.T, "every": rows[:, ::2], "big": rows.astype(">f4")})
    loaded = load_tensors(tmp_path / "a")
    assert np.array_equal(loaded["t"], rows.T)
    assert np.array_equal(loaded["every"], rows[:, ::2])
    assert np.array_equal(loaded["big"], rows)


def test_the_order_of_the_mapping_does_not_matter(tmp_path: Path) -> None:
    tensors = all_kinds()
    first = save_tensors(tmp_path / "a", tensors, {"a": "1", "b": "2"})
    second = save_tensors(tmp_path / "a", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    assert first == second


@pytest.mark.parametrize("tensor", [np.zeros(1, object), np.zeros(1, "M8[s]"), np.zeros(1, "U3"), np.zeros(1, complex)])
def test_what_the_format_does_not_have_is_refused(tmp_path: Path, tensor: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="'odd'"):
        save_tensors(tmp_path / "a", {"odd": tensor})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 100_000,
        b"[" * 100_000,
        b"\xff\xfe{}",
        [1],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [0, -1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}},
        {"a": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}},
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
        {"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}},
        {},
    ],
)  # fmt: skip
def test_a_hostile_header_is_a_clear_error(tmp_path: Path, header: object) -> None:
    for data in (b"1234", b""):
        path = write_raw(tmp_path / "a", header, data)
        if data or header != {}:  # which is a whole file without tensors
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with pytest.raises(RunFolderError, match=str(path)):
                load_tensors(path)
            with pytest.raises(RunFolderError, match=str(path)):
                dict(open_tensors(path, digest))


@pytest.mark.parametrize("size", [0, 7, 8, 20, -1])
def test_a_file_cut_short_is_a_clear_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    save_tensors(path, all_kinds())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunFolderError, match="damaged"):
        load_tensors(path)


def test_missing_files_and_folders_are_clear_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RunFolderError, match="can't be read"):
            load_tensors(path)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_every_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    digest = save_tensors(path, all_kinds(), {"format": "pt"})
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= flip
    path.write_bytes(data)
    for load in (load_tensors, open_tensors):
        with pytest.raises(RunFolderError):
            load(path, digest)


def test_an_opened_files_tensors_are_read_anew_each_time_and_a_change_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tensors = open_tensors(path, save_tensors(path, all_kinds()))
    tensors["scalar"][...] = 4
    assert tensors["scalar"] == 3
    assert len(tensors) == len(all_kinds())
    with pytest.raises(KeyError):
        tensors["nothing"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="ends too early"):
        dict(tensors)
    path.unlink()
    with pytest.raises(RunFolderError, match="can't be read"):
        tensors["scalar"]


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from edgetune.checkpoint import load_tensors, read_tensors, save_tensors
from edgetune.checkpoint.tensors import open_tensors
MIB = 2**20
def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
source, target, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
before = status("VmRSS")
for name, tensor in read_tensors(source, digest):
    assert tensor[0] == int(name)
    del tensor
tensors = open_tensors(source, digest)
for name in tensors:
    assert tensors[name][0] == int(name)
peak = (status("VmHWM") - before) / MIB
assert 3 < peak < 4 + 3, f"one by one took {peak} MiB: more than one tensor of 4"
tensors = load_tensors(source, digest)
assert status("VmRSS") - before > 47 * MIB
save_tensors(target, tensors)
peak = (status("VmHWM") - before) / MIB
assert peak < 48 + 3, f"loading or saving took {peak} MiB: more than the tensors' 48"
del tensors
left = (status("VmRSS") - before) / MIB
assert left < 3, f"{left} MiB stay after loading"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_and_loading_need_no_second_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    digest = save_tensors(source, {str(i): np.full(2**20, i, np.float32) for i in range(12)})
    command = [sys.executable, "-c", MEMORY, str(source), str(target), digest]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert source.read_bytes() == target.read_bytes()
