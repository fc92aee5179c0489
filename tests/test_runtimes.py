"""A measured runtime is kept by the versions it was made of, and nothing else passes for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune import runtimes


def test_what_a_run_measured_is_known_to_the_next_plan(tmp_path: Path) -> None:
    runtimes.remember("torch 2 + timm 1", 300, tmp_path / "new")
    runtimes.remember("torch 3 + timm 1", 400, tmp_path / "new")
    runtimes.remember("torch 2 + timm 1", 310, tmp_path / "new")
    assert runtimes.remembered("torch 2 + timm 1", tmp_path / "new") == 310
    assert runtimes.remembered("torch 3 + timm 1", tmp_path / "new") == 400
    assert runtimes.remembered("torch 4 + timm 1", tmp_path / "new") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["runtimes.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "b"}', b"\xff\xfe", b"[" * 100_000, b'{"torch": -5}'])
def test_a_damaged_file_is_as_good_as_none_and_is_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "runtimes.json").write_bytes(content)
    assert runtimes.remembered("torch", tmp_path) is None
    runtimes.remember("torch", 300, tmp_path)
    assert runtimes.remembered("torch", tmp_path) == 300


def test_without_versions_or_a_folder_nothing_is_kept_and_nothing_fails(tmp_path: Path) -> None:
    runtimes.remember(None, 300, tmp_path)
    assert not list(tmp_path.iterdir())
    assert runtimes.remembered(None, tmp_path) is None
    (tmp_path / "file").write_text("")
    runtimes.remember("torch", 300, tmp_path / "file")


def test_the_file_does_not_grow_without_end(tmp_path: Path) -> None:
    for number in range(100):
        runtimes.remember(f"torch {number}", 300 + number, tmp_path)
    assert runtimes.remembered("torch 99", tmp_path) == 399
    assert runtimes.remembered("torch 0", tmp_path) is None
    assert len((tmp_path / "runtimes.json").read_bytes()) < 1000


def test_versions_are_those_that_are_installed() -> None:
    pytest.importorskip("torch")
    found = runtimes.versions()
    assert found is not None
    assert found.startswith("torch 2")
    assert "timm" not in found
    with_timm = runtimes.versions(runtimes.TORCH_AND_TIMM)
    assert with_timm is not None
    assert "timm 1" in with_timm
    assert runtimes.versions(("no-such-package",)) is None
