"""What is settled before the first step: the runtime, the data, the model's shape, the plan, and the model in a backend."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from edgetune import system
from edgetune.checkpoint.files import disk_errors
from edgetune.cost import ViTShape
from edgetune.data import DataFolder, Pictures, Preprocess, bundled_sample, class_weights, open_folder, some
from edgetune.enforce import by_rlimit, rehearse
from edgetune.engines import Built, engine_of
from edgetune.errors import DoesNotFit, UsageError
from edgetune.features import LookedFeatures
from edgetune.job import Listener
from edgetune.judge import Judge, is_this_machine, judge_for, threads_for
from edgetune.memory import MemoryMeter, limit_allocator
from edgetune.methods import METHODS, adaptive_obstacle, check_model, space_of
from edgetune.planner import LEAST_LOOKED_AT, LEAST_PASSES, CacheRequest, Plan, PlanRequest, replayed, views_that_fit
from edgetune.profiles import DeviceProfile
from edgetune.settings import RunSettings, looks_for_split, names_what_trains
from edgetune.shapes import known_shapes
from edgetune.units import MIB
from edgetune.warmup import settle_interned_strings, warm_up_data

# Of what is left for training, the share that decoding one image may take at the most.
DECODE_SHARE = 1 / 3
LEAST_DECODE_BYTES = 8 * MIB
# An image whose decoding takes no more is always loaded while a step runs.
OVERLAPPED_DECODE_BYTES = 4 * MIB
# Of what is free on the disk, the share that a cache may take.
FREE_DISK_SHARE = 0.9
# And that may be taken by what is kept until the cache is made: decoded images, and what a look made of some.
SCRATCH_DISK_SHARE = 0.05
CACHE_FOLDER = "cache"


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is settled before any weight is loaded."""

    settings: RunSettings
    judge: Judge
    data: DataFolder
    shape: ViTShape
    preprocess: Preprocess
    plan: Plan
    request: PlanRequest
    decode_budget_bytes: int
    pictures: Pictures | None
    scratch_folder: Path | None  # where a run may keep what it wants again; None: nowhere
    looks: bool  # whether the split is still to be found, by looking at the images
    looked: LookedFeatures | None = None
    notes: tuple[str, ...]


def prepare(
    settings: RunSettings,
    judge: Judge,
    profile: DeviceProfile,
    meter: MemoryMeter,
    listener: Listener,
    stored_plan: Plan | None,
    *,
    replay: bool,
    run_folder: Path,
) -> Setup:
    """Data, the model's shape and the plan: all that can fail before a weight is loaded.

    `stored_plan` is the run's own where it is resumed; with `replay` it is another run's.
    """
    above = existing(cache_folder(settings, run_folder))
    if not above.is_dir():
        raise UsageError(
            f"--cache {settings.cache_dir}: {above} is a file. Name a folder; it is made where there is none."
        )
    engine = engine_of(settings)
    _, preprocess = engine.describe(settings, 2)
    left = judge.cap_bytes - judge.device_runtime_bytes
    if stored_plan is not None:
        # What this machine has left today must not change at which scale a photograph is decoded.
        left = stored_plan.cap_bytes - stored_plan.runtime_bytes
    decode_budget = max(LEAST_DECODE_BYTES, int(left * DECODE_SHARE))
    scratch = _scratch_folder(settings, cache_folder(settings, run_folder))
    pictures = None if scratch is None else Pictures(scratch, preprocess, scratch_bytes(scratch))
    with meter.phase("data"):
        data = open_folder(
            settings.data or bundled_sample(),
            seed=settings.seed,
            val_share=settings.val_share,
            max_bad=settings.max_bad,
            decode_budget_bytes=decode_budget,
            cache_dir=system.cache_dir(),
            progress=lambda done, total: listener.progress("check images", done, total),
            preprocess=preprocess,
            pictures=pictures,
        )
    data = engine.fitted(settings, data)
    shape, _ = engine.describe(settings, len(data.classes))
    notes = [*judge.notes, *data.notes]
    listener.note(
        f"{len(data.train.paths)} training and {len(data.val.paths)} validation images, "
        f"{len(data.classes)} classes: {some(data.classes, 20)}"
    )
    disk_room = room_on_disk(cache_folder(settings, run_folder))
    method = METHODS[settings.method]
    check_model(method, shape, adaptive_obstacle(shape), split_tokens=settings.split_tokens)
    request = PlanRequest(
        shape=shape,
        space=space_of(
            method,
            shape,
            trained_blocks=settings.trained_blocks,
            split_block=settings.split_block,
            embeddings=settings.embeddings,
        ),
        batch_size=min(settings.batch_size, len(data.train.paths)),
        optimizer=settings.optimizer,
        cap_bytes=judge.cap_bytes,
        runtime_bytes=judge.device_runtime_bytes,
        token_floor=settings.token_floor,
        token_ceiling=settings.token_ceiling,
        accumulation=settings.accumulation,
        recompute=settings.recompute,
        updates_in_backward=settings.updates_in_backward,
        keeps_state=settings.keeps_state,
        half_frozen=settings.half_frozen,
        decode_bytes=data.decode_peak_bytes,
        load_copies=engine.load_copies(settings, shape),
        threads=threads_of(settings, profile),
        peak_flops_per_s=profile.peak_flops_per_s,
        memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s,
        split_tokens=settings.split_tokens,
        token_score=stored_plan.token_score if stored_plan is not None else settings.token_score or "attention",
        fits_head=settings.fits_head,
        by_limit=by_rlimit(settings.enforce, simulated=judge.simulated),
    )
    settings, request = with_cache(settings, request, data, disk_room)
    plan = stored_plan
    if plan is None:
        request, plan = planned(settings, request, len(data.classes))
    elif len(plan.token_ceiling) != shape.depth or plan.token_ceiling[0] != shape.patch_tokens:
        raise UsageError(
            f"the plan is for {plan.model} ({len(plan.token_ceiling)} blocks, {plan.token_ceiling[0]} patch tokens), "
            f"not for {shape.name} ({shape.depth}, {shape.patch_tokens}) at this image size."
        )
    elif replay:
        plan = replayed(plan, cap_bytes=judge.cap_bytes, runtime_bytes=judge.device_runtime_bytes)
    frozen = shape.depth if method.name == "head" else plan.split_block
    if not settings.pretrained and (frozen or not plan.embeddings_train):
        what = f"the embeddings and the {frozen} blocks below the split" if frozen else "the embeddings"
        notes.append(f"warning: {what} stay frozen at random weights; --method full trains everything")
    for note in notes:
        listener.note(note)
    # Who names what trains knows that nothing is looked for, unless it was asked for as well.
    asked = settings.split == "auto" or not names_what_trains(settings)
    looks = stored_plan is None and looks_for_split(settings) and asked
    refusal = why_not_looked(settings, request, data.train.labels) if looks else None
    if refusal is not None:
        looks = False
        notes.append(f"--split auto: not looked for, since {refusal}")
        listener.note(notes[-1])
    if not looks:
        tell_plan(plan, listener)
    return Setup(
        settings=settings,
        judge=judge,
        data=data,
        shape=shape,
        preprocess=preprocess,
        plan=plan,
        request=request,
        decode_budget_bytes=decode_budget,
        pictures=pictures,
        scratch_folder=scratch,
        looks=looks,
        notes=tuple(notes),
    )


