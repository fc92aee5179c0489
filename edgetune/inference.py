"""A run folder in use: evaluate its model on other images, predict classes. The model is loaded as plain timm would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import system
from edgetune.cost import Selection
from edgetune.data import (
    DataFolder,
    Preprocess,
    bundled_sample,
    load_batch,
    load_image,
    open_folder,
    open_for_evaluation,
    prefetch,
)
from edgetune.data.images import shown
from edgetune.errors import BackendUnavailable, DataError, EdgetuneError, RunFolderError
from edgetune.own_images import images_sha256
from edgetune.report import Tally
from edgetune.settings import StoredRun
from edgetune.store import MODEL_FILE, is_imported, read_evaluation_tokens, read_stored


@dataclass(frozen=True)
class LoadedRun:
    """A run's saved model, ready to compute. `logits` takes (B, 3, H, W) and gives (B, classes)."""

    folder: Path
    classes: tuple[str, ...]
    preprocess: Preprocess
    stored: StoredRun
    logits: Callable[[Any], Any]


def load_run(folder: Path, *, threads: int | None = None) -> LoadedRun:
    """Raises: RunFolderError, WeightsError if the folder is no run folder, or damaged; BackendUnavailable without torch."""
    stored = read_stored(folder)
    try:
        import torch

        from edgetune.vit.loop import forward
        from edgetune.vit.models import load_saved
    except ImportError as error:
        raise BackendUnavailable(f"this needs torch and timm ({error}): pip install 'edgetune[torch]'") from error
    torch.set_num_threads(threads or system.usable_cores())
    model = load_saved(folder, folder / MODEL_FILE, classes=len(stored.classes))
    found = read_evaluation_tokens(folder)
    tokens, score = found or (None, None)
    if tokens is not None and (len(tokens) != len(model.blocks) or tokens[0] != model.patch_embed.num_patches):
        raise RunFolderError(f"{folder}/config.json is damaged: it names tokens of another model.")

    def logits(inputs: Any) -> Any:
        with torch.inference_mode():
            if tokens is None:
                return model(torch.from_numpy(inputs)).numpy()
            selection = Selection((False,) * len(tokens), tokens)
            return forward(model, torch.from_numpy(inputs), selection, score=score or "attention")[0].numpy()

    return LoadedRun(folder, stored.classes, stored.preprocess, stored, logits)


def evaluate(
    run: LoadedRun, data: Path | None, *, batch_size: int, note: Callable[[str], object], max_bad: float = 0.01
) -> dict[str, Any]:
    """Scores on `data` (its val/, or its class folders), or on the run's own validation images.

    Raises: DataError for images that can't be used, or classes the model does not know.
    """
    if data is not None:
        found = open_for_evaluation(data, run.classes, preprocess=run.preprocess, max_bad=max_bad)
    else:
        found = _own_images(run, note)
    for text in found.notes:
        note(text)
    images, tally = found.val, Tally(len(run.classes))

    def batches() -> Iterator[Any]:
        for start in range(0, len(images.paths), batch_size):
            indices = range(start, min(start + batch_size, len(images.paths)))
            yield load_batch(images, indices, run.preprocess, seed=0, epoch=0)

    with closing(prefetch(batches())) as source:
        for inputs, labels in source:
            tally.add(run.logits(inputs), labels)
    scores = tally.scores()
    return {
        "images": scores.images,
        "accuracy": scores.accuracy,
        "balanced_accuracy": scores.balanced_accuracy,
        "loss": scores.loss,
        "topk_accuracy": scores.topk_accuracy,
        "topk": scores.topk,
        "recall": dict(zip(run.classes, scores.recall, strict=True)),
        "bad_images": [{"path": bad.path, "reason": bad.reason} for bad in found.bad],
    }


def _own_images(run: LoadedRun, note: Callable[[str], object]) -> DataFolder:
    """The images that the run validated on, split as it did. Raises: DataError, for a model without images of its own too."""
    if is_imported(run.stored):
        raise DataError(
            f"{run.folder} holds a model that another device trained, without its images. Name images with --data."
        )
    settings = run.stored.settings
    found = open_folder(
        settings.data or bundled_sample(),
        seed=settings.seed,
        val_share=settings.val_share,
        preprocess=run.preprocess,
        max_bad=1.0,
    )
    if found.classes != run.classes:
        raise DataError("the run's images have other classes now than it was trained on. Name images with --data.")
    if images_sha256(found) != run.stored.images_sha256:
        note("warning: the images have changed since the run; some of these may have been trained on")
    return found


def predict(run: LoadedRun, images: Sequence[Path], *, top: int) -> Iterable[dict[str, Any]]:
    """For each image its most probable classes; one that can't be read gets `error` instead, and the others go on."""
    for path in images:
        try:
            inputs = load_image(path, run.preprocess)[None]
        except EdgetuneError as error:
            yield {"image": str(path), "error": str(error)}
            continue
        logits = run.logits(inputs)
        if not np.isfinite(logits).all():
            yield {"image": str(path), "error": f"{shown(str(path))}: the model's output is no finite number"}
            continue
        probabilities = softmax(logits)[0]
        order = np.argsort(-probabilities)[:top]
        yield {
            "image": str(path),
            "classes": [{"class": run.classes[index], "probability": float(probabilities[index])} for index in order],
        }


def softmax(logits: Any) -> Any:
    """(B, classes) -> probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)
