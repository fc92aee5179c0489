"""The classifier first: fitted to what the pretrained model puts out, before anything else trains.

A classifier at random values sends random gradients into blocks that know something, and the first epochs go on undoing
that. Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv
2202.10054 (linear probing, then fine-tuning). Here the fit is in closed form, from one pass over a sample of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.caching import Loaded, completed, load
from edgetune.data import balanced_sample, prefetch
from edgetune.job import Interruption, Job
from edgetune.planner import Plan
from edgetune.probes import RidgeClassifier
from edgetune.replay import Tightened, tighter_steps, within_memory

MOST_IMAGES = 2000
# Of the images that the run sees, at most such a share is looked at.
MOST_OF_RUN = 0.25


def fit_head(job: Job) -> None:
    """Set the classifier to the best linear one on what the model, as the plan runs it, puts out for the training images.

    Raises: Interruption, NoMemory.
    """
    if job.state.step or not job.settings.fits_head:
        return
    seen = job.total_steps * job.plan.batch_size
    most = min(MOST_IMAGES, int(MOST_OF_RUN * seen))
    places = balanced_sample(job.train_images.labels, job.settings.seed, most)
    if most < 2 * job.classes or not job.backend.has_linear_head:
        return
    job.enter_phase("head")
    work = partial(_fit, job, places)
    within_memory(job, "fitting the classifier", work, lambda: None, partial(_lighter, job))
    job.enter_phase("train")


def _fit(job: Job, places: npt.NDArray[np.int64]) -> None:
    size, tokens = job.plan.evaluation_batch, tokens_as_trained(job.plan)
    prefix = job.plan.prefix if job.features is not None else None
    cached = 0 if prefix is None else prefix.blocks
    fit: RidgeClassifier | None = None

    def batches() -> Iterator[Loaded]:
        for start in range(0, len(places), size):
            yield load(job, job.train_images, places[start : start + size], 0, "train")

    with closing(prefetch(batches(), depth=int(job.plan.overlaps and job.transform is None))) as source:
        for number, loaded in enumerate(source):
            if job.stop.is_set():
                raise Interruption
            inputs, labels = completed(job, loaded, "train")
            features = job.backend.head_inputs(inputs, cached, tokens)
            fit = fit or RidgeClassifier(features.shape[1], job.classes)
            fit.add(features, labels)
            job.listener.progress("fit the classifier", min((number + 1) * size, len(places)), len(places))
    assert fit is not None
    found = fit.fitted()
    if not (np.isfinite(found.weight).all() and np.isfinite(found.bias).all()):
        return
    job.backend.set_head(found.weight, found.bias)
    job.listener.note(
        f"classifier first: fitted to {len(places)} training images as the pretrained model sees them, it tells "
        f"{found.told_right:.1%} of those left out"
    )


def tokens_as_trained(plan: Plan) -> tuple[int, ...]:
    """Patch tokens that each block sees when nothing is dropped but at the split."""
    depth, split = len(plan.token_ceiling), plan.split_block
    entering = plan.token_ceiling[min(split, depth - 1)]
    return (*plan.token_ceiling[:split], *(entering,) * (depth - split))


def _lighter(job: Job, current: Plan) -> Tightened:
    """A quarter of the images at once."""
    if current.evaluation_batch == 1:
        return tighter_steps(job)(current)
    size = -(-current.evaluation_batch // 4)
    return Tightened(msgspec.structs.replace(current, evaluation_batch=size), f"in batches of {size}")