def planned(settings: RunSettings, request: PlanRequest, classes: int) -> tuple[PlanRequest, Plan]:
    """The plan, and the request with how images are loaded: between steps where decoding them beside a step would bind."""
    smaller, make_plan = known_shapes(classes), partial(engine_of(settings).plan, settings)
    if request.decode_bytes <= OVERLAPPED_DECODE_BYTES:
        return request, make_plan(request, smaller)
    try:
        plan = make_plan(request)
        if not plan.memory_binds:
            return request, plan
    except DoesNotFit:
        pass
    request = msgspec.structs.replace(request, overlaps=False)
    return request, make_plan(request, smaller)


def tell_plan(plan: Plan, listener: Listener) -> None:
    for line in plan.explanation:
        listener.note(f"plan: {line}")


def why_not_looked(settings: RunSettings, request: PlanRequest, labels: Sequence[int]) -> str | None:
    """Why the split is not found by looking at the images; None: it is. That takes a pretrained model that has something to
    freeze, nobody who named what, and enough images, which are seen often enough for it to pay.
    """
    if names_what_trains(settings):
        return "what trains is named"
    if not settings.pretrained:
        return "the model is not pretrained"
    if len(request.space.splits) < 2:
        return f"--method {settings.method} leaves no split to choose here"
    passes = steps_of(settings, request, len(labels)) * request.batch_size / len(labels)
    if passes < LEAST_PASSES:
        return f"it pays from {LEAST_PASSES} passes over the images on, and these are {passes:.1f}"
    telling = sum(count for count in Counter(labels).values() if count > 1)
    if telling < LEAST_LOOKED_AT:
        return (
            f"{telling} training images share their class with another, and fewer than {LEAST_LOOKED_AT} tell nothing"
        )
    return None


