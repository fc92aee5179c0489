"""The hub: which file holds a model's pretrained weights, from its cache or over the network. Loading it is not done here."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HUB_TIMEOUT_SECONDS = 5.0
# What timm looks for first, and its safe form where that is not just another suffix (timm.models._hub).
WEIGHTS_NAME = "pytorch_model.bin"
SAFE_NAMES = {WEIGHTS_NAME: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


def pretrained_file(config: Mapping[str, Any]) -> Path:
    """The file that timm would load for a `pretrained_cfg`, downloaded if it is in no cache.

    Raises: LookupError if it names none; whatever the hub's client does.
    """
    hub_id, file, url = (config.get(key) for key in ("hf_hub_id", "file", "url"))
    if file and config.get("source") != "hf-hub":
        return Path(file)
    if hub_id:
        return _hub_file(hub_id, config.get("hf_hub_filename") or WEIGHTS_NAME)
    if not url:
        raise LookupError(f"there are none of {config.get('architecture', 'this model')}")
    from timm.models._hub import download_cached_file

    return Path(download_cached_file(url, check_hash=False))


def _hub_file(hub_id: str, filename: str) -> Path:
    """A repository's file of weights, in its safe form where it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    if filename.endswith(".bin"):
        safe_name = SAFE_NAMES.get(filename, f"{filename.removesuffix('.bin')}.safetensors")
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(repository, safe_name, revision=revision or None))
    return Path(hf_hub_download(repository, filename, revision=revision or None))


@contextmanager
def hub_errors_at_once() -> Iterator[None]:
    """Without a network the hub's client retries for most of a minute: see first whether its host answers."""
    import huggingface_hub.constants as hub
    from huggingface_hub.utils import logging as hub_logging

    offline, verbosity = hub.HF_HUB_OFFLINE, hub_logging.get_verbosity()
    host = hub.ENDPOINT.split("://", 1)[-1].split("/", 1)[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=HUB_TIMEOUT_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True  # files already in its cache still load
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        hub_logging.set_verbosity(verbosity)
