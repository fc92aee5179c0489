"""One small model, exported once for all tests, compared with torch and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from exporting import export_tiny, make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `--model local-dir:` takes."""
    pytest.importorskip("torch", reason="torch makes the model")
    pytest.importorskip("timm")
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def artifacts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training artifacts of it, classes to be named on the device."""
    pytest.importorskip("onnx", reason="the export extra makes artifacts")
    pytest.importorskip("onnxruntime", reason="no onnxruntime-training-cpu for this platform")
    return export_tiny(tiny_model, tmp_path_factory.mktemp("exported") / "artifacts", checked=True)
