"""A manifest with its files, made by hand: four blocks, three variants, measured as if they were real. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgetune.alast import AlastSettings
from edgetune.artifacts.manifest import (
    MANIFEST_FILE,
    Adaptive,
    FileEntry,
    Input,
    Manifest,
    Measured,
    MeasuredPeak,
    OptimizerFiles,
    ParameterEntry,
    Schedule,
    Variant,
    variant_name,
)
from edgetune.artifacts.reading import file_sha256, files_in
from edgetune.checkpoint import save_tensors
from edgetune.cost import ViTShape
from edgetune.data import Preprocess
from edgetune.units import MIB

DEPTH, WIDTH, CLASSES, PATCHES = 4, 8, 3, 16
SHAPE = ViTShape(
    name="tiny",
    depth=DEPTH,
    width=WIDTH,
    heads=2,
    head_width=4,
    mlp_width=32,
    patch_tokens=PATCHES,
    prefix_tokens=1,
    classes=CLASSES,
    image_px=(16, 16),
    patch_px=(4, 4),
    embed_parameters=100,
    block_parameters=900,
    head_parameters=27,
    largest_parameter=256,
)


def tensors() -> dict[str, Any]:
    """Two tensors a block, two of the head, one below."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 17, WIDTH)}
    for block in range(DEPTH):
        shapes |= {f"blocks.{block}.mlp.weight": (WIDTH, WIDTH), f"blocks.{block}.mlp.bias": (WIDTH,)}
    shapes |= {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def peaks(megabytes: int) -> tuple[MeasuredPeak, ...]:
    """Half of it for one image at half the tokens; all of it for eight at all tokens."""
    return tuple(
        MeasuredPeak(batch=batch, tokens_share=share, bytes=int(MIB * megabytes * (0.25 + 0.75 * share * batch / 8)))
        for batch, share in ((1, 0.5), (1, 1.0), (8, 0.5), (8, 1.0))
    )


def make_variant(split: int, megabytes: int) -> Variant:
    name = variant_name(split, DEPTH, embeddings_train=False)
    own = {key: value.shape for key, value in tensors().items() if _above(key, split)}
    first = Input(name="features", dtype="float32", shape=("batch", "stream", WIDTH))
    images = Input(name="images", dtype="float32", shape=("batch", 3, 16, 16))
    return Variant(
        name=name,
        split_block=split,
        prefix_graph=f"prefix-{name}.onnx" if split else None,
        prefix_inputs=(images,) if split else (),
        prefix_outputs=("features",) if split else (),
        training_graph=f"{name}/training_model.onnx",
        eval_graph=f"{name}/eval_model.onnx",
        checkpoint=f"{name}/checkpoint",
        inputs=(first if split else images, Input(name="targets", dtype="float32", shape=("batch", CLASSES))),
        outputs=("loss", "logits", "head_inputs"),
        parameters=tuple(
            ParameterEntry(name=key, shape=shape, trained=key != "pos_embed") for key, shape in own.items()
        ),
        predicted_train_bytes=megabytes * MIB,
        measured=Measured(prefix=peaks(10) if split else (), train=peaks(megabytes), evaluate=peaks(megabytes // 2)),
    )


def _above(name: str, split: int) -> bool:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) >= split
    return name.startswith("head") or split == 0


def make_artifacts(folder: Path, **changes: Any) -> Manifest:
    """The folder on disk; keyword arguments change the manifest, whose files are listed as they are."""
    variants = (make_variant(0, 80), make_variant(2, 40), make_variant(DEPTH, 8))
    manifest = Manifest(
        opset=16,
        ir_version=8,
        versions={"python": "3.11.0"},
        model="tiny",
        architecture="vit_tiny",
        shape=SHAPE,
        preprocess=Preprocess(height_px=16, width_px=16, crop_pct=1.0),
        classes=("ant", "bee", "cat"),
        config={"architecture": "vit_tiny", "num_classes": CLASSES},
        weights="model.safetensors",
        variants=variants,
        optimizers={
            name: OptimizerFiles(plain=f"optimizer_{name}.onnx", scheduled=f"optimizer_{name}_scheduled.onnx")
            for name in ("adamw", "sgd")
        },
        weight_decay=0.05,
        schedule=Schedule(peak_rate=1e-3, warmup_steps=10, total_steps=100),
        adaptive=Adaptive(
            settings=AlastSettings(),
            token_floor={variant.name: 0.5 for variant in variants},
            token_multiple=8,
            trained_blocks={variant.name: min(1, DEPTH - variant.split_block) for variant in variants},
        ),
        files={},
    )
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors(), {"format": "pt"})
    for variant in variants:
        for path in (variant.prefix_graph, variant.training_graph, variant.eval_graph, variant.checkpoint):
            if path is not None:
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(f"graph {path}".encode())
    for files in manifest.optimizers.values():
        (folder / files.plain).write_bytes(b"plain")
        (folder / files.scheduled).write_bytes(b"scheduled")
    listed = {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in files_in(folder)
    }
    manifest = msgspec.structs.replace(manifest, files=listed)
    write(folder, msgspec.structs.replace(manifest, **changes))
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
