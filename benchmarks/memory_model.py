"""The memory model against the CPU allocator's own events: the peak of live bytes of random steps, and their FLOPs.

    python benchmarks/memory_model.py                 # writes benchmarks/memory_model.md and memory_model.svg
    python benchmarks/memory_model.py --configs 60 --seed 7 --only plain --output /tmp
    python benchmarks/memory_model.py --append-label "torch 2.5.1"   # with another torch: a row in the same .md

Each configuration is a step of a real timm model (whole depth and width, no meaning in its values) at a random image size, batch,
split, trained set, token counts, recompute levels and optimizer. Measured is what torch's CPU allocator had live at
most, by its own events (`torch.profiler`), the batch of images included; predicted is `cost.step_cost`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from memory_figures import Point, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from edgetune import cost
from edgetune.allocator import limit_allocator
from edgetune.backends.pytorch import TorchBackend, own_kernels
from edgetune.cost import Recompute, Selection, StepCost, StepSetup, ViTShape
from edgetune.optim import OptimizerName, OptimizerSettings
from edgetune.units import MIB
from edgetune.vit.shape import shape_of

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("deit_tiny_patch16_224", {}),
    "LayerScale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "q/k norm": ("vit_small_patch16_224", {"qk_norm": True}),
    "pre-norm CLIP": ("vit_base_patch32_clip_quickgelu_224", {}),
    "base": ("vit_base_patch16_224", {}),
}
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "momentum", "sgd", "adafactor")


class Config(NamedTuple):
    """One random step."""

    family: str
    image_px: int
    micro_batch: int
    accumulation: int
    optimizer: OptimizerName
    updates_in_backward: bool
    threads: int
    selection: Selection
    half_blocks: int = 0  # the lowest blocks, whose weights are stored as bfloat16
    cached_blocks: int = 0  # the lowest blocks, whose output is read instead
    pooled: bool = False

    @property
    def setup(self) -> StepSetup:
        return StepSetup(
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            optimizer=self.optimizer,
            ever_trained_blocks=sum(self.selection.trains),
            updates_in_backward=self.updates_in_backward,
            half_blocks=self.half_blocks,
            threads=self.threads,
            cached_blocks=self.cached_blocks,
            pooled=self.pooled,
        )


class Outcome(NamedTuple):
    config: Config
    predicted_bytes: int
    measured_bytes: int
    predicted_flops: int
    measured_flops: int | None

    @property
    def error(self) -> float:
        """Relative: 0.01 is 1 % above what was measured."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def flops_error(self) -> float | None:
        return None if not self.measured_flops else self.predicted_flops / self.measured_flops - 1


