"""Real data in: image folders, one preprocessing for every backend, batches in an order that needs no state, the
sample.

Imports neither torch nor timm (`timm_augment` does, when it is called).
"""

from edgetune.data.batches import Transform, load_batch, prefetch, timm_augment
from edgetune.data.draws import balanced_sample, epoch_order, flip_draw, stratified_split
from edgetune.data.folders import (
    BadImage,
    DataFolder,
    ImageSet,
    class_names,
    class_weights,
    open_folder,
    open_for_evaluation,
    some,
)
from edgetune.data.images import (
    ImageHeader,
    UnreadableImage,
    decode_bytes,
    load_image,
    open_rgb,
    peak_decode_bytes,
    shown,
)
from edgetune.data.pictures import Pictures
from edgetune.data.preprocess import Preprocess, normalise, resize_and_crop
from edgetune.data.sample import bundled_sample

__all__ = [
    "BadImage",
    "DataFolder",
    "ImageHeader",
    "ImageSet",
    "Pictures",
    "Preprocess",
    "Transform",
    "UnreadableImage",
    "balanced_sample",
    "bundled_sample",
    "class_names",
    "class_weights",
    "decode_bytes",
    "epoch_order",
    "flip_draw",
    "load_batch",
    "load_image",
    "normalise",
    "open_folder",
    "open_for_evaluation",
    "open_rgb",
    "peak_decode_bytes",
    "prefetch",
    "resize_and_crop",
    "shown",
    "some",
    "stratified_split",
    "timm_augment",
]
