"""`edgetune export` and `edgetune import-params`: to a device without torch (a browser too), and back."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.errors import BackendUnavailable, UsageError
from edgetune.units import parse_bytes

if TYPE_CHECKING:
    from edgetune.profiles import DeviceProfile

# The schedule of runtimes that can't be told a rate, where nobody says how long they will train.
DEFAULT_STEPS = 500
WARMUP_SHARE = 0.1


class Format(str, Enum):
    ort = "ort"
    onnx = "onnx"


def _option(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, **more)


def export(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder; else --model.", show_default=False)
    ] = None,
    output: Annotated[Path | None, _option("--output", "-o", help="Folder (ort) or file (onnx) to write.")] = None,
    format: Annotated[
        Format, typer.Option("--format", help="Training artifacts for ONNX Runtime, or an inference model.")
    ] = Format.ort,
    model: Annotated[str | None, _option("--model", help="timm name, edgetune_micro, or local-dir:FOLDER.")] = None,
    weights: Annotated[Path | None, _option("--weights", help="Pretrained weights; default: timm's hub.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Or start at random.")] = True,
    image_size: Annotated[int | None, _option("--image-size", "--img-size", min=1, max=4096, help="Pixels.")] = None,
    classes: Annotated[
        int | None, _option("--classes", min=2, max=1_000_000, help="So many classes, named on the device.")
    ] = None,
    data: Annotated[Path | None, _option("--data", help="Take the classes from this folder of images.")] = None,
    device: Annotated[str | None, _option("--device", help="Leave out variants that don't fit this device.")] = None,
    ram_cap: Annotated[str | None, _option("--ram-cap", help="RAM cap in place of the device's.")] = None,
    split: Annotated[
        str | None,
        _option("--split", help="Blocks to cut at, as 4,8. Default: all, the upper 8, 4 and 2 blocks, the head."),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="One variant more, for --method full.")
    ] = False,
    lr: Annotated[
        float, typer.Option("--lr", min=1e-9, max=100.0, help="Peak of the schedule that is built in.")
    ] = 1e-3,
    steps: Annotated[int, typer.Option("--steps", min=1, max=10**9, help="Its length.")] = DEFAULT_STEPS,
    warmup_steps: Annotated[
        int | None, _option("--warmup-steps", min=0, max=10**9, help="Its linear start; default: a tenth.")
    ] = None,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, max=10.0, help="Of AdamW's graph.")] = 0.05,
    web: Annotated[
        Path | None, _option("--web", help="Folder for the artifacts and a page that trains from them.")
    ] = None,
    ort_web: Annotated[Path | None, _option("--ort-web", help="Where npm put onnxruntime-web, for the page.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Don't compare with torch afterwards.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a new classifier's weights.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 1,
) -> None:
    """Training artifacts for a device without torch, from a run or from a pretrained model."""
    runtime = _page_runtime(web, ort_web, output, format)
    if web is not None and (run, model, classes, data) == (None, None, None, None):
        _write_page(web, device, ram_cap, runtime)  # beside artifacts that are there
        return
    output = web if output is None else output
    _check(run, output, model, weights, classes, data, format)
    assert output is not None
    if format is Format.onnx:
        from edgetune.export.inference import export_inference

        assert run is not None
        _note(export_inference(run, output))
        return
    from edgetune.artifacts.manifest import Schedule
    from edgetune.export.build import ExportRequest
    from edgetune.export.command import export as export_artifacts
    from edgetune.export.command import model_of_run

    found = model_of_run(run) if run is not None else _from_scratch(model or "deit_tiny_patch16_224", classes, data)
    request = ExportRequest(
        model=found[0],
        class_count=found[1],
        classes=found[2],
        weights=None if weights is None else str(weights.expanduser().absolute()),
        pretrained=pretrained,
        image_px=image_size,
        splits=None if split is None else _splits(split),
        embeddings_train=embeddings,
        weight_decay=weight_decay,
        schedule=Schedule(
            peak_rate=lr,
            warmup_steps=round(WARMUP_SHARE * steps) if warmup_steps is None else min(warmup_steps, steps),
            total_steps=steps,
        ),
        seed=seed,
        threads=threads,
        verify=not no_verify,
    )
    room = _room_bytes(device, ram_cap)
    for note in _device_notes(device):
        _note(note)
    manifest = export_artifacts(request, output, room_bytes=room, note=_note)
    for variant in manifest.variants:
        _print(_row(variant))
    _print(f"artifacts: {output}")
    _print(f"train from them, without torch: edgetune finetune --backend ort --artifacts {output} --data DIR")
    if web is not None:
        _write_page(web, device, ram_cap, runtime)


def _page_runtime(web: Path | None, ort_web: Path | None, output: Path | None, format: Format) -> Path | None:
    """Where the page's runtime is, looked at before anything is exported."""
    if web is None:
        if ort_web is not None:
            raise UsageError("--ort-web is for the page: name its folder with --web DIR.")
        return None
    if output is not None or format is not Format.ort:
        raise UsageError("--web DIR holds the artifacts (--format ort) and the page: leave --output out.")
    if ort_web is None:
        return None
    from edgetune.artifacts.manifest import RUNTIME_VERSION
    from edgetune.web.folder import find_runtime

    return find_runtime(ort_web, RUNTIME_VERSION)


