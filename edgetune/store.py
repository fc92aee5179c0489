"""What a run folder holds and how a run comes back from it. `checkpoint.py` does the writing; this says what is written.

run.json           settings, classes, preprocessing: all that evaluate, predict and resume need
plan.json          the plan
config.json        what plain timm builds the model from; with model.safetensors (the best epoch) a timm folder
labels.txt         one class a line, in the order of the logits
metrics.csv        one row a step, one an evaluation
images.txt         the images by name and content, see `own_images.py`
selections.jsonl   what each step trained and kept, for --replay
report.json        the report
cache/             what the frozen blocks put out for each image, where that is kept
checkpoints/       the base weights once, and of the last two checkpoints only what training changed
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from edgetune.backends.base import Array, Backend
from edgetune.checkpoint import (
    Checkpoint,
    OptimizerRecord,
    latest_checkpoint,
    read_base,
    save_base,
    save_checkpoint,
    save_tensors,
    write_atomically,
)
from edgetune.cost import Selection, TokenScore
from edgetune.data import Preprocess
from edgetune.errors import ArtifactsError, EdgetuneError, RunFolderError, UsageError
from edgetune.job import Listener, StepEvent, TrainingState
from edgetune.methods import METHODS, Method
from edgetune.planner import PLAN_FORMAT_VERSION, Plan
from edgetune.report import MetricsLog, Scores
from edgetune.settings import RunSettings, StoredRun, check

TOKENS_KEY, SCORE_KEY = "edgetune_evaluation_tokens", "edgetune_token_score"
RUN_FILE, PLAN_FILE, REPORT_FILE = "run.json", "plan.json", "report.json"
MODEL_FILE, CONFIG_FILE, LABELS_FILE, METRICS_FILE = "model.safetensors", "config.json", "labels.txt", "metrics.csv"
# A parameter's values and its optimizer state lie in one file; timm's names hold no such character.
MODEL_PREFIX, OPTIMIZER_PREFIX = "model|", "optimizer|"

T = TypeVar("T")


def write_start(
    folder: Path, stored: StoredRun, plan: Plan, timm_config: Mapping[str, Any], backend: Backend, state: TrainingState
) -> Standing:
    """Write everything that does not change during a run, the weights it starts from included, and a first checkpoint of
    `state`.
    """
    write_json(folder / RUN_FILE, stored)
    write_json(folder / PLAN_FILE, plan)
    write_json(folder / CONFIG_FILE, timm_config)
    labels = "".join(f"{name}\n" for name in stored.classes)
    write_atomically(folder / LABELS_FILE, labels.encode("utf-8", "surrogateescape"))
    base_sha256 = save_base(folder, backend.model_tensors())
    write = checkpoint_writer(folder, plan, backend, stored.settings.seed, base_sha256)
    write(state)
    return Standing(state, write, (), base_sha256)


def write_model(
    folder: Path,
    backend: Backend,
    evaluation_tokens: tuple[int, ...] | None = None,
    token_score: TokenScore = "attention",
) -> None:
    """model.safetensors as plain timm loads it, and in config.json the tokens that serve it best where not all do.

    timm, which passes over what it does not know, evaluates on all.
    """
    config = read_json(folder / CONFIG_FILE, dict[str, Any]) if (folder / CONFIG_FILE).exists() else {}
    if config.get(TOKENS_KEY) != (None if evaluation_tokens is None else list(evaluation_tokens)):
        config = {name: value for name, value in config.items() if name not in (TOKENS_KEY, SCORE_KEY)}
        if evaluation_tokens is not None:
            config |= {TOKENS_KEY: evaluation_tokens, SCORE_KEY: token_score}
        write_json(folder / CONFIG_FILE, config)
    save_tensors(folder / MODEL_FILE, backend.model_tensors(), {"format": "pt"})


def read_evaluation_tokens(folder: Path) -> tuple[tuple[int, ...], TokenScore] | None:
    """How many patch tokens each block sees where the saved model is used, and by which score; None: all."""
    config = read_json(folder / CONFIG_FILE, dict[str, Any])
    if config.get(TOKENS_KEY) is None:
        return None
    try:
        tokens = msgspec.convert(config[TOKENS_KEY], tuple[Annotated[int, msgspec.Meta(ge=1)], ...])
        return tokens, msgspec.convert(config.get(SCORE_KEY, "attention"), TokenScore)
    except msgspec.ValidationError as error:
        raise RunFolderError(f"{folder / CONFIG_FILE} is damaged: {TOKENS_KEY} or {SCORE_KEY}: {error}.") from error


def checkpoint_writer(
    folder: Path, plan: Plan, backend: Backend, seed: int, base_sha256: str, changed: Iterable[str] = ()
) -> Callable[[TrainingState], None]:
    """A function that saves what training may have changed, its optimizer state, and where the run stands.

    `changed`: what an earlier part of the run changed, which a tighter plan may train no longer.
    """
    names = backend.trained_names(trainable_space(plan)) | set(changed)

    def write(state: TrainingState) -> None:
        model = backend.model_tensors()
        tensors = {MODEL_PREFIX + name: model[name] for name in model if name in names}
        tensors |= {OPTIMIZER_PREFIX + name: array for name, array in backend.optimizer_tensors()}
        checkpoint = Checkpoint(
            step=state.step,
            seed=seed,
            optimizer=OptimizerRecord(name=plan.optimizer, steps=backend.optimizer_steps()),
            training=msgspec.to_builtins(state),
            base_sha256=base_sha256,
        )
        save_checkpoint(folder, checkpoint, tensors)

    return write


class Standing(NamedTuple):
    """Where a run stood, what writes its next checkpoints, and notes for the user.

    `restore_optimizer` puts its state into the backend: apart, so that what the run needs no more can leave memory first.
    `base_sha256`: of the weights that the run started from.
    """

    state: TrainingState
    write_checkpoint: Callable[[TrainingState], None]
    notes: tuple[str, ...]
    base_sha256: str = ""
    restore_optimizer: Callable[[], None] = lambda: None


def restore(folder: Path, plan: Plan, backend: Backend, artifacts: str | None = None) -> Standing:
    """Put the last good checkpoint's weights back into the backend. `artifacts`: where its graphs are from, if they are.

    Raises: RunFolderError if there is none, or it does not belong to the plan; ArtifactsError if the artifacts are others.
    """
    found = latest_checkpoint(folder)
    if found is None:
        raise RunFolderError(f"{folder} has no checkpoint: there is nothing to resume. Start the run again.")
    checkpoint, tensors, notes = found
    if checkpoint.optimizer.name != plan.optimizer:
        raise RunFolderError(
            f"the checkpoint in {folder} is of {checkpoint.optimizer.name}, its plan asks for {plan.optimizer}: "
            "one of them is another run's."
        )
    try:
        lacking = set() if artifacts is None else set(backend.model_tensors())
        for name, array in read_base(folder, checkpoint.base_sha256):
            backend.restore({name: array}, {}, {})
            lacking.discard(name)
            del array  # before the next one is read
        if lacking:
            raise RuntimeError(f"they have {', '.join(sorted(lacking)[:3])} besides")
        trained = _Part(tensors, MODEL_PREFIX)
        for name in trained:
            backend.restore({name: trained[name]}, {}, {})
    except (KeyError, RuntimeError) as error:  # a tensor that the model lacks, or has in another shape
        raise _foreign(folder, error, artifacts) from error

    def restore_optimizer() -> None:
        try:
            backend.restore({}, _Part(tensors, OPTIMIZER_PREFIX), checkpoint.optimizer.steps)
        except (KeyError, RuntimeError) as error:
            raise _foreign(folder, error, artifacts) from error

    try:
        state = msgspec.convert(checkpoint.training, TrainingState)
    except msgspec.ValidationError as error:
        raise RunFolderError(f"the checkpoint in {folder} is of another version of edgetune: {error}.") from error
    write = checkpoint_writer(folder, plan, backend, checkpoint.seed, checkpoint.base_sha256, trained)
    return Standing(state, write, notes, checkpoint.base_sha256, restore_optimizer)


def _foreign(folder: Path, error: Exception, artifacts: str | None) -> EdgetuneError:
    if artifacts is None:
        return RunFolderError(f"the checkpoint in {folder} does not belong to the run's model: {error}.")
    what = f"they lack {error}" if isinstance(error, KeyError) else str(error)
    return ArtifactsError(
        f"the artifacts in {artifacts} are of another model than the run in {folder} began from: {what}. Put those back "
        f"there, or name their place: --resume {folder} --artifacts DIR."
    )


class LoggedListener:
    """A listener with `metrics.csv` beside it, from where the run stands on: later rows are written again."""

    def __init__(self, listener: Listener, path: Path, state: TrainingState) -> None:
        self._listener, self._metrics = listener, MetricsLog(path)
        self._metrics.truncate_after(state.step, keep_evaluation=state.evaluated_step == state.step)
        self.note, self.progress = listener.note, listener.progress

    def step(self, event: StepEvent) -> None:
        self._metrics.append(
            {
                "step": event.step,
                "epoch": event.epoch,
                "loss": event.loss,
                "train_accuracy": event.train_accuracy,
                "learning_rate": event.learning_rate,
                "images_per_second": event.images_per_second,
                "token_share": event.token_share,
                "trained_blocks": event.trained_blocks,
                "memory_bytes": event.memory_bytes,
                "seconds": event.seconds,
            }
        )
        self._listener.step(event)

    def evaluated(self, step: int, epoch: float, scores: Scores, best: bool) -> None:
        self._metrics.append(
            {
                "step": step,
                "epoch": epoch,
                "val_loss": scores.loss,
                "val_accuracy": scores.accuracy,
                "val_balanced_accuracy": scores.balanced_accuracy,
            }
        )
        self._listener.evaluated(step, epoch, scores, best)


def trainable_space(plan: Plan) -> Selection:
    """Every region that some step of the run may train."""
    depth = len(plan.token_ceiling)
    lowest = plan.split_block if plan.draws else depth - plan.trained_blocks
    return Selection(tuple(block >= lowest for block in range(depth)), plan.token_ceiling, plan.embeddings_train)


def write_imported(
    folder: Path,
    *,
    model: str,
    artifacts: Path,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    architecture: str,
    model_args: dict[str, object],
) -> None:
    """run.json of a model that was trained from these artifacts on another device: it has no images of its own.

    Raises: RunFolderError.
    """
    place = os.fsencode(artifacts).decode("utf-8", "backslashreplace")  # JSON holds no other bytes
    stored = StoredRun(
        settings=RunSettings(model=model, backend="ort", artifacts=place),
        classes=classes,
        train_images=0,
        val_images=0,
        images_sha256="",
        preprocess=preprocess,
        architecture=architecture,
        model_args=model_args,
    )
    write_json(folder / RUN_FILE, stored)


def is_imported(stored: StoredRun) -> bool:
    """Whether the folder holds a model that another device trained: no steps were taken in it, no images are its own."""
    return not stored.train_images


def read_stored(folder: Path) -> StoredRun:
    """Raises: RunFolderError if the folder is no run folder, or its run.json is damaged."""
    stored = read_json(folder / RUN_FILE, StoredRun)
    try:
        check(stored.settings)
    except UsageError as error:
        raise RunFolderError(f"{folder / RUN_FILE} is damaged: {error}") from error
    return stored


def read_plan(path: Path) -> Plan:
    """Raises: RunFolderError if the file is no plan, or one that no run could follow."""
    plan = read_json(path, Plan)
    depth, ceiling = len(plan.token_ceiling), plan.token_ceiling
    limits = (
        ("split_block", plan.split_block, 0, depth),
        ("trained_blocks", plan.trained_blocks, 0, depth - plan.split_block),
        ("token_floor", plan.token_floor, 0.001, 1.0),
        ("batch_size", plan.batch_size, 1, 65_536),
        ("micro_batch", plan.micro_batch, 1, plan.batch_size),
        ("evaluation_batch", plan.evaluation_batch, 1, 65_536),
        ("threads", plan.threads, 1, 1024),
        ("cap_bytes", plan.cap_bytes, 1, 2**62),
        ("runtime_bytes", plan.runtime_bytes, 0, 2**62),
    )
    wrong = [f"{name} is {value}" for name, value, least, most in limits if not least <= value <= most]
    if plan.format_version != PLAN_FORMAT_VERSION:
        wrong.append(f"format_version is {plan.format_version}, this edgetune's is {PLAN_FORMAT_VERSION}")
    method = METHODS.get(plan.method)
    if method is None:
        wrong.append(f"method is {plan.method!r}")
    else:
        wrong += _contradictions(plan, method)
    if not ceiling or min(ceiling) < 1 or list(ceiling) != sorted(ceiling, reverse=True):
        wrong.append("token_ceiling does not fall from block to block")
    if wrong:
        raise RunFolderError(
            f"{path} is no plan that a run could follow: {'; '.join(wrong)}. Take another run's plan.json."
        )
    return plan


def _contradictions(plan: Plan, method: Method) -> list[str]:
    """Where a plan's fields do not go together."""
    depth = len(plan.token_ceiling)
    ever = depth - plan.split_block if plan.draws and plan.keeps_state else plan.trained_blocks
    claims = {
        "draws": (plan.draws, method.draws),
        "embeddings_train": (
            plan.embeddings_train,
            plan.embeddings_train and (plan.method == "full" or (plan.draws and plan.split_block == 0)),
        ),
        "recompute levels": (len(plan.recompute), depth),
        "updates_in_backward": (plan.updates_in_backward, plan.updates_in_backward and plan.accumulation == 1),
        "keeps_state": (plan.keeps_state, plan.keeps_state or not plan.draws),
        "ever_trained_blocks": (plan.ever_trained_blocks, ever),
        "accumulation": (plan.accumulation, -(-plan.batch_size // max(1, plan.micro_batch))),
    }
    if not method.draws:
        claims["split_block"] = (plan.split_block, depth - plan.trained_blocks)
    if plan.method in ("full", "head"):
        claims["trained_blocks"] = (plan.trained_blocks, depth if plan.method == "full" else 0)
    wrong = [f"{name} is {found}, not {right}" for name, (found, right) in claims.items() if found != right]
    if not plan.runtime_bytes < plan.predicted_peak_bytes < 2**62:
        wrong.append(f"predicted_peak_bytes is {plan.predicted_peak_bytes}")
    return wrong


def read_json(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RunFolderError(f"{path} can't be read ({reason}). Wanted: a run folder of edgetune.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged or of another version of edgetune: {error}.") from error


def write_json(path: Path, value: object) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


class _Part(Mapping[str, Array]):
    """The tensors whose names start with a prefix, without it; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Array:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
