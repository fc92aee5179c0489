"""`edgetune evaluate` and `edgetune predict`: what one does with a run folder afterwards."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

SCORES = (("accuracy", "accuracy"), ("balanced", "balanced_accuracy"), ("loss", "loss"))
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else there.")]
_Batch = Annotated[int, typer.Option("--batch-size", "-b", min=1, max=4096, help="Images at once.")]
_Threads = Annotated[int | None, typer.Option("--threads", min=1, max=1024, help="CPU threads.", show_default=False)]


def evaluate(
    run: _Run,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="val/ in it, or its class folders. Default: the run's own.", show_default=False),
    ] = None,
    max_bad: Annotated[
        float, typer.Option("--max-bad", min=0.0, max=1.0, help="Share of unreadable images that is skipped.")
    ] = 0.01,
    batch_size: _Batch = 16,
    threads: _Threads = None,
    json: _Json = False,
) -> None:
    """Accuracy of a run's saved model on a folder of labelled images."""
    from edgetune.inference import evaluate as evaluate_run
    from edgetune.inference import load_run

    loaded = load_run(run, threads=threads)
    result = evaluate_run(loaded, data, batch_size=batch_size, note=_note, max_bad=max_bad)
    if json:
        _print_json(result)
        return
    scores = [f"{name} {_number(result[key])}" for name, key in SCORES]
    _print(f"{'  '.join(scores)}  on {result['images']} images")
    for name, share in result["recall"].items():
        _print(f"  {name:24s} {'not known' if share is None else f'{share:.1%}'}")


def predict(
    run: _Run,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option("--top", min=1, help="Classes shown for each image.")] = 5,
    threads: _Threads = None,
    json: _Json = False,
) -> None:
    """Classes of images, with probabilities, from a run's saved model."""
    from edgetune.data.images import shown as printable_name
    from edgetune.inference import load_run
    from edgetune.inference import predict as predict_images

    loaded = load_run(run, threads=threads)
    results, failed = [], 0
    for result in predict_images(loaded, images, top=top):
        if "error" in result:
            failed += 1
            _note(f"edgetune: {result['error']}")
        if json:
            results.append(result)
        elif "classes" in result:
            shown = "  ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in result["classes"])
            _print(f"{printable_name(result['image'])}  {shown}")
    if json:
        _print_json(results)
    if failed:
        raise typer.Exit(1)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _print(text: str) -> None:
    from edgetune.cli.progress import printable

    typer.echo(printable(text, sys.stdout.encoding))


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _print_json(value: object) -> None:
    sys.stdout.write(json_module.dumps(value, indent=2, ensure_ascii=True) + "\n")
