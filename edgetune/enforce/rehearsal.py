"""Allocations that fail on purpose, before memory is short."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

# 4 EiB as float32: no machine maps that, whatever its overcommit rule.
_ELEMENTS = 2**60


def rehearse() -> None:
    """Let torch, where it is loaded, run out of memory in what a training step calls.

    Raising and unwinding reads tables of torch's own files: 5.5 MiB that the first failure would add to the process at
    the worst moment, uncounted by RLIMIT_DATA (torch 2.14, x86). Done with the warm-up, they are part of the runtime.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    functional = torch.nn.functional
    many = torch.ones(1).expand(_ELEMENTS)  # one number; a result of this size is what can't be had

    class Failing(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, tokens: Any) -> Any:
            return tokens.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return many.clone()

    attempts = (
        many.clone,
        lambda: many.softmax(0),
        lambda: functional.gelu(many),
        lambda: functional.layer_norm(torch.ones(1).expand(_ELEMENTS // 8, 8), (8,)),
        lambda: functional.linear(torch.ones(1, 1).expand(2**40, 1), torch.ones(2**20, 1)),
        lambda: functional.scaled_dot_product_attention(*[torch.ones(1).expand(2**30, 1, 2**24, 32)] * 3),
        Failing.apply(torch.ones(1, requires_grad=True)).backward,
    )
    for attempt in attempts:
        with contextlib.suppress(RuntimeError):
            attempt()
