"""`edgetune plan`: what a run would use and do, before there is one. Without torch for the models it has as data."""

from __future__ import annotations

import json as json_module
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli.options import (
    Embeddings,
    FrozenWeights,
    MethodName,
    OptimizerChoice,
    OptimizerState,
    RecomputeLevel,
    TokenScore,
    parse_split,
    plan_settings,
)
from edgetune.errors import DoesNotFit, UsageError
from edgetune.units import MIB, format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from edgetune.cost import ViTShape
    from edgetune.planner import Plan, PlanRequest
    from edgetune.profiles import DeviceProfile

BAR_CELLS = 40
VAL_SHARE = 4  # of the training images, as many validate: a run's own share without a val/
# Decoding an image of the model's own size, as `edgetune.data` counts it; photographs take more, and a run looks at them.
_SMALL_DECODE_BYTES = MIB


def plan(
    device: Annotated[
        str, typer.Option("--device", help="An id of `edgetune devices list`, a TOML file, or auto.")
    ] = "auto",
    model: Annotated[str, typer.Option("--model", help="timm name or edgetune_micro.")] = "deit_tiny_patch16_224",
    ram_cap: Annotated[
        str | None, typer.Option("--ram-cap", help="RAM cap in place of the device's.", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", "--img-size", min=1, max=4096, help="Pixels.", show_default=False)
    ] = None,
    classes: Annotated[int, typer.Option("--classes", min=1, max=1_000_000, help="Classes of the data.")] = 10,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=65_536, help="Images an optimizer step.")
    ] = 32,
    images: Annotated[
        int, typer.Option("--images", min=1, help="Training images, for the time of an epoch and the prefix cache.")
    ] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=1, max=100_000, help="Passes over them.")] = 10,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute the frozen blocks anew in every step.")] = False,
    cache_limit: Annotated[
        str | None, typer.Option("--cache-limit", help="Most that the cache may take on disk.", show_default=False)
    ] = None,
    method: Annotated[MethodName, typer.Option("--method", help="What trains.")] = MethodName.alast,
    opt: Annotated[OptimizerChoice, typer.Option("--opt", help="Optimizer.")] = OptimizerChoice.adamw,
    trained_blocks: Annotated[
        int | None, typer.Option("--trained-blocks", help="K: blocks that train in a step.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="A block, or `lowest` (default here, where there are no images to look at): the lowest that fits.",
            show_default=False,
        ),
    ] = None,
    token_floor: Annotated[
        float | None, typer.Option("--token-floor", help="Least share of tokens a block passes on.", show_default=False)
    ] = None,
    token_ceiling: Annotated[
        float | None,
        typer.Option("--token-ceiling", help="Largest share that a block may pass on.", show_default=False),
    ] = None,
    split_tokens: Annotated[
        float | None,
        typer.Option("--split-tokens", help="Share of the tokens that goes on at the split.", show_default=False),
    ] = None,
    token_score: Annotated[
        TokenScore | None,
        typer.Option("--token-score", help="By what the tokens that go on are chosen.", show_default=False),
    ] = None,
    head_first: Annotated[
        bool | None,
        typer.Option(
            "--head-first/--no-head-first", help="Whether the classifier is fitted first.", show_default=False
        ),
    ] = None,
    embeddings: Annotated[
        Embeddings | None, typer.Option("--embeddings", help="Under --method full.", show_default=False)
    ] = None,
    recompute: Annotated[
        RecomputeLevel | None,
        typer.Option("--recompute", help="What the backward computes again.", show_default=False),
    ] = None,
    step_in_backward: Annotated[
        bool | None,
        typer.Option(
            "--step-in-backward/--step-after-backward", help="Update weights inside the backward.", show_default=False
        ),
    ] = None,
    optimizer_state: Annotated[
        OptimizerState | None,
        typer.Option("--optimizer-state", help="Of blocks that a step does not train.", show_default=False),
    ] = None,
    frozen_weights: Annotated[
        FrozenWeights | None,
        typer.Option("--frozen-weights", help="How weights below the split are stored.", show_default=False),
    ] = None,
    min_cap: Annotated[bool, typer.Option("--min-cap", help="Print only the smallest cap that works.")] = False,
    all_devices: Annotated[bool, typer.Option("--all-devices", help="Does it fit: a line a device profile.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else there.")] = False,
) -> None:
    """What a run would use: bytes by kind against the cap, what is trained, and what a little more memory would allow."""
    from edgetune import devices
    from edgetune.enforce import by_rlimit
    from edgetune.judge import is_this_machine, threads_for
    from edgetune.methods import METHODS, adaptive_obstacle, check_model, space_of
    from edgetune.planner import CacheRequest, PlanRequest, format_cap, smallest_cap_bytes
    from edgetune.planner import plan as make_plan
    from edgetune.shapes import known_shapes

    shape, timm = _shape(model, classes, image_size)
    chosen = METHODS[method.value]
    check_model(chosen, shape, adaptive_obstacle(shape), split_tokens=split_tokens)
    levers = plan_settings(
        token_floor=token_floor,
        token_ceiling=token_ceiling,
        split_tokens=split_tokens,
        token_score=token_score,
        embeddings=embeddings,
        recompute=recompute,
        step_in_backward=step_in_backward,
        optimizer_state=optimizer_state,
        frozen_weights=frozen_weights,
    )
    space = space_of(
        chosen,
        shape,
        trained_blocks=trained_blocks,
        split_block=parse_split(split),
        embeddings=levers.pop("embeddings", "auto"),
    )

    cache = CacheRequest(
        train_images=images,
        val_images=-(-images // VAL_SHARE),
        steps=epochs * -(-images // batch_size),
        limit_bytes=None if cache_limit is None else parse_bytes(cache_limit),
    )

    def request(profile: DeviceProfile) -> PlanRequest:
        cap, runtime, _ = _cap_and_runtime(profile, ram_cap, timm=timm)
        return PlanRequest(
            shape=shape,
            space=space,
            batch_size=batch_size,
            optimizer=opt.value,
            cap_bytes=cap,
            runtime_bytes=runtime,
            decode_bytes=_SMALL_DECODE_BYTES + 16 * shape.image_px[0] * shape.image_px[1],
            threads=threads_for(profile),
            peak_flops_per_s=profile.peak_flops_per_s,
            memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s,
            fits_head=chosen.head_first if head_first is None else head_first,
            by_limit=by_rlimit("auto", simulated=not is_this_machine(profile)),
            cache=None if no_cache else cache,
            no_cache_because="--no-cache" if no_cache else None,
            **levers,
        )

    if all_devices and min_cap:
        raise UsageError("--all-devices and --min-cap ask for different answers: leave one of them out.")
    if all_devices:
        _fit_table(devices.list_devices(), request, json)
        return
    profile = devices.find_device(device)
    wanted = request(profile)
    if min_cap:
        smallest = smallest_cap_bytes(wanted)
        typer.echo(
            json_module.dumps({"smallest_cap_bytes": smallest}) if json else format_cap(smallest).replace("MiB", " MiB")
        )
        return
    made = make_plan(wanted, smaller_models=known_shapes(classes))
    label = _cap_and_runtime(profile, ram_cap, timm=timm)[2]
    if json:
        import msgspec

        _write(msgspec.json.format(msgspec.json.encode(made), indent=2).decode())
        return
    _show(made, profile, label, images)
    asked = split == "auto" or (split is None and method is MethodName.alast)
    if asked and trained_blocks is None and len(space.splits) > 1:
        typer.echo(f"  {_whether_it_looks(images, epochs)}")


def _whether_it_looks(images: int, epochs: int) -> str:
    """What a run with the split left open does that a plan can't: `prepare.why_not_looked`, as far as it is known here."""
    from edgetune.planner import LEAST_LOOKED_AT, LEAST_PASSES

    if epochs < LEAST_PASSES:
        return f"a run splits as here: looking at its images for a better split pays from {LEAST_PASSES} epochs on"
    if images < LEAST_LOOKED_AT:
        return f"a run splits as here: fewer than {LEAST_LOOKED_AT} images can't say where else"
    return (
        "a run looks at its images first and may split elsewhere, under the same cap "
        "(--split lowest, or --no-pretrained: as here)"
    )


def _shape(model: str, classes: int, image_size: int | None) -> tuple[ViTShape, bool]:
    """From the data that comes with edgetune, else from the model itself; and whether timm has to build it."""
    from edgetune.shapes import known_shape

    shape = known_shape(model, classes, image_size)
    if shape is not None:
        return shape, False
    from edgetune.vit.models import ModelSource, describe, needs_timm

    source = ModelSource(name=model, image_px=image_size)
    return describe(source, classes)[0], needs_timm(source)


def _cap_and_runtime(profile: DeviceProfile, ram_cap: str | None, *, timm: bool) -> tuple[int, int, str]:
    """(cap bytes, runtime bytes, where the runtime's figure comes from)."""
    from edgetune import runtimes
    from edgetune.judge import (
        ASSUMED_RUNTIME_BYTES,
        ASSUMED_TIMM_BYTES,
        default_cap_bytes,
        is_this_machine,
        stated_bytes,
    )

    cap = parse_bytes(ram_cap) if ram_cap else default_cap_bytes(profile)
    stated = profile.runtime.torch
    if is_this_machine(profile):
        found = runtimes.versions(runtimes.TORCH_AND_TIMM if timm else runtimes.TORCH)
        remembered = runtimes.remembered(found)
        if remembered is not None:
            return cap, remembered, f"measured by the last run here: {found}"
    if stated is not None:
        how = "measured" if stated.verified else "stated"
        return cap, stated_bytes(stated, timm=timm), f"{how}: {stated.version}" + (" + timm" if timm else "")
    return (
        cap,
        ASSUMED_RUNTIME_BYTES + (ASSUMED_TIMM_BYTES if timm else 0),
        "a default: this profile has no figure; a run, or `edgetune devices detect --save`, measures one",
    )


def _show(plan: Plan, profile: DeviceProfile, label: str, images: int) -> None:
    from edgetune.planner import parts_of

    typer.echo(f"{plan.model}, {plan.method}, batch {plan.batch_size} on {profile.id}")
    for line in plan.explanation:
        typer.echo(f"  {line}")
    typer.echo("")
    for name, size in parts_of(plan).items():
        cells = round(BAR_CELLS * size / plan.cap_bytes)
        note = f"  {label}" if name == "runtime" else ""
        typer.echo(f"  {name:12s}{format_bytes(size):>10s}  {'#' * cells}{note}")
    used = round(BAR_CELLS * plan.predicted_peak_bytes / plan.cap_bytes)
    bar = "#" * used + "." * max(0, BAR_CELLS - used)
    typer.echo(
        f"  {'peak':12s}{format_bytes(plan.predicted_peak_bytes):>10s}  [{bar}] of {plan.cap_bytes / MIB:.0f} MiB"
    )
    seconds = plan.predicted_step_seconds
    if seconds is None:
        typer.echo("\n  no time is predicted: nobody has this device's speed")
        return
    epoch = f", {format_seconds(seconds * -(-images // plan.batch_size))} an epoch of {images} images"
    typer.echo(f"\n  estimate at the profile's peak FLOP/s: {format_seconds(seconds)} a step{epoch}")


def _fit_table(profiles: list[DeviceProfile], request: object, as_json: bool) -> None:
    from edgetune.planner import format_cap
    from edgetune.planner import plan as make_plan

    rows = []
    for profile in profiles:
        wanted: PlanRequest = request(profile)  # type: ignore[operator]
        row: dict[str, object] = {"device": profile.id, "cap_bytes": wanted.cap_bytes, "fits": True}
        try:
            made = make_plan(wanted)
        except DoesNotFit as refusal:
            row |= {"fits": False, "smallest_cap_bytes": refusal.smallest_cap_bytes}
        else:
            row |= {
                "predicted_peak_bytes": made.predicted_peak_bytes,
                "split_block": made.split_block,
                "trained_blocks": made.trained_blocks,
                "micro_batch": made.micro_batch,
            }
        rows.append(row)
    if as_json:
        _write(json_module.dumps(rows, indent=2))
        return
    typer.echo(f"{'device':24s}{'cap':>11s}{'peak':>11s}  plan")
    for row in rows:
        cap = format_bytes(int(str(row["cap_bytes"])))
        if row["fits"]:
            peak = format_bytes(int(str(row["predicted_peak_bytes"])))
            text = f"{row['trained_blocks']} blocks from {row['split_block']} up, micro-batch {row['micro_batch']}"
        else:
            peak, text = "-", f"does not fit: needs {format_cap(int(str(row['smallest_cap_bytes'])))}"
        typer.echo(f"{row['device']!s:24s}{cap:>11s}{peak:>11s}  {text}")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
