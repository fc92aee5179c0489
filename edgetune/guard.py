"""What stands between a run and its cap: the kernel's limit, what is left under it, and the plan that comes next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from edgetune.enforce import EnforceKind, Limit, enforce, is_out_of_memory, left_bytes, short_of_memory
from edgetune.errors import CapExceeded, EdgetuneError
from edgetune.judge import Judge
from edgetune.memory import MemoryMeter
from edgetune.planner import Plan


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
        return max(0, plan.predicted_peak_bytes - plan.runtime_bytes - _added_bytes(self.judge, self.meter))

    def shortage(self, plan: Plan) -> str | None:
        """A sentence if the machine has less memory left than a step under this plan may take."""
        return short_of_memory(self.needed_bytes(plan))

    def is_out_of_memory(self, error: BaseException, plan: Plan) -> bool:
        # What was needed is known from the plan alone: what the failed step held is still held here.
        needed = plan.predicted_peak_bytes - plan.runtime_bytes
        return is_out_of_memory(error, left_bytes=left_bytes(self.limit), needed_bytes=needed)


def _added_bytes(judge: Judge, meter: MemoryMeter) -> int:
    """What the process has now above its runtime."""
    return meter.current().total_bytes - judge.host_runtime_bytes


@contextmanager
def guarded(kind: EnforceKind, judge: Judge, meter: MemoryMeter) -> Iterator[Guard]:
    """Enforce the cap for the length of a with block: what is left of it now is what the process may still grow by.

    Simulating, the budget is the device's cap without the device's runtime, on top of this host's runtime.
    Memory that runs out here, before or after training, ends the run as a passed cap.

    Raises: CapExceeded, and UsageError as `enforce`.
    """
    growth = (
        judge.cap_bytes - judge.device_runtime_bytes if judge.simulated else judge.cap_bytes - judge.host_runtime_bytes
    )
    with ExitStack() as stack:
        limit = stack.enter_context(
            enforce(kind, growth_bytes=max(1, growth - _added_bytes(judge, meter)), simulated=judge.simulated)
        )
        try:
            yield Guard(judge, meter, limit, stack)
        except EdgetuneError:
            raise
        except Exception as error:
            if not is_out_of_memory(error, left_bytes=left_bytes(limit), needed_bytes=None):
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CapExceeded(
                f"memory ran out outside of training ({reason}). Try a larger --ram-cap, or a smaller model."
            ) from None
