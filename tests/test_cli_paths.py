"""Paths that the system does not even look at: one line that names what was wanted and why it is not there, no traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from artifacts_cases import make_artifacts
from doubles import make_images

from edgetune.__main__ import main

pytest.importorskip("torch")
pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX systems")

Ends = Callable[..., tuple[int, str]]

MICRO = ["--model", "edgetune_micro", "--device", "jetson-nano", "--threads", "1", "--steps", "1", "-b", "4"]
RUN = ["finetune", *MICRO, "--method", "head", "--data", "images", "--output", "out"]
TOO_LONG = {"a name": "x" * 300, "a path": "/tmp/" + "abcd/" * 1000 + "end"}
# What is typed before the path, and the exit code.
WAYS = {
    "finetune --cache": ([*RUN, "--cache"], 1),
    "finetune --output": ([*RUN[:-2], "--output"], 1),
    "finetune --data": ([*RUN, "--data"], 1),
    "finetune --weights": ([*RUN, "--weights"], 1),
    "finetune --model": ([*RUN, "--model", "local-dir:"], 2),
    "finetune --resume": (["finetune", "--resume"], 1),
    "finetune --plan": (["finetune", "--plan"], 1),
    "finetune --replay": (["finetune", "--replay"], 1),
    "finetune --artifacts": (["finetune", "--backend", "ort", "--artifacts"], 1),
    "plan --model": (["plan", "--model", "local-dir:"], 2),
    "evaluate": (["evaluate"], 1),
    "export": (["export", "--output", "out"], 1),
    "export --output": (["export", "--model", "edgetune_micro", "--classes", "2", "--output"], 1),
    "export --format onnx": (["export", "a-run", "--format", "onnx", "--output"], 1),
    "export --ort-web": (
        ["export", "--model", "edgetune_micro", "--classes", "2", "--web", "out", "--ort-web"],
        1,
    ),
    "import-params": (["import-params", "--artifacts", "artifacts", "--output", "out"], 1),
    "import-params --artifacts": (["import-params", "buffer", "--output", "out", "--artifacts"], 1),
    "import-params --output": (["import-params", "buffer", "--artifacts", "artifacts", "--output"], 1),
    "serve": (["serve"], 1),
}
PROFILES = {
    "finetune --device": ([*RUN, "--device"], 1),
    "devices show": (["devices", "show"], 1),
    "devices detect --output": (["devices", "detect", "--output"], 2),
}


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ends]:
    """`edgetune ...` in a folder that has images and artifacts: the exit code, and what is said on standard error."""
    make_images(tmp_path / "images", {"ant": 6, "bee": 6})
    make_artifacts(tmp_path / "artifacts")
    (tmp_path / "buffer").write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def run(arguments: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgetune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kind", TOO_LONG)
@pytest.mark.parametrize("way", [*WAYS, *PROFILES])
def test_a_path_that_is_too_long_is_named_with_its_code_and_nothing_is_left(
    ends: Ends, tmp_path: Path, way: str, kind: str
) -> None:
    there = sorted(tmp_path.iterdir())
    (arguments, wanted), path = {**WAYS, **PROFILES}[way], TOO_LONG[kind]
    path += ".toml" if way in PROFILES else ""
    together = arguments[-1] == "local-dir:"
    code, said = ends([*arguments[:-1], arguments[-1] + path] if together else [*arguments, path])
    assert code == wanted
    assert path[:4] in said.splitlines()[-1]  # of a long one no more is shown
    assert "Traceback" not in said
    if way == "finetune --cache":
        assert said.endswith("can't be used for the cache: File name too long. Check the path.\n")
    assert sorted(tmp_path.iterdir()) == there


def test_a_cache_behind_a_link_to_itself_is_refused(ends: Ends, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    code, said = ends([*RUN, "--cache", str(loop / "cache")])
    assert code == 1
    assert (
        said
        == f"edgetune: {loop}/cache can't be used for the cache: Too many levels of symbolic links. Check the path.\n"
    )
    assert not (tmp_path / "out").exists()
