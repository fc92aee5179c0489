"""What a run asks of the side that computes before there is a backend: the model's shape, a plan, the model itself.

`torch.py` and `ort.py` each answer as a module of functions; `engine_of` says which a run uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from edgetune.backends.base import Backend
from edgetune.cost import ViTShape
from edgetune.data import DataFolder, Preprocess
from edgetune.planner import Plan, PlanRequest
from edgetune.settings import RunSettings

ClassWeights = npt.NDArray[np.float32]


class Built(NamedTuple):
    """A model in a backend, and what a run folder says of it. `config` is timm's config.json."""

    backend: Backend
    architecture: str
    model_args: dict[str, Any]
    config: dict[str, Any]


class Engine(Protocol):
    """Errors are those of loading a model or artifacts."""

    def warm_up(self, settings: RunSettings, threads: int) -> tuple[str, ...]:
        """Bring into memory all code that a run needs; the packages that it is made of. Raises: BackendUnavailable."""

    def describe(self, settings: RunSettings, classes: int) -> tuple[ViTShape, Preprocess]:
        """What the model will cost and want to see, without its weights."""

    def fitted(self, settings: RunSettings, data: DataFolder) -> DataFolder:
        """The data with a name for each of the model's logits. Raises: DataError if the classes are others."""

    def load_copies(self, settings: RunSettings, shape: ViTShape) -> float:
        """How often the weights exist at the most while they are loaded."""

    def plan(self, settings: RunSettings, request: PlanRequest, smaller: Iterable[ViTShape] = ()) -> Plan:
        """The best plan under the request's cap. Raises: DoesNotFit."""

    def reserved_bytes(self, settings: RunSettings, plan: Plan) -> int:
        """Address space that the runtime will take and never touch: RLIMIT_DATA counts it, memory does not."""

    def build(
        self,
        settings: RunSettings,
        plan: Plan,
        classes: tuple[str, ...],
        *,
        pretrained: bool,
        class_weights: ClassWeights | None,
        at_peak: Callable[[], object],
    ) -> Built:
        """The model, ready for the plan's steps."""


def engine_of(settings: RunSettings) -> Engine:
    return cast(Engine, import_module(f"edgetune.engines.{settings.backend}"))