def build(family: str, image_px: int) -> torch.nn.Module:
    """The model with memory but no meaning: values do not change how much is live."""
    name, arguments = MODELS[family]
    with torch.device("meta"):
        model: torch.nn.Module = timm.create_model(name, num_classes=10, img_size=image_px, **arguments)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def random_config(rng: random.Random, family: str, *, largest_grid: int = 14) -> Config:
    """A step of this family's model; images have at most `largest_grid` patches a side (7 for the base model)."""
    patch = 14 if "patch14" in MODELS[family][0] else 32 if "patch32" in MODELS[family][0] else 16
    smallest, largest = (2, min(7, largest_grid)) if family == "base" else (3, largest_grid)
    image_px = patch * rng.choice(range(smallest, largest + 1))
    return random_step(rng, family, image_px, 12, (image_px // patch) ** 2, largest_batch=4 if family == "base" else 12)


def random_step(
    rng: random.Random,
    family: str,
    image_px: int,
    depth: int,
    tokens: int,
    *,
    largest_batch: int = 12,
    prunes: bool = True,
    levels: Sequence[Recompute] = tuple(Recompute),
) -> Config:
    """A step of any model with so many blocks and patch tokens. `levels`: of recompute, those that its blocks know."""
    embeddings = rng.random() < 0.2
    split = 0 if embeddings else rng.randrange(depth + 1)
    above = depth - split
    count = rng.randint(1, above) if above else 0
    chosen = set(rng.sample(range(split, depth), count))
    kept, counts = tokens, []
    for block in range(depth):
        if block and block >= split and rng.random() < 0.5:
            kept = max(1, min(kept, 8 * math.ceil(kept * rng.uniform(0.6, 1.0) / 8)))
        counts.append(kept if prunes else tokens)
    level = rng.choice(["none", "mlp", "block", "frozen", "random"])
    recompute = {
        "none": (),
        "mlp": (levels[len(levels) // 2],) * depth,
        "block": (Recompute.BLOCK,) * depth,
        "frozen": tuple(Recompute.NOTHING if block in chosen else Recompute.BLOCK for block in range(depth)),
        "random": tuple(rng.choice(levels) for _ in range(depth)),
    }[level]
    accumulation = rng.choice([1, 1, 2])
    cached = rng.randint(1, split) if split and rng.random() < 0.4 else 0
    if cached < split:  # blocks below the split prune nothing, and a cache holds what its last one lets through
        counts[cached:split] = [counts[cached]] * (split - cached)
    return Config(
        family=family,
        image_px=image_px,
        micro_batch=rng.randint(1, largest_batch),
        accumulation=accumulation,
        optimizer=rng.choice(OPTIMIZERS),
        updates_in_backward=accumulation == 1 and rng.random() < 0.3,
        threads=rng.choice([1, 2]),
        selection=Selection(tuple(block in chosen for block in range(depth)), tuple(counts), embeddings, recompute),
        half_blocks=split if not cached and rng.random() < 0.2 else 0,
        cached_blocks=cached,
        pooled=cached == depth and family in ("plain", "LayerScale", "registers", "base") and rng.random() < 0.5,
    )


def live_growth_bytes(work: Callable[[], object]) -> list[int]:
    """Live tensor bytes above where they stood, after each event of torch's CPU allocator while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found: Any = profiler.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(accumulate(event.nbytes() for event in events))


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """The most that live tensor bytes grew above where they stood, while `work` ran."""
    return max(0, *live_growth_bytes(work), 0)


def resting_bytes(backend: TorchBackend) -> int:
    """Bytes of weights, buffers and optimizer state that are there before a step."""
    tensors = [*backend.model.state_dict().values()]
    tensors += [tensor for state in backend.optimizer.state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predict(shape: ViTShape, config: Config) -> StepCost:
    return cost.step_cost(shape, config.selection, config.setup)


def measure(model: Any, config: Config, *, with_flops: bool) -> Outcome:
    """One warmed-up step (the optimizer's state is there), measured and predicted."""
    torch.set_num_threads(config.threads)
    shape = shape_of(model, config.family)
    backend = TorchBackend(model, OptimizerSettings(name=config.optimizer))
    backend.store_half(config.half_blocks)
    if config.cached_blocks:
        backend.drop_prefix(
            config.cached_blocks, dict.fromkeys(model.state_dict(), np.empty(0))
        )  # nobody will ask for it
    images = config.micro_batch * config.accumulation

    inputs: tuple[int, ...] = (config.micro_batch, 3, *shape.image_px)
    if config.cached_blocks:
        tokens = config.selection.tokens[min(config.cached_blocks, shape.depth - 1)]
        inputs = (config.micro_batch, cost.feature_tokens(shape, tokens, pooled=config.pooled), shape.width)

    def batches() -> Iterator[tuple[Any, Any]]:
        for _ in range(config.accumulation):
            yield np.zeros(inputs, np.float32), np.zeros(config.micro_batch, np.int64)

    def step() -> None:
        backend.step(
            batches(),
            config.selection,
            images=images,
            weight_sum=float(images),
            learning_rate=0.0,
            seed=0,
            with_deltas=shape.class_token,
            updates_in_backward=config.updates_in_backward,
            cached_blocks=config.cached_blocks,
        )

    names = backend.trained_names(config.selection)
    backend.optimizer.reserve((name, value) for name, value in model.named_parameters() if name in names)
    flops = None
    if with_flops:
        # Fused attention is counted as nothing on the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
    # numpy makes the images, so torch's allocator does not see them.
    predicted = predict(shape, config)
    measured = resting_bytes(backend) + predicted.inputs_bytes + peak_growth_bytes(step)
    return Outcome(config, predicted.peak_bytes, measured, predicted.flops, flops)


def describe(config: Config) -> str:
    selection = config.selection
    trains = "".join("T" if trained else "f" for trained in selection.trains)
    levels = "".join(str(int(level)) for level in selection.recompute) or "-"
    extras = " emb" if selection.embeddings_train else ""
    extras += " in-backward" if config.updates_in_backward else ""
    extras += f" half {config.half_blocks}" if config.half_blocks else ""
    extras += f" cached {config.cached_blocks}{' pooled' * config.pooled}" if config.cached_blocks else ""
    return (
        f"{config.family} {config.image_px}px b{config.micro_batch}x{config.accumulation} {config.optimizer} "
        f"t{config.threads} {trains} {levels} {selection.tokens[0]}-{selection.tokens[-1]}{extras}"
    )


def line(outcome: Outcome) -> str:
    flops = "" if outcome.flops_error is None else f" flops {outcome.flops_error:+.2%}"
    sizes = f"{outcome.predicted_bytes / MIB:.1f} {outcome.measured_bytes / MIB:.1f}"
    return f"{outcome.error:+.2%} {sizes}{flops} {describe(outcome.config)}"


def run(configs: int, seed: int, families: Sequence[str], flops_every: int) -> Iterator[Outcome]:
    """The families take turns; every `flops_every`th configuration of each has its FLOPs counted too."""
    limit_allocator()  # else what freed models leave is kept: 15 GiB after 500 of them
    own_kernels()  # as every run
    rng = random.Random(seed)
    for number in range(configs):
        config = random_config(rng, families[number % len(families)])
        with_flops = number // len(families) % flops_every == 0
        yield measure(build(config.family, config.image_px), config, with_flops=with_flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=540)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(MODELS), help="one family alone")
    parser.add_argument("--flops-every", type=int, default=4, metavar="N", help="count FLOPs in every Nth (default 4)")
    parser.add_argument("--append-label", metavar="NAME", help="add the errors as a row of other versions, so named")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    args = parser.parse_args()
    outcomes = []
    for outcome in run(args.configs, args.seed, [args.only] if args.only else list(MODELS), args.flops_every):
        print(line(outcome), flush=True)
        outcomes.append(outcome)
    points = [
        Point(outcome.config.family, outcome.predicted_bytes, outcome.measured_bytes, outcome.flops_error)
        for outcome in outcomes
    ]
    command = f"python benchmarks/memory_model.py --configs {args.configs} --seed {args.seed}"
    command += f' --only "{args.only}"' if args.only else ""
    command += f' --append-label "{args.append_label}"' if args.append_label else ""
    print(write(args.output, points, command=command, label=args.append_label))


if __name__ == "__main__":
    main()
