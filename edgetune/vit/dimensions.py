"""What a tensor's bytes grow with, told by its size: the counts that are unknown are large primes. Pure."""

from __future__ import annotations

from edgetune.cost.probed import Bytes

# On the meta device tensors take no memory, so that these can be as large as 64 bits allow for a pair of tokens. What is
# left of tokens without up to 16 prefix tokens has a prime factor above 500 too, as no model's width has.
IMAGES, CLASSES = 10007, 20011
TOKENS, LEAVING = 1000423, 500363


class Dimensions:
    """The sizes that are unknown: images, all tokens, those that leave, each with and without prefix tokens."""

    def __init__(self, prefix_tokens: int, images: int = IMAGES) -> None:
        self.prefix_tokens, self.images = prefix_tokens, images
        self._found: dict[int, Bytes] = {}
        token = Bytes(token=1), Bytes(leaving=1)
        self._tokens = [
            (size - without, unit, without)
            for size, unit in zip((TOKENS, LEAVING), token, strict=True)
            for without in {0, prefix_tokens}
        ]

    def bytes_of(self, size: int) -> Bytes:
        """A tensor's bytes, by what they grow with."""
        found = self._found.get(size)
        if found is None:
            found = self._found[size] = self._split(size)
        return found

    def _split(self, size: int) -> Bytes:
        image = size % self.images == 0 and size > 0
        size //= self.images if image else 1
        if size and size % CLASSES == 0:
            size //= CLASSES
            return Bytes(logits=size) if image else Bytes(classes=size)
        counts: list[tuple[Bytes, int]] = []
        for dimension, unit, without in self._tokens:
            while size and size % dimension == 0:
                size //= dimension
                counts.append((unit, without))
        if not counts:
            return Bytes(image=size) if image else Bytes(once=size)
        if len(counts) > 1:
            # A pair of tokens: prefix tokens that are not among them are a few of a thousand.
            return Bytes(pair=size)
        ((unit, without),) = counts
        found = Bytes(*(size * each for each in unit))
        return found._replace(image=-size * without)
