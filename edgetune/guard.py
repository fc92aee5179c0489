"""What stands between a run and its cap: the kernel's limit, what is left under it, and the plan that comes next."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import msgspec

from edgetune.enforce import (
    EnforceKind,
    Limit,
    by_rlimit,
    enforce,
    is_out_of_memory,
    left_bytes,
    room_bytes,
    short_of_memory,
)
from edgetune.errors import CapExceeded, DoesNotFit
from edgetune.judge import Judge
from edgetune.memory import MemoryMeter
from edgetune.planner import Plan, PlanRequest, plan
from edgetune.replay import forget, reason_of
from edgetune.units import MIB

# Pages of code that the first steps bring in, which the cap counts and RLIMIT_DATA does not: 1.1 to 1.9 MiB in runs of
# the bundled model, DeiT-Tiny and DeiT-Small (torch 2.14, x86), up to 5 in a fresh installation.
UNCOUNTED_BYTES = 6 * MIB
# What is left of the predicted growth each time that memory ran out all the same.
TIGHTENED_SHARE = 0.8
# What is over once a run trains: what these took bounds nothing any more.
PAST = ("load", "look", "cache", "head")
# What makes one plan need less than another.
CHOICES = (
    "split_block", "trained_blocks", "token_ceiling", "embeddings_train", "keeps_state", "micro_batch", "recompute",
    "recompute_frozen", "updates_in_backward",
)  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """The limit of a run. `lift` takes it away, so that what has been learnt can be saved when nothing else fits."""

    judge: Judge
    meter: MemoryMeter
    limit: Limit
    _stack: ExitStack

    def lift(self) -> None:
        self._stack.close()

    def needed_bytes(self, plan: Plan) -> int:
        """What a step under this plan is predicted to add to what the process has now."""
        return max(0, growth_to_come(plan) - _added_bytes(self.judge, self.meter))

    def shortage(self, plan: Plan) -> str | None:
        """A sentence if the machine has less memory left than a step under this plan may take."""
        return short_of_memory(self.needed_bytes(plan))

    def tighter(self, request: PlanRequest, current: Plan, make_plan: Callable[[PlanRequest], Plan] = plan) -> Plan:
        """The plan after this one, for a run whose memory ran out all the same; the cap it answers to stays.

        It adds TIGHTENED_SHARE of what this one does and no more than can be had now (of a limit that somebody else set,
        of a machine that others use); if nothing is as small, it is the least there is: what this plan says of its needs
        has just been shown wrong. What lies below the split stays frozen: checkpoints don't hold it, and it may be stored
        in half precision.

        Raises: DoesNotFit if this plan is the least.
        """
        runtime, phases = current.runtime_bytes, current.predicted_phase_bytes
        growth = growth_to_come(current) if phases else 0
        room = _added_bytes(self.judge, self.meter) + room_bytes() - UNCOUNTED_BYTES
        splits = tuple(split for split in request.space.splits if split >= current.split_block)
        request = msgspec.structs.replace(
            request,
            space=msgspec.structs.replace(request.space, splits=splits),
            cap_bytes=runtime + min(int(TIGHTENED_SHARE * growth), room),
            runtime_bytes=runtime,
            load_copies=0.0,
            fits_head=False,
            threads=current.threads,
        )
        try:
            found = make_plan(request)
        except DoesNotFit as error:
            if error.smallest_cap_bytes > current.cap_bytes:
                raise
            found = make_plan(msgspec.structs.replace(request, cap_bytes=error.smallest_cap_bytes))
            if all(getattr(found, name) == getattr(current, name) for name in CHOICES):
                raise
        past = {phase: size for phase, size in phases.items() if phase in PAST}
        phases = found.predicted_phase_bytes | past
        return msgspec.structs.replace(
            found,
            cap_bytes=current.cap_bytes,
            evaluation_batch=min(found.evaluation_batch, current.evaluation_batch),
            predicted_phase_bytes=phases,
            predicted_peak_bytes=max(phases.values()),
        )

    def is_out_of_memory(self, error: BaseException, plan: Plan) -> bool:
        # What was needed is known from the plan alone: what the failed step held is still held here.
        needed = growth_to_come(plan)
        return is_out_of_memory(error, left_bytes=left_bytes(self.limit), needed_bytes=needed)


def growth_to_come(plan: Plan) -> int:
    """What the plan says that a run which trains already adds to its runtime at most."""
    phases = plan.predicted_phase_bytes.items()
    return (
        max((size for phase, size in phases if phase not in PAST), default=plan.predicted_peak_bytes)
        - plan.runtime_bytes
    )


def _added_bytes(judge: Judge, meter: MemoryMeter) -> int:
    """What the process has now above its runtime."""
    return meter.current().total_bytes - judge.host_runtime_bytes


@contextmanager
def guarded(kind: EnforceKind, judge: Judge, meter: MemoryMeter, reserved_bytes: int = 0) -> Iterator[Guard]:
    """Enforce the cap for the length of a with block: what is left of it now is what the process may still grow by.

    `reserved_bytes`: what RLIMIT_DATA counts of the run's runtime although it is never touched.

    Simulating, the budget is the device's cap without the device's runtime, on top of this host's runtime.

    Raises: UsageError as `enforce`.
    """
    growth = (
        judge.cap_bytes - judge.device_runtime_bytes if judge.simulated else judge.cap_bytes - judge.host_runtime_bytes
    )
    growth -= _added_bytes(judge, meter)
    if by_rlimit(kind, simulated=judge.simulated):
        growth += reserved_bytes - UNCOUNTED_BYTES
    with ExitStack() as stack:
        limit = stack.enter_context(enforce(kind, growth_bytes=max(1, growth), simulated=judge.simulated))
        yield Guard(judge, meter, limit, stack)


@contextmanager
def memory_ends(what: str, guard: Guard | None = None) -> Iterator[None]:
    """Memory that runs out within, where nothing can be done again with less, ends the run as a passed cap.

    The limit is lifted then: whoever tidies up needs some.

    Raises: CapExceeded.
    """
    try:
        yield
    except Exception as error:
        left = None if guard is None else left_bytes(guard.limit)
        if not is_out_of_memory(error, left_bytes=left, needed_bytes=None):
            raise
        reason = reason_of(error)
        forget(error)
        if guard is not None:
            guard.lift()
        gc.collect()
        raise CapExceeded(
            f"memory ran out {what} ({reason}). Free some, try a larger --ram-cap where the device has it, or a smaller "
            "model."
        ) from None
