"""A run's folder is new, can be written, and has one writer."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from edgetune.checkpoint import create_run_folder, open_run_folder
from edgetune.errors import RunFolderError

NOW = datetime(2025, 3, 4, 5, 6, 7)


def test_names_say_when_what_and_where(tmp_path: Path) -> None:
    first = create_run_folder(tmp_path / "runs", "deit_tiny_patch16_224", "jetson-nano", None, NOW)
    assert first == tmp_path / "runs" / "20250304-050607-deit_tiny_patch16_224-jetson-nano"
    assert list(first.iterdir()) == []
    second = create_run_folder(tmp_path / "runs", "deit_tiny_patch16_224", "jetson-nano", None, NOW)
    third = create_run_folder(tmp_path / "runs", "deit_tiny_patch16_224", "jetson-nano", None, NOW)
    assert [second.name, third.name] == [f"{first.name}-2", f"{first.name}-3"]


def test_the_default_base_is_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run_folder(None, "m", "d", None, NOW) == Path("runs/20250304-050607-m-d")
    assert create_run_folder(None, "m", "d", None).name[:2] == "20"


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        ("hf-hub:timm/vit tiny", "hf-hub-timm-vit-tiny"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "model"),
        ("", "model"),
        ("\0\n\x1b[31m", "31m"),
        ("é" * 300, "model"),
        ("n" * 300, "n" * 64),
        ("-rf", "rf"),
        ("\udcff", "model"),
    ],
)
def test_odd_names_become_plain_ones_inside_the_base(tmp_path: Path, model: str, plain: str) -> None:
    folder = create_run_folder(tmp_path, model, "d", None, NOW)
    assert folder == tmp_path / f"20250304-050607-{plain}-d"


def test_output_is_taken_exactly_as_given(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "my run"
    assert create_run_folder(None, "m", "d", output, NOW) == output
    assert output.is_dir()
    assert create_run_folder(None, "m", "d", output, NOW) == output  # empty: fine


def test_a_folder_that_holds_anything_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"not empty.*--resume"):
        create_run_folder(None, "m", "d", tmp_path, NOW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_what_a_start_that_was_killed_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".tmp-probe").write_bytes(b"half")
    with open_run_folder(create_run_folder(None, "m", "d", tmp_path, NOW)):
        pass
    create_run_folder(None, "m", "d", tmp_path, NOW)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_places_where_no_folder_can_be_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for output in ("file", "file/inside", "nowhere", "n" * 300, "nul\0", "/proc/edgetune"):
        with pytest.raises(RunFolderError):
            create_run_folder(None, "m", "d", tmp_path / output, NOW)
        with pytest.raises(RunFolderError):
            create_run_folder(tmp_path / output, "m", "d", None, NOW)


def test_a_folder_that_refuses_files_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(RunFolderError, match="Permission denied"):
        create_run_folder(tmp_path, "m", "d", None, NOW)


def test_only_an_existing_folder_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file", Path("nul\0")):
        with pytest.raises(RunFolderError), open_run_folder(path):
            pytest.fail("opened")
    assert not (tmp_path / "missing").exists()


def test_opening_clears_away_what_is_half_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-1" / "tensors").write_text("half")
    (tmp_path / ".tmp-2").write_text("half")
    (tmp_path / "mine.txt").write_text("mine")
    with open_run_folder(tmp_path) as run:
        assert run == tmp_path
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "checkpoints", "mine.txt"]
        assert list((tmp_path / "checkpoints").iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from edgetune.checkpoint import open_run_folder
with open_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_can_not_write_one_run_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"another run \\(process {holder.pid}\\)"), open_run_folder(tmp_path):
            pytest.fail("two writers")
        holder.kill()
    with open_run_folder(tmp_path):
        pass
    with open_run_folder(tmp_path):  # given back at the end
        pass
