"""What the frozen prefix outputs for each image, on disk: computed once, read back while its memory stays the same.

numpy and files only: this room knows neither the model nor the data set, just a key, ids and arrays.
"""

from edgetune.errors import FeaturesDamaged, FeaturesOverflow
from edgetune.features.chunks import CHUNK_BYTES
from edgetune.features.keys import FORMAT_VERSION, FeatureKey, entry_id, weights_sha256
from edgetune.features.looked import LookedFeatures
from edgetune.features.store import FeatureStore

__all__ = [
    "CHUNK_BYTES",
    "FORMAT_VERSION",
    "FeatureKey",
    "FeatureStore",
    "FeaturesDamaged",
    "FeaturesOverflow",
    "LookedFeatures",
    "entry_id",
    "weights_sha256",
]
