"""The classifier first: fitted to what the pretrained model puts out, before anything else trains.

A classifier at random values sends random gradients into blocks that know something, and the first epochs go on undoing
that. Source: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv
2202.10054 (linear probing, then fine-tuning). Here the fit is in closed form, from one pass over a sample of the images.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

import numpy as np
import numpy.typing as npt

from edgetune.caching import cached_blocks, one_pass
from edgetune.data import balanced_sample
from edgetune.job import Job
from edgetune.planner import pruned_tokens
from edgetune.probes import RidgeClassifier
from edgetune.replay import smaller_batches, within_memory

MOST_IMAGES = 2000
# Of the images that the run sees, at most such a share is looked at.
MOST_OF_RUN = 0.25


def fit_head(job: Job) -> None:
    """Set the classifier to the best linear one on what the model, as the plan runs it, puts out for the training images:
    a model that is of use before anything else trains, `job.starts_fitted`.

    Raises: Interruption, NoMemory.
    """
    if job.state.step or not job.settings.fits_head:
        return
    seen = job.total_steps * job.plan.batch_size
    most = min(MOST_IMAGES, int(MOST_OF_RUN * seen))
    if most < 2 * job.classes or not job.backend.has_linear_head:
        return
    places = balanced_sample(job.train_images.labels, job.settings.seed, most)
    job.enter_phase("head")
    work, lighter = partial(_fit, job, places), partial(smaller_batches, job, "evaluation_batch", len(places))
    within_memory(job, "fitting the classifier", work, lambda: None, lighter)
    job.enter_phase("train")


def _fit(job: Job, places: npt.NDArray[np.int64]) -> None:
    tokens = pruned_tokens(job.plan) or (job.plan.token_ceiling[0],) * job.shape.depth
    fit: RidgeClassifier | None = None
    with closing(one_pass(job, job.train_images, places, "train", "fit the classifier")) as batches:
        for inputs, labels in batches:
            features = job.backend.head_inputs(inputs, cached_blocks(job), tokens)
            fit = fit or RidgeClassifier(features.shape[1], job.classes)
            fit.add(features, labels)
    assert fit is not None
    found = fit.fitted()
    if not (np.isfinite(found.weight).all() and np.isfinite(found.bias).all()):
        return
    job.backend.set_head(found.weight, found.bias)
    job.starts_fitted = True
    job.listener.note(
        f"classifier first: fitted to {len(places)} training images as the pretrained model sees them, it tells "
        f"{found.told_right:.1%} of those left out"
    )
