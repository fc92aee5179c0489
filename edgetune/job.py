"""What the training loop works on, what it remembers and who watches it. The loop is `trainer.py`.

A `Job` has everything that the loop may ask for; `session.py` puts one together from real things, a test from fakes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgetune.alast import AlastState
from edgetune.backends.base import Backend
from edgetune.cost import Selection, ViTShape
from edgetune.data import ImageSet, Pictures, Preprocess, Transform
from edgetune.errors import DoesNotFit
from edgetune.methods import Method
from edgetune.planner import Plan
from edgetune.report import Scores
from edgetune.settings import RunSettings

if TYPE_CHECKING:
    from edgetune.caching import Features


class Interruption(Exception):
    """A signal asked the run to stop; the state is consistent. `session` turns it into `errors.Interrupted`."""


class Diverged(Exception):
    """The loss was no finite number, several steps in a row."""


class OverCap(Exception):
    """The measured peak passed the cap."""


class NoMemory(Exception):
    """Memory ran out, and went on doing so under tighter plans."""


class TrainingState(msgspec.Struct):
    """Where a run stands: what a checkpoint keeps besides tensors. Counts and sums since the first step."""

    step: int = 0
    evaluated_step: int = -1
    lost_steps: int = 0
    images: int = 0
    flops: int = 0
    token_share_sum: float = 0.0
    device_peak_bytes: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    total_seconds: float = 0.0
    epoch_loss_sum: float = 0.0
    epoch_correct: int = 0
    epoch_images: int = 0
    best_epoch: float | None = None  # 0: the start, a fitted classifier on the pretrained model
    best: Scores | None = None
    before: Scores | None = None
    alast: AlastState | None = None
    tightenings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # for the report: what was found on the way
    look_seconds: float | None = None  # for the split, before the first step; None: it was not looked for
    cache_seconds: float = 0.0
    cache_written_bytes: int = 0
    evaluation_tokens: tuple[int, ...] | None = None  # that serve the best epoch's model best; None: all
    scratch_written_bytes: int = 0  # kept on disk while it was needed
    dropped_bytes: int = 0  # of weights, once the cache was whole


class StepEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as the listener and `metrics.csv` see it."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    train_accuracy: float
    learning_rate: float
    images_per_second: float
    token_share: float
    trained_blocks: int
    memory_bytes: int
    cap_bytes: int
    seconds: float
    eta_seconds: float


class Listener(Protocol):
    """Who watches a run: the terminal, a test, nobody."""

    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def step(self, event: StepEvent) -> None: ...
    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None: ...


def no_tighter_plan(current: Plan) -> Plan:
    raise DoesNotFit("this plan is the only one", current.predicted_peak_bytes)


@dataclass
class Job:
    """All that the loop works on. The plan changes when memory runs out, the state with every step."""

    settings: RunSettings
    method: Method
    plan: Plan
    shape: ViTShape
    backend: Backend
    train_images: ImageSet
    val_images: ImageSet
    preprocess: Preprocess
    class_weights: npt.NDArray[np.float32] | None
    transform: Transform | None
    learning_rate: float
    listener: Listener
    checkpoint: Callable[[TrainingState], None]
    keep_best: Callable[[tuple[int, ...] | None], None]  # with the tokens that it is best evaluated on
    memory_bytes: Callable[[], int]  # the judged peak: of the device where one is simulated, else of this process
    enter_phase: Callable[[str], None]
    # What `replay.py` asks: a sentence if too little memory is left for a step under this plan; whether an error says
    # that it ran out; a tighter plan (DoesNotFit if there is none); and to go by that plan from now on.
    shortage: Callable[[Plan], str | None] = lambda _plan: None
    is_out_of_memory: Callable[[BaseException], bool] = lambda error: isinstance(error, MemoryError)
    tighten: Callable[[Plan], Plan] = no_tighter_plan
    follow: Callable[[Plan], None] = lambda _plan: None
    decode_budget_bytes: int | None = None
    pictures: Pictures | None = None  # decoded images, on disk
    keep_selection: Callable[[int, Selection], None] = lambda _step, _selection: None
    replayed: tuple[Selection, ...] | None = None  # what each step is to do, from another run
    features: Features | None = None  # what is read instead of being computed
    # Whether the backend has all that a checkpoint holds; not yet while a run is being put together.
    ready: bool = True
    # The classifier was fitted to the pretrained model: it is of use before the first step.
    starts_fitted: bool = False
    state: TrainingState = field(default_factory=TrainingState)
    stop: threading.Event = field(default_factory=threading.Event)
    # The optimizer's step counts when `state.step` was whole; None before the first step.
    whole_steps: dict[str, int] | None = None

    @property
    def classes(self) -> int:
        return self.shape.classes

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_images.paths) // self.plan.batch_size)

    @property
    def total_steps(self) -> int:
        return self.settings.steps or self.settings.epochs * self.steps_per_epoch

    @property
    def is_whole(self) -> bool:
        """Whether the weights are those of `state.step`: a step that failed may have updated some of them already."""
        if not self.ready:
            return False
        if self.whole_steps is None:
            return True
        before = self.whole_steps
        return all(count <= before.get(name, 0) for name, count in self.backend.optimizer_steps().items())

    def tell(self, note: str) -> None:
        """To who watches, and to the report, which a run that goes on later still has."""
        self.listener.note(note)
        self.state.notes = tuple(dict.fromkeys((*self.state.notes, note)))
