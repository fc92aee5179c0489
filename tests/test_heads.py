"""The classifier is fitted first, once, within what was planned, and only where the model has one that can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from doubles import FakeBackend, make_images
from jobs import Watcher, make_job
from running import Witness, cli, finetune, resume

from edgetune.backends.base import Array, Images
from edgetune.heads import fit_head
from edgetune.job import Interruption, Job, NoMemory
from edgetune.report import read_report
from edgetune.trainer import evaluate


class _Headed(FakeBackend):
    """Its features are the pixels, and its classifier can be set. `errors` are raised by the next calls, one each."""

    has_linear_head = True

    def __init__(self, errors: list[Exception] | None = None) -> None:
        super().__init__(2, 3 * 8 * 8)
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.errors = errors or []
        self.bias: Array = np.zeros(2, np.float32)

    def head_inputs(self, inputs: Images, cached_blocks: int, patch_tokens: tuple[int, ...]) -> Array:
        if self.errors:
            raise self.errors.pop(0)
        self.asked.append((len(inputs), patch_tokens))
        return inputs.reshape(len(inputs), -1)

    def set_head(self, weight: Array, bias: Array) -> None:
        self.weight, self.bias = np.ascontiguousarray(weight.T), bias

    def evaluate(self, inputs: Images, cached_blocks: int = 0, patch_tokens: tuple[int, ...] | None = None) -> Array:
        return super().evaluate(inputs, cached_blocks, patch_tokens) + self.bias


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", {"ant": 30, "bee": 30})


def _job(images: Path, backend: FakeBackend, **changes: object) -> tuple[Job, Watcher]:
    job, watcher, _ = make_job(images, **changes)
    job.backend = backend
    return job, watcher


def test_a_fitted_classifier_tells_more_than_a_fresh_one(images: Path) -> None:
    backend = _Headed()
    job, watcher = _job(images, backend, epochs=8)
    assert evaluate(job, job.train_images).accuracy < 0.7
    fit_head(job)
    assert evaluate(job, job.train_images).accuracy > 0.9
    assert backend.weight.any()
    assert any(note.startswith("classifier first: fitted to") for note in watcher.notes)
    # Each training image once, in batches of an evaluation, on the tokens that are trained on.
    assert sum(count for count, _ in backend.asked) == len(job.train_images.paths)
    assert {tokens for _, tokens in backend.asked} == {(16, 16, 16, 16)}
    assert max(count for count, _ in backend.asked) <= job.plan.evaluation_batch


def test_no_more_than_a_quarter_of_what_the_run_sees_is_looked_at(images: Path) -> None:
    backend = _Headed()
    job, _ = _job(images, backend, steps=10)
    fit_head(job)
    assert sum(count for count, _ in backend.asked) == 10 * 8 // 4


@pytest.mark.parametrize(
    "changes", [{"method": "full"}, {"method": "head"}, {"head_first": False}, {"pretrained": False}, {"steps": 1}]
)
def test_where_it_is_not_wanted_or_cant_pay_nothing_is_fitted(images: Path, changes: dict[str, object]) -> None:
    backend = _Headed()
    job, _ = _job(images, backend, **changes)
    fit_head(job)
    assert not backend.asked
    assert not backend.weight.any()


def test_full_fine_tuning_fits_it_where_that_is_asked_for(images: Path) -> None:
    backend = _Headed()
    job, _ = _job(images, backend, method="full", head_first=True)
    fit_head(job)
    assert backend.weight.any()


def test_a_model_without_one_linear_classifier_is_left_alone(images: Path) -> None:
    backend = _Headed()
    backend.has_linear_head = False
    job, _ = _job(images, backend)
    fit_head(job)
    assert not backend.asked


def test_a_run_that_goes_on_keeps_the_classifier_it_has(images: Path) -> None:
    backend = _Headed()
    job, _ = _job(images, backend)
    job.state.step = 3
    fit_head(job)
    assert not backend.asked


def test_a_stop_ends_it_before_the_classifier_changes(images: Path) -> None:
    backend = _Headed()
    job, _ = _job(images, backend)
    job.stop.set()
    with pytest.raises(Interruption):
        fit_head(job)
    assert not backend.weight.any()


def test_where_memory_runs_out_it_is_done_again_in_smaller_batches(images: Path) -> None:
    plain, failing = _Headed(), _Headed([MemoryError("no more")])
    job, _ = _job(images, plain)
    fit_head(job)
    job, watcher = _job(images, failing)
    batch = job.plan.evaluation_batch
    fit_head(job)
    assert np.allclose(failing.weight, plain.weight, atol=1e-6)
    assert max(count for count, _ in failing.asked) < min(batch, len(job.train_images.paths))
    assert any("fitting the classifier: memory ran out" in note for note in watcher.notes)
    job, _ = _job(images, _Headed([MemoryError("no more")] * 9))
    with pytest.raises(NoMemory):
        fit_head(job)


# With a real model


def test_what_the_classifier_is_given_times_its_weights_is_what_is_evaluated() -> None:
    torch = pytest.importorskip("torch")
    import zoo

    from edgetune.backends.pytorch import TorchBackend
    from edgetune.optim import OptimizerSettings

    for name in ("deit_tiny", "dinov2 with registers", "inner norms", "siglip", "average, register"):
        model = zoo.build(name)
        backend = TorchBackend(model, OptimizerSettings())
        assert backend.has_linear_head, name
        inputs = zoo.images(model).numpy()
        tokens = (model.patch_embed.num_patches,) * zoo.depth(model)
        features = backend.head_inputs(inputs, 0, tokens)
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((zoo.CLASSES, features.shape[1])).astype(np.float32)
        bias = rng.standard_normal(zoo.CLASSES).astype(np.float32)
        backend.set_head(weight, bias)
        assert np.allclose(backend.evaluate(inputs), features @ weight.T + bias, rtol=1e-4, atol=1e-4), name
    assert not TorchBackend(zoo.build("distilled"), OptimizerSettings()).has_linear_head
    assert torch.is_grad_enabled()


def test_a_run_begins_with_a_classifier_that_tells_something(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    finetune(None, tmp_path / "first", steps=40, batch_size=32)
    finetune(None, tmp_path / "plain", steps=40, batch_size=32, head_first=False)
    first, plain = read_report(tmp_path / "first"), read_report(tmp_path / "plain")
    assert first.val_accuracy_before is not None
    assert plain.val_accuracy_before is not None
    assert first.val_accuracy_before > 0.6 > 0.3 > plain.val_accuracy_before
    assert "head" in first.phases
    assert first.predicted_phases["head"] > 0
    assert "head" not in plain.phases


def test_a_run_that_is_stopped_before_its_first_step_fits_it_again(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    changes = {"steps": 12, "batch_size": 32, "checkpoint_every": 4}
    finetune(None, tmp_path / "whole", **changes)

    class Stopped(Witness):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("classifier first"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(None, tmp_path / "stopped", Stopped(), **changes)
    resume(tmp_path / "stopped")
    whole, stopped = read_report(tmp_path / "whole"), read_report(tmp_path / "stopped")
    assert whole.val_loss == stopped.val_loss


def test_the_flag_turns_it_off() -> None:
    assert "--head-first" in cli("finetune", "--help").stdout
