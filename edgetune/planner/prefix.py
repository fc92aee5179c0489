"""Whether a run reads what its frozen prefix puts out from a cache, and what that takes on disk. Pure.

Below the lowest block that may ever train nothing changes, so what it puts out for an image is computed once. It pays as
soon as an image is seen more often than it has views; then the prefix's weights leave memory too, where all fits on disk.
"""

from __future__ import annotations

import msgspec

from edgetune.cost import ViTShape, feature_tokens
from edgetune.planner.values import CachedPrefix, CacheRequest, Lossy, PlanRequest


def lowest_block(lossy: Lossy, cache: CacheRequest) -> int:
    """How many blocks the cache stands for: those below the split, or those of the cache that there is already."""
    if lossy.embeddings_train:
        return 0
    return lossy.split_block if cache.blocks is None else min(cache.blocks, lossy.split_block)


def cached_prefix(request: PlanRequest, lossy: Lossy) -> CachedPrefix | None:
    """The cache of a run that makes these choices; None where there is none to make, or it does not pay."""
    cache = request.cache
    if cache is None:
        return None
    blocks = lowest_block(lossy, cache)
    if blocks == 0 or not (cache.asked or pays(request, cache)):
        return None
    shape = request.shape
    pooled = blocks == shape.depth and reads_class_token(shape)
    tokens = lossy.token_ceiling[blocks] if blocks < shape.depth else shape.patch_tokens
    stored = feature_tokens(shape, tokens, pooled=pooled)
    evaluated = feature_tokens(shape, shape.patch_tokens, pooled=pooled)
    train = cache.train_images * cache.views * entry_bytes(stored, shape.width, cache.float_bytes)
    val = cache.val_images * entry_bytes(evaluated, shape.width, cache.float_bytes)
    if stored < evaluated:  # evaluated on all tokens, and as trained
        val += cache.val_images * entry_bytes(stored, shape.width, cache.float_bytes)
    return CachedPrefix(
        blocks=blocks,
        pooled=pooled,
        patch_tokens=tokens,
        stored_tokens=stored,
        width=shape.width,
        float_bytes=cache.float_bytes,
        views=cache.views,
        train_bytes=train,
        val_bytes=val,
        whole=cache.limit_bytes is None or train + val <= cache.limit_bytes,
    )


def pays(request: PlanRequest, cache: CacheRequest) -> bool:
    """Whether images are seen more often than they are put through the prefix for the cache."""
    return images_seen(request, cache) > cache.train_images * cache.views


def images_seen(request: PlanRequest, cache: CacheRequest) -> int:
    """Over the whole run, each as often as it is seen: the last batch of an epoch may be a short one."""
    epochs, steps = divmod(cache.steps, -(-cache.train_images // request.batch_size))
    return epochs * cache.train_images + min(steps * request.batch_size, cache.train_images)


def entry_bytes(tokens: int, width: int, float_bytes: int) -> int:
    """One image in a cache file: its values, its name and its checksum."""
    return tokens * width * float_bytes + ENTRY_OVERHEAD_BYTES


# 16 bytes that name the image and 4 of checksum; a chunk's own header is some hundred bytes for hundreds of images.
ENTRY_OVERHEAD_BYTES = 24


def reads_class_token(shape: ViTShape) -> bool:
    """Whether the head reads prefix tokens alone: then they are all of an image that a head needs."""
    return shape.class_token and shape.token_pool


def why_not(request: PlanRequest, lossy: Lossy) -> str | None:
    """Why nothing is cached, in words; None where something is, or nobody would expect it."""
    cache = request.cache
    if cache is None:
        return request.no_cache_because
    if lowest_block(lossy, cache) == 0:
        return "the lowest block may train, so nothing below it stays as it is"
    if cached_prefix(request, lossy) is None:
        seen = "once" if cache.views == 1 else f"no more often than it has views ({cache.views})"
        return f"each image is seen {seen}"
    return None


def pinned(request: PlanRequest, prefix: CachedPrefix | None) -> PlanRequest:
    """The request of a run whose cache is there: a later plan stands on the same one, whole or not."""
    if request.cache is None or prefix is None:
        return msgspec.structs.replace(request, cache=None)
    limit = None if prefix.whole else 0
    cache = msgspec.structs.replace(request.cache, blocks=prefix.blocks, limit_bytes=limit, asked=True)
    return msgspec.structs.replace(request, cache=cache)


# Fixed augmented views of an image, where nobody says how many. One would be no augmentation at all.
LEAST_VIEWS, MAX_VIEWS = 2, 8


def views_that_fit(request: PlanRequest, cache: CacheRequest) -> tuple[int, str | None]:
    """How many fixed views of each image are worth a cache: half as many as an image is seen, so that each comes twice, at
    most MAX_VIEWS, as far as the limit has room. And why, in words, where these are fewer than LEAST_VIEWS.
    """
    shape = request.shape
    each = entry_bytes(shape.all_tokens, shape.width, cache.float_bytes)
    seen = images_seen(request, cache) // cache.train_images
    views, few = min(MAX_VIEWS, seen // 2), f"views pay from {2 * LEAST_VIEWS} passes over the images on"
    if cache.limit_bytes is not None:
        room = max(0, cache.limit_bytes - cache.val_images * each) // (cache.train_images * each)
        if room < LEAST_VIEWS <= views:
            few = f"the cache has no room for {LEAST_VIEWS} views of each image"
        views = min(views, room)
    return views, few if views < LEAST_VIEWS else None
