"""A small model and artifacts of it: four blocks at 32 px, cut at 0, 2 and 4."""

from __future__ import annotations

import json
from pathlib import Path


def make_tiny_model(folder: Path) -> Path:
    """A model folder that `--model local-dir:` takes."""
    import torch
    from timm.models import create_model

    from edgetune.checkpoint import save_tensors

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


def export_tiny(model: Path, folder: Path, *, checked: bool) -> Path:
    """Training artifacts of it, classes to be named on the device. `checked`: compared with torch, and measured."""
    from edgetune.artifacts.manifest import Schedule
    from edgetune.export.build import ExportRequest
    from edgetune.export.command import export

    request = ExportRequest(
        model=f"local-dir:{model}",
        class_count=4,
        splits=(0, 2, 4),
        schedule=Schedule(peak_rate=1e-2, warmup_steps=3, total_steps=8),
        verify=checked,
    )
    export(request, folder, room_bytes=None, measured=checked, note=lambda _text: None)
    return folder
