"""What decides a feature: the key of a store (all but the image) and the id of an entry (the image)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
ID_BYTES = 16
_FOLDER_DIGITS = 16


class FeatureKey(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the image that decides the features: a store of another key is another store."""

    format_version: int = FORMAT_VERSION
    # Of the prefix's weights, names and shapes included: see `weights_sha256`.
    weights_sha256: str
    architecture: str
    split_block: int
    # Patch tokens that each block of the prefix sees, and at the end the count that is stored.
    tokens: tuple[int, ...]
    # By what they are ranked where some are dropped; the same for all where none is.
    token_score: str = "attention"
    # Only what the head reads.
    pooled: bool
    # The preprocessing in builtins, decode rules included.
    preprocess: dict[str, object]
    precision: Literal["float16", "float32"]
    # Shape of an entry: (stored_tokens, width).
    stored_tokens: int
    width: int

    def __post_init__(self) -> None:
        if self.stored_tokens < 1 or self.width < 1:
            raise ValueError(f"an entry has at least one value, not {self.stored_tokens} x {self.width}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values on disk: little-endian on every machine."""
        return np.dtype("<f2" if self.precision == "float16" else "<f4")

    @property
    def entry_bytes(self) -> int:
        """The values of one image, without its id and checksum (20 bytes)."""
        return self.stored_tokens * self.width * self.dtype.itemsize

    def sha256(self) -> bytes:
        """32 bytes over all fields; the order in which `preprocess` names its own does not matter."""
        return hashlib.sha256(json.dumps(msgspec.to_builtins(self), sort_keys=True).encode()).digest()

    def folder_name(self) -> str:
        return self.sha256().hex()[:_FOLDER_DIGITS]

    def as_text(self) -> bytes:
        """JSON for whoever looks into the folder."""
        return json.dumps(msgspec.to_builtins(self), sort_keys=True, indent=2).encode() + b"\n"


def entry_id(image_digest: str, variant: str = "") -> bytes:
    """16 bytes for an image's contents; `variant` names one of its fixed augmented views."""
    # JSON keeps ("ab", "c") and ("a", "bc") apart.
    return hashlib.blake2b(json.dumps([image_digest, variant]).encode(), digest_size=ID_BYTES).digest()


def weights_sha256(named_arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    """Over names, shapes, types and bytes, in the order given; holds one array at a time."""
    digest = hashlib.sha256()
    for name, array in named_arrays:
        digest.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
