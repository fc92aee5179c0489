"""Option types that several commands share."""

from __future__ import annotations

from enum import Enum

from edgetune.errors import UsageError


class MethodName(str, Enum):
    full = "full"
    head = "head"
    last_k = "last-k"
    random_k = "random-k"
    alast = "alast"


class OptimizerChoice(str, Enum):
    adamw = "adamw"
    momentum = "momentum"
    sgd = "sgd"


def parse_split(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--split takes `auto` or a block's number, not {text!r}.")
    return int(text)