def _write_page(folder: Path, device: str | None, ram_cap: str | None, runtime: Path | None) -> None:
    from edgetune.artifacts.reading import read_manifest
    from edgetune.web.folder import PageSettings, has_runtime, npm_line, write_page

    manifest = read_manifest(folder)
    cap, profile = _cap(device, ram_cap) or (None, None)
    name = profile.name if device and profile else None
    write_page(folder, manifest, PageSettings(cap_bytes=cap, device=name), runtime)
    if not has_runtime(folder):
        _print("the page lacks its runtime, three files of an npm package. Get and add them with:")
        _print(f"  {npm_line(manifest.runtime)}")
        _print(f"  edgetune export --web {folder} --ort-web ort-web" + _again(device, ram_cap))
    _print(f"page: edgetune serve {folder}")


def _again(device: str | None, ram_cap: str | None) -> str:
    return "".join(f" {flag} {value}" for flag, value in (("--device", device), ("--ram-cap", ram_cap)) if value)


def _check(
    run: Path | None,
    output: Path | None,
    model: str | None,
    weights: Path | None,
    classes: int | None,
    data: Path | None,
    format: Format,
) -> None:
    if output is None:
        raise UsageError("--output names what to write: edgetune export ... --output FOLDER.")
    if run is not None and (model, weights, classes, data) != (None, None, None, None):
        raise UsageError("a run has its model and its classes: leave --model, --weights, --classes and --data out.")
    if run is None and format is Format.onnx:
        raise UsageError("--format onnx exports a run's model: edgetune export RUN --format onnx --output FILE.")
    if run is None and (classes is None) == (data is None):
        raise UsageError("without a run, either --classes N or --data DIR says what the classes are.")
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"exporting needs torch, timm and onnx ({error}). Install them with: pip install 'edgetune[export]'"
        ) from error


def _from_scratch(model: str, classes: int | None, data: Path | None) -> tuple[str, int, tuple[str, ...]]:
    if data is None:
        assert classes is not None
        return model, classes, ()
    from edgetune.data import class_names

    names = class_names(data)
    return model, len(names), names


def _splits(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--split takes blocks' numbers, as 4,8, not {text!r}.")
    return tuple(sorted({int(part) for part in parts}))


def _room_bytes(device: str | None, ram_cap: str | None) -> int | None:
    """What a device has for training beside the runtime; None where nobody named a device or a cap."""
    if (found := _cap(device, ram_cap)) is None:
        return None
    from edgetune.judge import ASSUMED_ORT_BYTES, stated_runtime

    cap, profile = found
    stated = stated_runtime(profile, "ort")
    return cap - (ASSUMED_ORT_BYTES if stated is None else stated.bytes)


def _device_notes(device: str | None) -> list[str]:
    """What a device's profile leaves unsaid that a run from artifacts would want to know."""
    if device is None:
        return []
    from edgetune import devices
    from edgetune.judge import ASSUMED_ORT_BYTES, is_this_machine, stated_runtime
    from edgetune.units import format_bytes

    profile = devices.find_device(device)
    if is_this_machine(profile) or stated_runtime(profile, "ort") is not None:
        return []
    return [
        f"note: {profile.id} states no runtime for ONNX Runtime ([runtime.ort] in its profile): {format_bytes(ASSUMED_ORT_BYTES)} "
        f"are taken for it, as on x86. `finetune --backend ort --device {device}` simulates no such device; on the device itself "
        "train with --device auto."
    ]


def _cap(device: str | None, ram_cap: str | None) -> tuple[int, DeviceProfile] | None:
    """(the cap that was named, the device); None where nobody named a device or a cap."""
    if device is None and ram_cap is None:
        return None
    from edgetune import devices
    from edgetune.judge import default_cap_bytes

    profile = devices.find_device(device or devices.AUTO)
    return parse_bytes(ram_cap) if ram_cap else default_cap_bytes(profile, "ort"), profile


def _row(variant: Any) -> str:
    from edgetune.units import format_bytes

    parts = [f"  {variant.name:10s} from block {variant.split_block} up"]
    if variant.measured is not None:
        largest = max(variant.measured.train, key=lambda point: point.bytes)
        parts.append(f"a step of {largest.batch} images takes {format_bytes(largest.bytes)} above the runtime")
    return ", ".join(parts)


def import_params(
    buffer: Annotated[Path, typer.Argument(metavar="BUFFER", help="The flat float32 file.", show_default=False)],
    artifacts: Annotated[Path, _option("--artifacts", help="The folder that was trained from.")],
    output: Annotated[Path, _option("--output", "-o", help="Run folder to write; new or empty.")],
    variant: Annotated[str | None, _option("--variant", help="Which; default: the one of that size.")] = None,
    labels: Annotated[Path | None, _option("--labels", help="Names of the classes, one a line.")] = None,
) -> None:
    """A run folder from the parameters that a phone or a page hands back."""
    from edgetune.export.returned import import_run

    for line in import_run(buffer, artifacts, output, variant, labels):
        _print(line)


def _print(text: str) -> None:
    from edgetune.cli.progress import printable

    typer.echo(printable(text, sys.stdout.encoding))


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
