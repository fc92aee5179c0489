"""The measured peak of live tensor bytes, from the CPU allocator's own events: the truth that `cost.py` is held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """The most that live tensor bytes grew above where they stood, while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resting_bytes(backend: object) -> int:
    """Bytes of weights, buffers and optimizer state that are there before a step."""
    model = backend.model  # type: ignore[attr-defined]
    tensors = [*model.state_dict().values()]
    tensors += [tensor for state in backend.optimizer.state.values() for tensor in state.values()]  # type: ignore[attr-defined]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
