"""Shared fixtures: no network, no user folders, a small image folder. Nothing here imports torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported anywhere: threads that spin while they wait starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
# A CI job in the background starts with Ctrl-C and hang-ups ignored, and a child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from doubles import make_images
from hypothesis import settings

settings.register_profile("few", max_examples=5)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and cache in a temporary folder, so that tests neither see nor change the user's."""
    base = tmp_path_factory.getbasetemp() / "user"
    monkeypatch.setenv("EDGETUNE_CONFIG_DIR", str(base / "config"))
    monkeypatch.setenv("EDGETUNE_CACHE_DIR", str(base / "cache"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of 14 and 10 images, without a val/."""
    return make_images(tmp_path / "images", {"cat": 14, "dog": 10})
