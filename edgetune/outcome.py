"""What happened, as a report: the run's settings, plan and state, and what the meter saw."""

from __future__ import annotations

import msgspec

from edgetune import cost, system
from edgetune.cost import ViTShape
from edgetune.data import DataFolder
from edgetune.job import TrainingState
from edgetune.judge import Judge
from edgetune.memory import MemoryPeaks
from edgetune.planner import Plan
from edgetune.report import RunReport, verdict_line
from edgetune.settings import RunSettings

PACKAGES = ("edgetune", "torch", "torchvision", "timm", "onnxruntime-training-cpu", "numpy", "pillow", "safetensors")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that a report is made of."""

    settings: RunSettings
    judge: Judge
    data: DataFolder
    shape: ViTShape
    plan: Plan
    state: TrainingState
    peaks: MemoryPeaks
    backend: str
    enforced_by: str
    stopped: str
    learning_rate: float
    steps_per_epoch: int
    cached_bytes: int | None
    cache_precision: str | None
    notes: tuple[str, ...]


def make_report(outcome: Outcome) -> RunReport:
    judge, plan, state, peaks, data = outcome.judge, outcome.plan, outcome.state, outcome.peaks, outcome.data
    # A resumed run's earlier part counts too.
    device_peak = max(judge.device_peak_bytes(peaks), state.device_peak_bytes)
    best = state.best
    flops_full = cost.full_fine_tuning_flops(outcome.shape, state.images)
    return RunReport(
        model=outcome.settings.model,
        method=plan.method,
        device=judge.device,
        simulated=judge.simulated,
        backend=outcome.backend,
        seed=outcome.settings.seed,
        threads=plan.threads,
        versions=system.versions(PACKAGES),
        stopped_because=outcome.stopped,
        notes=outcome.notes,
        verdict=verdict_line(
            device_peak_bytes=device_peak,
            cap_bytes=plan.cap_bytes,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            enforced_by=outcome.enforced_by,
        ),
        within_cap=device_peak <= plan.cap_bytes,
        enforced_by=outcome.enforced_by,
        tightenings=state.tightenings,
        cap_bytes=plan.cap_bytes,
        device_peak_bytes=device_peak,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        device_runtime_bytes=judge.device_runtime_bytes,
        training_peak_bytes=max(peaks.training_peak_bytes, device_peak - judge.device_runtime_bytes)
        if judge.simulated
        else peaks.training_peak_bytes,
        runtime_bytes=peaks.runtime_bytes,
        peak_rss_bytes=peaks.peak_rss_bytes,
        peak_anonymous_bytes=peaks.peak_anonymous_bytes,
        peak_file_bytes=peaks.peak_file_bytes,
        peak_swap_bytes=peaks.peak_swap_bytes,
        children_peak_bytes=peaks.children_peak_bytes,
        peak_live_bytes=peaks.peak_live_bytes,
        cuda_peak_bytes=peaks.cuda_peak_bytes,
        phases=peaks.phases,
        predicted_phases=plan.predicted_phase_bytes,
        classes=data.classes,
        train_images=len(data.train.paths),
        val_images=len(data.val.paths),
        bad_images=data.bad,
        token_score=plan.token_score,
        evaluation_tokens=None
        if best is None
        else state.evaluation_tokens[-1]
        if state.evaluation_tokens
        else plan.token_ceiling[0],
        val_accuracy=best.accuracy if best else None,
        val_accuracy_before=state.before.accuracy if state.before else None,
        val_balanced_accuracy=best.balanced_accuracy if best else None,
        val_topk_accuracy=best.topk_accuracy if best else None,
        topk=best.topk if best else None,
        val_loss=best.loss if best else None,
        val_recall=dict(zip(data.classes, best.recall, strict=True)) if best else {},
        batch_size=plan.batch_size,
        micro_batch=plan.micro_batch,
        learning_rate=outcome.learning_rate,
        split_block=plan.split_block,
        trained_blocks=plan.trained_blocks,
        steps=state.step,
        epochs=state.step / outcome.steps_per_epoch,
        best_epoch=state.best_epoch,
        cached_blocks=plan.prefix.blocks if plan.prefix is not None and outcome.cached_bytes is not None else 0,
        cache_bytes=outcome.cached_bytes,
        cache_written_bytes=None if outcome.cached_bytes is None else state.cache_written_bytes,
        cache_precision=outcome.cache_precision,
        pictures_written_bytes=state.scratch_written_bytes,
        look_seconds=state.look_seconds,
        cache_seconds=None if outcome.cached_bytes is None else state.cache_seconds,
        dropped_weights_bytes=None if outcome.cached_bytes is None else state.dropped_bytes,
        train_seconds=state.train_seconds + state.cache_seconds,
        eval_seconds=state.eval_seconds,
        total_seconds=state.total_seconds,
        images_per_second=state.images / state.train_seconds if state.train_seconds else None,
        flops=state.flops,
        flops_full=flops_full,
        flops_share=state.flops / flops_full if flops_full else None,
        tokens_share=state.token_share_sum / state.step if state.step else None,
    )
