"""One small model, exported once for all tests: four blocks at 32 px, cut at 0, 2 and 4, compared with torch and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `--model local-dir:` takes."""
    pytest.importorskip("torch", reason="torch makes the model")
    pytest.importorskip("timm")
    import torch
    from timm.models import create_model

    from edgetune.checkpoint import save_tensors

    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_tensors(folder / "model.safetensors", {name: value.numpy() for name, value in model.state_dict().items()})
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, "crop_pct": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def artifacts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training artifacts of it, classes to be named on the device."""
    pytest.importorskip("onnx", reason="the export extra makes artifacts")
    pytest.importorskip("onnxruntime", reason="no onnxruntime-training-cpu for this platform")
    from edgetune.artifacts.manifest import Schedule
    from edgetune.export.build import ExportRequest
    from edgetune.export.command import export

    folder = tmp_path_factory.mktemp("exported") / "artifacts"
    request = ExportRequest(
        model=f"local-dir:{tiny_model}",
        class_count=4,
        splits=(0, 2, 4),
        schedule=Schedule(peak_rate=1e-2, warmup_steps=3, total_steps=8),
    )
    export(request, folder, room_bytes=None, note=lambda _text: None)
    return folder
