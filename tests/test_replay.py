"""Memory that runs out in the loop, on a fake backend: the same work again under a tighter plan, nothing lost. No torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from doubles import FakeBackend, make_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import copy_of, make_job

from edgetune import caching
from edgetune.errors import DataError, DoesNotFit
from edgetune.job import Interruption, NoMemory, StepEvent
from edgetune.planner import Plan
from edgetune.replay import MAX_TIGHTENINGS, forget, within_memory
from edgetune.trainer import train


def halved(plan: Plan) -> Plan:
    """Half the micro-batch: 8, 4, 2, 1, and no further."""
    micro_batch = plan.micro_batch // 2
    if micro_batch == 0:
        raise DoesNotFit("one image is the least", 1)
    return msgspec.structs.replace(
        plan,
        micro_batch=micro_batch,
        accumulation=-(-plan.batch_size // micro_batch),
        explanation=(f"chosen: micro-batches of {micro_batch}",),
    )


def fewer_blocks(plan: Plan) -> Plan:
    """One block less a step, from one block further up, and fewer tokens."""
    return msgspec.structs.replace(
        halved(plan),
        split_block=plan.split_block + 1,
        trained_blocks=plan.trained_blocks - 1,
        token_ceiling=tuple(max(8, tokens - 4) for tokens in plan.token_ceiling),
    )


class Try:
    """A job that can be tightened, and what became of it."""

    def __init__(self, folder: Path, tighten: Callable[[Plan], Plan] | None = halved, **changes: Any) -> None:
        self.job, self.watcher, self.saved = make_job(folder, **changes)
        if tighten is not None:
            self.job.tighten = tighten
        self.followed: list[Plan] = []
        self.job.follow = self.followed.append

    @property
    def backend(self) -> FakeBackend:
        assert isinstance(self.job.backend, FakeBackend)
        return self.job.backend

    def train(self) -> Try:
        train(self.job)
        return self

    def resumed(self, folder: Path, **changes: Any) -> Try:
        """As a run is resumed: from the last checkpoint, with the plan that was followed last."""
        other = Try(folder, **changes)
        other.job.plan, other.job.state = self.job.plan, copy_of(self.job.state)
        other.backend.restore({"head.weight": self.backend.weight}, {}, self.backend.optimizer_steps())
        return other


def out(count: int = 1) -> list[Exception]:
    return [MemoryError(f"no room {number}") for number in range(count)]


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("step", [0, 2, 4])  # an epoch is three steps, the last of four images
@pytest.mark.parametrize("after", [0, 1])
def test_a_step_is_done_again_with_the_same_images_in_the_same_order(
    image_folder: Path, times: int, step: int, after: int
) -> None:
    calm = Try(image_folder, method="alast").train()
    short = Try(image_folder, method="alast")
    short.backend.raises[step], short.backend.raises_after = out(times), after
    short.train()
    assert short.backend.seen == calm.backend.seen
    assert short.backend.rates == calm.backend.rates
    assert short.job.state.alast == calm.job.state.alast
    assert len(set(calm.job.state.alast.budgets)) > 1  # they move
    assert short.backend.selections == calm.backend.selections
    losses = [[event.loss for event in each.watcher.steps] for each in (short, calm)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for field in ("step", "images", "flops", "token_share_sum", "best_epoch", "epoch_images"):
        assert getattr(short.job.state, field) == getattr(calm.job.state, field), field
    assert max(map(max, short.backend.batches[step:])) == max(1, 8 // 2**times)
    assert short.job.plan.batch_size == calm.job.plan.batch_size


def test_who_watches_is_told_what_happened_and_what_is_done_about_it(image_folder: Path) -> None:
    short = Try(image_folder)
    short.backend.raises[1] = out(2)
    short.train()
    assert short.job.state.tightenings == tuple(short.watcher.notes)
    first, second = short.watcher.notes
    assert first.startswith(
        "step 2: memory ran out (no room 0); done again, with the same images, under a tighter plan"
    )
    assert first.endswith("micro-batches of 4")
    assert second.endswith("micro-batches of 2")
    assert [plan.micro_batch for plan in short.followed] == [4, 2]


def test_the_fourth_time_is_the_last_and_the_state_is_that_of_the_last_whole_step(image_folder: Path) -> None:
    short = Try(image_folder, method="alast")
    short.backend.raises[4] = out(MAX_TIGHTENINGS + 1)
    with pytest.raises(NoMemory, match="no room 3"):
        short.train()
    assert short.job.state.step == len(short.backend.seen) == 4
    assert len(short.job.state.tightenings) == MAX_TIGHTENINGS
    assert short.job.is_whole
    # Gone on with, it ends as a run does that went on under the tightest plan by itself.
    lucky = Try(image_folder, method="alast")
    lucky.backend.raises[4] = out(MAX_TIGHTENINGS)
    lucky.train()
    again = short.resumed(image_folder, method="alast").train()
    assert short.backend.seen + again.backend.seen == lucky.backend.seen
    assert again.backend.weight.tobytes() == lucky.backend.weight.tobytes()
    assert again.job.state.alast == lucky.job.state.alast
    assert again.job.state.tightenings == short.job.state.tightenings == lucky.job.state.tightenings


def test_a_plan_that_trains_less_is_followed_from_the_step_on_and_when_resumed(image_folder: Path) -> None:
    calm = Try(image_folder, method="alast", epochs=4).train()
    short = Try(image_folder, fewer_blocks, method="alast", epochs=4)
    assert (short.job.plan.split_block, short.job.plan.trained_blocks) == (0, 3)
    short.backend.raises[2] = out()
    original = short.watcher.step

    def stop(event: StepEvent) -> None:
        original(event)
        if event.step == 6:
            short.job.stop.set()

    short.watcher.step = stop  # type: ignore[method-assign]
    with pytest.raises(Interruption):
        short.train()
    again = short.resumed(image_folder, tighten=fewer_blocks, method="alast", epochs=4).train()
    lucky = Try(image_folder, fewer_blocks, method="alast", epochs=4)
    lucky.backend.raises[2] = out()
    lucky.train()
    selections = short.backend.selections + again.backend.selections
    assert selections == lucky.backend.selections
    assert selections[:2] == calm.backend.selections[:2]
    for selection in selections[2:]:
        assert sum(selection.trains) == 2
        assert not selection.trains[0]
        assert max(selection.tokens) <= 12
    assert short.backend.seen + again.backend.seen == calm.backend.seen


def test_where_nothing_is_tighter_the_first_failure_ends_it(image_folder: Path) -> None:
    for tighten, batch in ((None, 8), (halved, 1)):
        short = Try(image_folder, tighten, batch_size=batch)
        short.backend.raises[1] = out()
        with pytest.raises(NoMemory, match="no room 0"):
            short.train()
        assert short.job.state.step == 1
        assert short.job.state.tightenings == ()


def test_too_little_memory_to_begin_with_counts_as_a_failed_attempt(image_folder: Path) -> None:
    calm = Try(image_folder).train()
    short, asked = Try(image_folder), []

    def shortage(plan: Plan) -> str | None:
        asked.append(plan.micro_batch)
        return "something else takes its memory" if short.job.state.step == 3 and plan.micro_batch > 2 else None

    short.job.shortage = shortage
    short.train()
    assert short.backend.seen == calm.backend.seen
    assert "step 4: memory ran out (something else takes its memory)" in short.watcher.notes[0]
    assert asked[:6] == [8, 8, 8, 8, 4, 2]
    hopeless = Try(image_folder)
    hopeless.job.shortage = lambda _plan: "taken"
    with pytest.raises(NoMemory, match="taken"):
        hopeless.train()
    assert hopeless.backend.seen == []
    assert hopeless.job.plan.micro_batch == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("head"), DataError("gone")])
def test_what_is_no_lack_of_memory_comes_through(image_folder: Path, error: Exception) -> None:
    short = Try(image_folder)
    short.backend.raises[1] = [error]
    with pytest.raises(type(error)):
        short.train()
    assert short.job.state.step == 1
    assert short.followed == []


def test_memory_that_runs_out_while_images_are_loaded_counts(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = Try(image_folder).train()
    short, loads, load_batch = Try(image_folder), [0], caching.load_batch

    def load(*args: Any, **more: Any) -> Any:
        loads[0] += 1
        if loads[0] in (4, 6):
            raise MemoryError("no room for pictures")
        return load_batch(*args, **more)

    monkeypatch.setattr(caching, "load_batch", load)
    short.train()
    assert short.backend.seen == calm.backend.seen
    assert len(short.followed) == 2


def test_an_evaluation_is_done_again_from_its_start(image_folder: Path) -> None:
    calm = Try(image_folder, val_share=0.4).train()
    short = Try(image_folder, val_share=0.4)
    assert len(short.job.val_images.paths) == 10
    short.job.plan = msgspec.structs.replace(short.job.plan, evaluation_batch=6)
    short.backend.evaluation_raises = [None, *out()]
    short.train()
    assert short.backend.evaluated == [6] + 4 * [2, 2, 2, 2, 2]  # the ones to come in small batches at once
    assert short.backend.seen == calm.backend.seen
    assert short.backend.batches == calm.backend.batches  # steps had memory enough
    assert short.followed == [short.job.plan]
    for mine, theirs in zip(short.watcher.evaluations, calm.watcher.evaluations, strict=True):
        assert mine[2].recall == theirs[2].recall
        assert mine[2].loss == pytest.approx(theirs[2].loss)
    (note,) = short.watcher.notes
    assert note.startswith("evaluation after step 0: memory ran out")
    assert note.endswith("in batches of 2")


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_a_plan_that_an_evaluation_tightened_cuts_the_next_step_right(image_folder: Path, evaluation: int) -> None:
    """A micro-batch of the next step has been loaded by then, cut as the plan said before."""
    calm = Try(image_folder).train()
    short = Try(image_folder)
    short.job.plan = msgspec.structs.replace(short.job.plan, evaluation_batch=1)
    batches = len(short.job.val_images.paths)
    short.backend.evaluation_raises = [*[None] * evaluation * batches, *out(2)]
    short.train()
    assert short.backend.seen == calm.backend.seen
    assert short.backend.batches[3 * evaluation] == [2, 2, 2, 2]


def test_an_evaluation_that_no_plan_makes_possible_ends_the_run(image_folder: Path) -> None:
    short = Try(image_folder)
    short.backend.evaluation_raises = [None, *out(4)]
    with pytest.raises(NoMemory):
        short.train()
    assert (short.job.state.step, short.job.state.evaluated_step, short.job.state.best) == (3, -1, None)
    calm = Try(image_folder).train()
    again = short.resumed(image_folder).train()
    assert short.backend.seen + again.backend.seen == calm.backend.seen
    assert [step for step, *_ in again.watcher.evaluations] == [3, 6, 9]


def test_sixty_four_images_at_once_are_one_after_three_tightenings(tmp_path: Path) -> None:
    data = make_images(tmp_path / "many", {"a": 80, "b": 80}, size=8)
    short = Try(data, batch_size=64, steps=1, val_share=0.5)
    short.backend.evaluation_raises = [*out(3)]
    short.train()
    assert [short.job.plan.evaluation_batch, short.job.plan.micro_batch] == [1, 64]


def test_an_interrupt_while_a_step_is_tightened_ends_after_that_step(image_folder: Path) -> None:
    calm = Try(image_folder).train()
    short = Try(image_folder)
    short.backend.raises[4] = out(2)

    def tighten(plan: Plan) -> Plan:
        short.job.stop.set()
        return halved(plan)

    short.job.tighten = tighten
    with pytest.raises(Interruption):
        short.train()
    assert short.saved[-1].step == short.job.state.step == 5
    assert short.saved[-1].tightenings == short.job.state.tightenings
    again = short.resumed(image_folder).train()
    assert short.backend.seen + again.backend.seen == calm.backend.seen


class Buffer:
    """Stands for a tensor: something whose going can be seen."""


def test_a_failed_attempt_holds_nothing_when_the_next_plan_is_made(image_folder: Path) -> None:
    short = Try(image_folder)
    step, held, alive = short.backend.step, [], []

    def hold(*args: Any, **more: Any) -> Any:
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        try:
            return step(*args, **more)
        except MemoryError as error:
            own = Buffer()
            held.append(weakref.ref(own))
            failure = RuntimeError("std::bad_alloc")  # that this frame holds it makes a cycle
            raise failure from error

    def tighten(plan: Plan) -> Plan:
        alive.append([reference for reference in held if reference() is not None])
        return halved(plan)

    short.job.is_out_of_memory = lambda error: "bad_alloc" in str(error)
    short.backend.step, short.job.tighten = hold, tighten  # type: ignore[method-assign]
    short.backend.raises[0] = out(3)
    short.train()
    assert alive == [[], [], []]


def test_what_led_to_an_error_is_let_go_of_too() -> None:
    def fail() -> None:
        buffer = Buffer()
        held.append(weakref.ref(buffer))
        raise MemoryError

    held: list[weakref.ref[Buffer]] = []
    try:
        try:
            fail()
        except MemoryError as cause:
            raise OSError("broken image") from cause
    except OSError as error:
        loop: BaseException = error
    assert held[0]() is not None
    assert loop.__cause__ is not None
    loop.__cause__.__cause__ = loop
    forget(loop)
    assert held[0]() is None


@pytest.mark.parametrize("where", ["tighten", "follow"])
def test_no_memory_to_turn_to_a_tighter_plan_is_no_memory(image_folder: Path, where: str) -> None:
    def fail(_plan: Plan) -> Any:
        raise MemoryError("not even for that")

    short = Try(image_folder)
    setattr(short.job, where, fail)
    short.backend.raises[2] = out()
    with pytest.raises(NoMemory, match="no room 0"):
        short.train()
    assert short.job.state.step == 2


def test_an_error_of_the_tighter_plan_itself_comes_through(image_folder: Path) -> None:
    def fail(_plan: Plan) -> Any:
        raise DataError("the disk is full")

    short = Try(image_folder)
    short.job.follow = fail
    short.backend.raises[2] = out()
    with pytest.raises(DataError):
        short.train()


def test_weights_that_a_failed_step_has_updated_in_part_are_known_for_it(image_folder: Path) -> None:
    short = Try(image_folder)
    whole = []
    short.job.follow = lambda _plan: whole.append(short.job.is_whole)
    counts = short.backend.optimizer_steps
    ahead = [0]
    short.backend.optimizer_steps = lambda: counts() | {"bias": len(short.backend.seen) + ahead[0]}  # type: ignore[method-assign]
    step = short.backend.step

    def updates_one(*args: Any, **more: Any) -> Any:
        ahead[0] = 0
        try:
            return step(*args, **more)
        except MemoryError:
            ahead[0] = 1
            raise

    short.backend.step = updates_one  # type: ignore[method-assign]
    short.backend.raises[2] = out(2)
    short.train()
    assert whole == [False, False]
    assert short.job.is_whole


def test_a_job_that_has_not_begun_is_whole(image_folder: Path) -> None:
    assert make_job(image_folder)[0].is_whole


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield make_images(tmp_path_factory.mktemp("few"), {"a": 9, "b": 8}, size=8)


FAILURES = st.dictionaries(st.integers(0, 8), st.integers(1, 3), max_size=4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    failures=FAILURES,
    evaluations=st.lists(st.booleans(), max_size=6),
    after=st.integers(0, 3),
    batch=st.integers(1, 16),
    stop=st.integers(1, 8),
)
def test_whatever_fails_every_image_is_seen_once_an_epoch(
    few_images: Path, failures: dict[int, int], evaluations: list[bool], after: int, batch: int, stop: int
) -> None:
    """Also when the run is stopped and gone on with meanwhile."""

    def least(plan: Plan) -> Plan:
        try:
            return halved(plan)
        except DoesNotFit:
            return plan

    options: dict[str, Any] = {"steps": 9, "batch_size": batch, "method": "alast"}
    calm = Try(few_images, **options).train()
    short = Try(few_images, least, **options)
    short.backend.raises = {step: out(times) for step, times in failures.items()}
    short.backend.raises_after = after
    short.backend.evaluation_raises = [MemoryError("no room") if fails else None for fails in evaluations]
    original = short.watcher.step

    def watch(event: StepEvent) -> None:
        original(event)
        if event.step == stop:
            short.job.stop.set()

    short.watcher.step = watch  # type: ignore[method-assign]
    seen = short.backend.seen
    try:
        short.train()
    except (Interruption, NoMemory):
        state = short.job.state
        assert state.step == len(seen)
        again = short.resumed(few_images, tighten=least, **options)
        again.backend.raises = {step: left for step, left in short.backend.raises.items() if left}
        again.train()
        seen = seen + again.backend.seen
    assert seen == calm.backend.seen
    images = len(calm.job.train_images.paths)
    order = [image for step in seen for image in step]
    for start in range(0, len(order) - images + 1, images):
        assert len(set(order[start : start + images])) == images


def test_work_that_fails_is_not_tried_more_often_than_said(image_folder: Path) -> None:
    job, _, _ = make_job(image_folder)
    job.tighten = lambda plan: plan
    tries, given_back = [], []

    def work() -> None:
        tries.append(1)
        raise MemoryError

    with pytest.raises(NoMemory, match="MemoryError"):
        within_memory(job, "step 1", work, lambda: given_back.append(1))
    assert len(tries) == len(given_back) == MAX_TIGHTENINGS + 1
