"""One process of `allocators.py`: optimizer steps under one allocator, watched by the process itself.

`allocators.py` starts it with a `Job` as JSON for its only argument, and reads a `Sample` as JSON from its output.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from pathlib import Path

import msgspec

from edgetune.alast import draw_blocks, keep_tokens
from edgetune.allocator import limit_allocator

TOKEN_MULTIPLE = 8  # as the planner rounds counts
LEAST_BUDGET = 0.8816  # the planner's floor for twelve blocks
DRAWN_BLOCKS = 9  # of twelve, as ALaST draws where memory does not bind
LARGEST_EVERY = 10
CLASSES = 10


class Workload(msgspec.Struct, frozen=True):
    name: str
    model: str
    batch: int
    micro_batch: int


class Job(msgspec.Struct, frozen=True):
    """What one process does. `preloaded`: the library that must be in it."""

    workload: Workload
    steps: int
    threshold_bytes: int | None = None
    preloaded: str = ""


class Sample(msgspec.Struct, frozen=True):
    """What one process saw: bytes above the warmed-up process, and of each step its CPU seconds and page faults."""

    peak_bytes: int
    growth_bytes: int
    cpu_seconds: list[float]
    faults: list[int]


WORKLOADS = (
    Workload("edgetune_micro, 32 px, batch 32 in micro-batches of 4", "edgetune_micro", 32, 4),
    Workload("deit_tiny, 224 px, batch 8 at once", "deit_tiny_patch16_224", 8, 8),
)


def draws(depth: int, patch_tokens: int, steps: int, seed: int = 0) -> list[tuple[tuple[bool, ...], tuple[int, ...]]]:
    """(trained blocks, patch tokens a block) of each step. Token counts differ from those of the step before.

    Every LARGEST_EVERY-th step is the largest: nothing pruned, and the lowest blocks train.
    """
    rng = random.Random(f"allocators {seed}")
    count = max(1, DRAWN_BLOCKS * depth // 12)
    steps_drawn: list[tuple[tuple[bool, ...], tuple[int, ...]]] = []
    while len(steps_drawn) < steps:
        if len(steps_drawn) % LARGEST_EVERY == LARGEST_EVERY - 1:
            steps_drawn.append((tuple(block < count for block in range(depth)), (patch_tokens,) * depth))
            continue
        budgets = [rng.uniform(LEAST_BUDGET, 1.0) for _ in range(depth)]
        trains = draw_blocks(budgets, 0, count, "multinomial", rng)
        kept = keep_tokens(budgets, patch_tokens, 0, "compound")
        tokens = tuple(min(patch_tokens, -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE) for tokens in kept)
        if not steps_drawn or tokens != steps_drawn[-1][1]:
            steps_drawn.append((trains, tokens))
    return steps_drawn


def take_steps(job: Job) -> Sample:
    """In a process of its own: warm up, then train and watch."""
    if job.threshold_bytes is not None:
        done = limit_allocator(job.threshold_bytes)
        if done.startswith("unchanged"):
            raise SystemExit(done)
    if job.preloaded and Path(job.preloaded).resolve().name not in Path("/proc/self/maps").read_text(encoding="utf-8"):
        raise SystemExit("could not be preloaded")
    import numpy as np
    import torch

    from edgetune import process
    from edgetune.backends import pytorch
    from edgetune.cost import Selection
    from edgetune.optim import OptimizerSettings
    from edgetune.vit.models import ModelSource, load_model
    from edgetune.vit.shape import shape_of

    torch.set_num_threads(1)
    pytorch.warm_up(OptimizerSettings(name="adamw"))
    if not process.reset_high_water():
        raise SystemExit("the kernel does not let the high-water mark be reset")
    warm_bytes = process.snapshot().rss_bytes

    workload = job.workload
    model = load_model(ModelSource(name=workload.model, pretrained=False), CLASSES).model
    shape = shape_of(model, workload.model)
    backend = pytorch.TorchBackend(model, OptimizerSettings(name="adamw"))
    backend.reserve(Selection((True,) * shape.depth, (shape.patch_tokens,) * shape.depth))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((workload.batch, 3, *shape.image_px), np.float32)
    labels = rng.integers(0, CLASSES, workload.batch)
    cuts = [slice(start, start + workload.micro_batch) for start in range(0, workload.batch, workload.micro_batch)]
    cpu_seconds, faults, peaks = [], [], []
    for step, (trains, tokens) in enumerate(draws(shape.depth, shape.patch_tokens, job.steps)):
        faults_before, began = _faults(), time.process_time()
        backend.step(
            ((inputs[cut], labels[cut]) for cut in cuts),
            Selection(trains, tokens),
            images=workload.batch,
            weight_sum=float(workload.batch),
            learning_rate=1e-4,
            seed=step,
            with_deltas=True,
        )
        cpu_seconds.append(time.process_time() - began)
        faults.append(_faults() - faults_before)
        peaks.append((process.measure()[1] or 0) - warm_bytes)
    first_largest = min(LARGEST_EVERY, job.steps) - 1
    # The kernel's counters are exact to some 100 KiB, so a mark that only rises can read lower.
    return Sample(peaks[-1], max(0, peaks[-1] - peaks[first_largest]), cpu_seconds, faults)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    sys.stdout.write(msgspec.json.encode(take_steps(job)).decode())


if __name__ == "__main__":
    main()
