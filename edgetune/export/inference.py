"""A run's model as an ONNX file for inference: current opset, checked, compared with torch on random images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from edgetune.checkpoint import write_atomically
from edgetune.checkpoint.files import disk_errors
from edgetune.errors import RunFolderError, UnsupportedModel
from edgetune.store import MODEL_FILE, read_stored
from edgetune.vit.models import load_saved

OPSET = 20
TOLERANCE = 1e-4
IMAGES = 2


def export_inference(run: Path, output: Path) -> str:
    """Write `output` (a new file): images (B, 3, H, W) -> logits (B, classes). Returns a sentence on what was compared.

    Raises: RunFolderError, WeightsError for a folder that is no run's; UnsupportedModel for what can't be exported, or
    comes out as another model.
    """
    with disk_errors(output):
        if output.exists():
            raise RunFolderError(f"{output} is there already. Name another file.")
    stored = read_stored(run)
    model = load_saved(run, run / MODEL_FILE, classes=len(stored.classes))
    size = (stored.preprocess.height_px, stored.preprocess.width_px)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((IMAGES, 3, *size), np.float32))
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model(images).numpy()
        try:
            torch.onnx.export(
                model,
                (images,),
                buffer,  # type: ignore[arg-type]
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:
            raise UnsupportedModel(
                f"the model can't be exported: {str(error).strip().splitlines()[0][:300]}"
            ) from error
    graph = onnx.load_from_string(buffer.getvalue())
    graph.metadata_props.add(key="labels", value="\n".join(stored.classes))
    onnx.checker.check_model(graph, full_check=True)
    outputs: Any = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})
    found = np.asarray(outputs[0])
    difference = float(np.abs(found - wanted).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise UnsupportedModel(
            f"the exported model gives other logits than torch's, {difference:.1e} away. Nothing was written."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, graph.SerializeToString())
    return f"{output}: opset {OPSET}, checked; logits within {difference:.0e} of torch's on {IMAGES} random images"
