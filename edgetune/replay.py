"""What happens when memory runs out: the same work is done again, under a tighter plan.

Nothing of a failed attempt stays, so the same images are seen in the same order with the same randomness: no sample is
lost, and the effective batch, the schedule and ALaST's budgets are as if the attempt had never been.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from traceback import clear_frames
from typing import Literal, NamedTuple, TypeVar

import msgspec

from edgetune.errors import DoesNotFit
from edgetune.job import Job, NoMemory
from edgetune.planner import Plan
from edgetune.units import format_bytes

# Tighter plans that one piece of work is tried under, before the run ends.
MAX_TIGHTENINGS = 3
_LONGEST_REASON = 200
_CHOSEN = "chosen: "

T = TypeVar("T")


class Tightened(NamedTuple):
    """A tighter plan, and how the work is done under it, in words."""

    plan: Plan
    how: str


def within_memory(
    job: Job,
    what: str,
    work: Callable[[], T],
    give_back: Callable[[], None],
    tighten: Callable[[Plan], Tightened] | None = None,
    *,
    needs_room: bool = False,
) -> T:
    """`work`, tried again under a tighter `job.plan` each time that memory runs out.

    `what` names the work to the user; `give_back` lets go of what the failed attempt left; `tighten` makes the plan
    after this one (DoesNotFit if there is none), by default the job's. With `needs_room` too little memory to begin with
    counts as a failed attempt.

    Raises: NoMemory if there is no tighter plan, or MAX_TIGHTENINGS of them did not help. Whatever else `work` raises.
    """
    for attempt in range(MAX_TIGHTENINGS + 1):
        try:
            shortage = job.shortage(job.plan) if needs_room else None
            if shortage is not None:
                raise MemoryError(shortage)
            return work()
        except Exception as error:
            if not job.is_out_of_memory(error):
                raise
            reason = reason_of(error)
            forget(error)
        # Not in the handler: what is raised there would keep the failed attempt's tensors as its context.
        give_back()
        gc.collect()
        if attempt == MAX_TIGHTENINGS or not _turn(job, what, reason, tighten or tighter_steps(job)):
            break
    raise NoMemory(reason)


def tighter_steps(job: Job) -> Callable[[Plan], Tightened]:
    """The job's own way to a tighter plan, and what it chose, in words."""

    def tighten(current: Plan) -> Tightened:
        plan = job.tighten(current)
        chosen = next((line for line in plan.explanation if line.startswith(_CHOSEN)), "").removeprefix(_CHOSEN)
        return Tightened(plan, f"under a tighter plan of {format_bytes(plan.predicted_peak_bytes)}: {chosen}")

    return tighten


def smaller_batches(
    job: Job, batch: Literal["evaluation_batch", "cache_batch"], images: int | None, current: Plan
) -> Tightened:
    """A quarter of the images at once, of no more than there are (None: many): three times that make one of 64.

    How steps are done stays as it is till then.
    """
    size: int = getattr(current, batch)
    size = size if images is None else min(size, images)
    if size == 1:
        return tighter_steps(job)(current)
    size = -(-size // 4)
    return Tightened(msgspec.structs.replace(current, **{batch: size}), f"in batches of {size}")


def _turn(job: Job, what: str, reason: str, tighten: Callable[[Plan], Tightened]) -> bool:
    """Turn to a tighter plan, and say so; False if there is none, or not even the memory to turn to it."""
    try:
        plan, how = tighten(job.plan)
        said = f"{what}: memory ran out ({reason}); done again, with the same images, {how}"
        job.plan = plan
        job.state.tightenings = (*job.state.tightenings, said)
        job.follow(plan)
    except DoesNotFit:
        return False
    except Exception as error:
        if not job.is_out_of_memory(error):
            raise
        forget(error)
        return False
    job.listener.note(said)
    return True


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, in brackets after "memory ran out"."""
    lines = str(error).splitlines()
    return lines[0][:_LONGEST_REASON] if lines and lines[0] else type(error).__name__


def forget(error: BaseException) -> None:
    """Let go of what the frames of a failed attempt hold, those of all the errors that led to this one included."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    for each in links:
        clear_frames(each.__traceback__)
        each.__traceback__ = None