def steps_of(settings: RunSettings, request: PlanRequest, images: int) -> int:
    """Of the whole run, which trains on so many images."""
    return settings.steps or settings.epochs * -(-images // request.batch_size)


def with_cache(
    settings: RunSettings, request: PlanRequest, data: DataFolder, disk_room_bytes: int
) -> tuple[RunSettings, PlanRequest]:
    """The request with what the planner must know to decide on a cache of the frozen prefix; and the settings with the
    number of augmented views, where that is left open (`settle_views` has the last word).
    """
    fresh = (settings.augment or settings.hflip > 0) and settings.augment_views is None
    refusal = "--no-cache" if settings.prefix_cache is False else None
    if refusal is None and fresh:
        refusal = "every epoch sees every image anew; --augment-views keeps so many views of each"
    images = len(data.train.paths)
    cache = CacheRequest(
        train_images=images,
        val_images=len(data.val.paths),
        steps=steps_of(settings, request, images),
        float_bytes=2 if settings.cache_precision == "float16" else 4,
        limit_bytes=disk_room_bytes
        if settings.cache_limit_bytes is None
        else min(settings.cache_limit_bytes, disk_room_bytes),
        asked=settings.prefix_cache is True,
    )
    if settings.augment_views == 0:
        views, too_few = views_that_fit(request, cache)
        refusal = refusal or too_few
        settings = msgspec.structs.replace(settings, augment_views=None if refusal else views)
    cache = msgspec.structs.replace(cache, views=settings.augment_views or 1)
    return settings, msgspec.structs.replace(request, cache=None if refusal else cache, no_cache_because=refusal)


def settle_views(asked: RunSettings, setup: Setup) -> tuple[Setup, tuple[str, ...]]:
    """The setup with as many augmented views as its plan caches, where the number was left open; and that number, in words.

    Views are fixed for the cache's sake alone: where nothing is cached, every epoch sees every image anew.
    """
    if asked.augment_views != 0:
        return setup, ()
    prefix = setup.plan.prefix
    if prefix is None:
        views = None
        line = f"every epoch sees every image anew, since {setup.request.no_cache_because or 'nothing is cached'}"
    else:
        views = prefix.views
        line = f"{views} fixed views of each image, which come round again every {views} epochs"
    settings = msgspec.structs.replace(setup.settings, augment_views=views)
    return msgspec.structs.replace(setup, settings=settings), (f"--augment-views auto: {line}",)


def room_on_disk(folder: Path) -> int:
    """Bytes that a cache in this folder may have: most of what is free, and what it has already."""
    above = existing(folder)
    try:
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        return there + int(FREE_DISK_SHARE * shutil.disk_usage(above).free)
    except OSError:
        return 0


def _scratch_folder(settings: RunSettings, folder: Path) -> Path | None:
    """Where what is worked out once may be kept for this run; None where no more may be on the disk, or whole images are
    needed each time.
    """
    if settings.prefix_cache is False or settings.cache_limit_bytes is not None or settings.augment:
        return None
    return existing(folder)


def scratch_bytes(folder: Path) -> int:
    """What a file of that kind may take of the folder's disk."""
    try:
        return int(SCRATCH_DISK_SHARE * shutil.disk_usage(folder).free)
    except OSError:
        return 0


def existing(folder: Path) -> Path:
    """The cache's folder, or the nearest above it that exists.

    Raises: RunFolderError if the system does not say: a name that is too long, a folder that may not be searched.
    """
    with disk_errors(folder, "used for the cache"):
        return next(parent for parent in (folder, *folder.parents) if _is_there(parent))


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def cache_folder(settings: RunSettings, run_folder: Path) -> Path:
    return run_folder / CACHE_FOLDER if settings.cache_dir is None else Path(settings.cache_dir)


def threads_of(settings: RunSettings, profile: DeviceProfile) -> int:
    """CPU threads: as asked for, else the device's."""
    return settings.threads or threads_for(profile)


def warm_up(settings: RunSettings, profile: DeviceProfile, meter: MemoryMeter) -> Judge:
    """Import all that the run needs and take one step on nothing; what the process holds then is the runtime."""
    limit_allocator()
    # Threads that spin while they wait starve whatever else runs, on few cores themselves. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    meter.enter("runtime")
    packages = engine_of(settings).warm_up(settings, threads_of(settings, profile))
    warm_up_data()
    settle_interned_strings()
    if by_rlimit(settings.enforce, simulated=not is_this_machine(profile)):
        rehearse()
    judge = judge_for(profile, settings.ram_cap_bytes, meter, settings.backend, packages)
    meter.enter("")
    return judge


def build(setup: Setup, meter: MemoryMeter, *, pretrained: bool) -> Built:
    """The model in its backend, as the plan runs it."""
    return engine_of(setup.settings).build(
        setup.settings,
        setup.plan,
        setup.data.classes,
        pretrained=pretrained,
        class_weights=step_weights(setup),
        at_peak=meter.current,
    )


def reserved_bytes(setup: Setup) -> int:
    """What a limit on address space must leave to the runtime on top of memory."""
    return engine_of(setup.settings).reserved_bytes(setup.settings, setup.plan)


def step_weights(setup: Setup) -> Any:
    """The weight of each class in the loss, float32 (classes,); None: all weigh the same."""
    if not setup.settings.balanced_class_weights:
        return None
    return class_weights(setup.data.train.labels, len(setup.data.classes))


def settings_of_plan(settings: RunSettings, plan: Plan) -> RunSettings:
    """A replayed plan decides the method, the batch and the optimizer."""
    if settings.model != plan.model:
        raise UsageError(f"the plan is for --model {plan.model}, not {settings.model}.")
    return msgspec.structs.replace(
        settings,
        method=plan.method,
        batch_size=plan.batch_size,
        optimizer=plan.optimizer,
        trained_blocks=None,
        split_block=None,
        accumulation=None,
        token_floor=None,
        token_ceiling=None,
        split_tokens=None,
        token_score=None,
        embeddings="auto",
        recompute="auto",
        updates_in_backward=None,
        keeps_state=None,
        half_frozen=plan.half_frozen,
        threads=plan.threads,
    )
