"""The step that does not fit, on edgetune's backend but with nothing that watches or bounds it: the kernel has to end it."""

from __future__ import annotations

import sys

import numpy as np

from edgetune.backends.pytorch import TorchBackend, own_kernels
from edgetune.cost import all_tokens_kept
from edgetune.optim import OptimizerSettings
from edgetune.vit.models import ModelSource, describe, load_model


def main(batch: int) -> None:
    own_kernels()
    source = ModelSource(name="edgetune_micro")
    shape, preprocess = describe(source, 10)
    backend = TorchBackend(load_model(source, 10).model, OptimizerSettings())
    images = np.zeros((batch, 3, preprocess.height_px, preprocess.width_px), np.float32)
    backend.step(
        [(images, np.zeros(batch, np.int64))],
        all_tokens_kept(shape, (True,) * shape.depth, embeddings_train=True),
        images=batch,
        weight_sum=float(batch),
        learning_rate=1e-4,
        seed=0,
        with_deltas=False,
    )
    print("the step was done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
