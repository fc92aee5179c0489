"""One report as a run would write it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgetune.data import BadImage
from edgetune.report import RunReport, verdict_line

MIB = 1024**2


def make(**changes: Any) -> RunReport:
    """A finished, simulated run of four classes, one of them without validation images."""
    report = RunReport(
        model="deit_tiny_patch16_224",
        method="alast",
        device="jetson-nano",
        simulated=True,
        backend="pytorch",
        seed=0,
        threads=2,
        versions={"python": "3.11.7", "torch": "2.14.1"},
        stopped_because="finished",
        notes=("the prefix was cached",),
        verdict=verdict_line(
            device_peak_bytes=412 * MIB,
            cap_bytes=512 * MIB,
            predicted_peak_bytes=430 * MIB,
            enforced_by="watched, not enforced",
        ),
        within_cap=True,
        cap_bytes=512 * MIB,
        device_peak_bytes=412 * MIB,
        predicted_peak_bytes=430 * MIB,
        device_runtime_bytes=214 * MIB,
        training_peak_bytes=198 * MIB,
        runtime_bytes=507 * MIB,
        peak_rss_bytes=705 * MIB,
        phases={"load": 520 * MIB, "train": 705 * MIB},
        predicted_phases={"train": 700 * MIB},
        classes=("ant", "bee", "cat", "dog"),
        train_images=900,
        val_images=100,
        bad_images=(BadImage("train/ant/1.jpg", "truncated"),),
        val_accuracy=0.953,
        val_accuracy_before=0.25,
        val_balanced_accuracy=0.9,
        val_topk_accuracy=1.0,
        topk=4,
        val_loss=0.1823,
        val_recall={"ant": 1.0, "bee": 0.75, "cat": None, "dog": 0.5},
        batch_size=32,
        micro_batch=8,
        learning_rate=5e-4,
        split_block=6,
        trained_blocks=3,
        steps=450,
        epochs=10.0,
        best_epoch=7.0,
        train_seconds=62.0,
        eval_seconds=3.1,
        total_seconds=70.0,
        images_per_second=212.34,
        flops=12 * 10**11,
        flops_full=32 * 10**11,
        flops_share=0.375,
        tokens_share=0.61,
    )
    return msgspec.structs.replace(report, **changes)


@pytest.fixture
def report() -> RunReport:
    return make()
