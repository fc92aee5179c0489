"""What a variant takes, measured: `python -m edgetune.export.measure FOLDER VARIANT` in a fresh process without torch.

Peaks of the process above what it holds with the runtime imported, as JSON (`Measured`) on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from edgetune import system
from edgetune.artifacts.manifest import Manifest, Measured, MeasuredPeak, Variant
from edgetune.artifacts.reading import read_manifest
from edgetune.backends.ort import OrtBackend
from edgetune.backends.ort_runtime import inference
from edgetune.cost import Selection
from edgetune.memory import MemoryMeter, limit_allocator
from edgetune.optim import OptimizerSettings

# Smallest first: what an earlier point leaves behind is part of a later one anyway. (images, share of the patch tokens)
POINTS = ((1, 0.5), (1, 1.0), (8, 0.5), (8, 1.0))


def measure(folder: Path, manifest: Manifest, variant: Variant) -> Measured:
    """Prefix, evaluation and a training step, at POINTS; to be called in a process that has done nothing yet."""
    limit_allocator()
    inference()
    shape, preprocess = manifest.shape, manifest.preprocess
    backend = OrtBackend(folder, manifest, variant, OptimizerSettings(name="sgd"))
    all_tokens = (shape.patch_tokens,) * shape.depth
    found: dict[str, list[MeasuredPeak]] = {"prefix": [], "evaluate": [], "train": []}
    reserved = 0
    with MemoryMeter() as meter:
        base = meter.mark_runtime().total_bytes
        data = _data_bytes()

        def note(kind: str, batch: int, share: float, work: Callable[[], object]) -> None:
            name = f"{kind} {batch} {share}"
            with meter.phase(name):
                work()
            peak = meter.peaks().phases[name]
            found[kind].append(MeasuredPeak(batch=batch, tokens_share=share, bytes=max(0, peak - base)))

        if variant.prefix_graph is not None:
            for batch in sorted({batch for batch, _ in POINTS}):
                images = np.zeros((batch, 3, preprocess.height_px, preprocess.width_px), np.float32)
                note("prefix", batch, 1.0, partial(backend.features, images, all_tokens, pooled=False))
            backend.drop_prefix(variant.split_block, {})
        for batch, share in POINTS:
            tokens = tokens_at(manifest, variant, share)
            if share < 1 and tokens == all_tokens:
                continue
            inputs = _inputs(manifest, variant, batch, tokens)
            cached = variant.split_block
            if share == 1:
                note("evaluate", batch, share, partial(backend.evaluate, inputs, cached, all_tokens))
            selection = Selection(
                tuple(block >= variant.split_block for block in range(shape.depth)), tokens, variant.embeddings_train
            )
            step = partial(
                backend.step,
                [(inputs, np.zeros(batch, np.int64))],
                selection,
                images=batch,
                weight_sum=float(batch),
                learning_rate=0.0,
                seed=0,
                with_deltas=True,
                cached_blocks=cached,
            )
            note("train", batch, share, step)
            reserved = max(reserved, _data_bytes() - data - (meter.current().total_bytes - base))
    return Measured(**{kind: tuple(points) for kind, points in found.items()}, reserved_bytes=reserved)


def _data_bytes() -> int:
    """This process's data segment, which RLIMIT_DATA counts whether or not it was touched."""
    return system.process_status().get("VmData", 0)


def tokens_at(manifest: Manifest, variant: Variant, share: float) -> tuple[int, ...]:
    """Patch tokens of each block where a share of them goes on at the split (above the first block, for split 0)."""
    shape = manifest.shape
    first = max(1, variant.split_block)
    if manifest.adaptive is None or first >= shape.depth:
        return (shape.patch_tokens,) * shape.depth
    kept = max(1, round(share * shape.patch_tokens))
    return (shape.patch_tokens,) * first + (kept,) * (shape.depth - first)


def _inputs(manifest: Manifest, variant: Variant, batch: int, tokens: tuple[int, ...]) -> np.ndarray:
    shape, preprocess = manifest.shape, manifest.preprocess
    if variant.split_block == 0:
        return np.zeros((batch, 3, preprocess.height_px, preprocess.width_px), np.float32)
    entering = tokens[variant.split_block] if variant.split_block < shape.depth else shape.patch_tokens
    return np.zeros((batch, shape.prefix_tokens + entering, shape.width), np.float32)


def main() -> int:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    manifest = read_manifest(folder)
    found = measure(folder, manifest, manifest.variant(name))
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
