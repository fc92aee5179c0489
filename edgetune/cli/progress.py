"""What a run prints while it goes: a live bar on a terminal, plain lines elsewhere, nothing under --quiet."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgetune.data import shown
from edgetune.report import RunReport, Scores, print_summary, report_to_json
from edgetune.units import format_memory, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from edgetune.job import StepEvent

# Plain lines are for logs: one every few seconds is enough to see that it lives.
PLAIN_SECONDS = 5.0


def printable(text: str, encoding: str | None) -> str:
    """`text` with what an output of this encoding can't show escaped: no class name may end a run."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _PatientConsole(Console):
    """A console whose reader may go (`| head`): the run goes on in silence instead of ending."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    """A `job.Listener` that prints. With `json`, standard output is kept for the report alone."""

    def __init__(self, *, quiet: bool, json: bool) -> None:
        self.quiet, self.json = quiet, json
        self.console = _PatientConsole(stderr=json, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._began: dict[str, tuple[float, int]] = {}  # when, and how many were done by then

    def __enter__(self) -> Terminal:
        if self.console.is_terminal and not self.quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(printable(shown(text), self.console.encoding), markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        began, first = self._began.setdefault(what, (time.monotonic(), done))
        left = (time.monotonic() - began) / (done - first) * (total - done) if done > first else 0.0
        self._show(what, done, total, f"ETA {format_seconds(left)}" if left >= 1 else "")
        if done >= total:
            self._end(what)

    def step(self, event: StepEvent) -> None:
        detail = (
            f"loss {event.loss:.3f}  accuracy {event.train_accuracy:.1%}  {event.images_per_second:.1f} images/s  "
            f"ETA {format_seconds(event.eta_seconds)}"
        )
        detail += f"  memory {format_memory(event.memory_bytes, event.cap_bytes)}"
        self._show("train", event.step, event.total_steps, detail)

    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None:
        self.note(f"epoch {epoch:g}  step {step}  validation {scores}" + ("  (best so far)" if best else ""))

    def finished(self, report: RunReport) -> None:
        """The end of a run: the summary for people, the report for programs."""
        self.__exit__(None, None, None)
        if not self.quiet:
            print_summary(report, self.console)
        if self.json:
            sys.stdout.flush()
            sys.stdout.buffer.write(report_to_json(report) + b"\n")  # JSON is UTF-8, whatever the terminal speaks

    def _show(self, what: str, done: int, total: int, detail: str) -> None:
        if self.quiet:
            return
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, detail=detail)
            self._bars.update(self._tasks[what], completed=done, total=total, detail=detail)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_SECONDS or (what == "train" and done == total):
            self._last_line = now
            self.note(f"{what} {done}/{total}  {detail}".rstrip())

    def _end(self, what: str) -> None:
        self._began.pop(what, None)
        task: Any = self._tasks.pop(what, None)
        if task is not None and self._bars is not None:
            self._bars.remove_task(task)
