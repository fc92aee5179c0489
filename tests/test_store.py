"""Saving a run's weights and going on from them: the kernel's mark says what each takes beside the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

from edgetune import process
from edgetune.units import MIB

CHILD = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from edgetune.allocator import limit_allocator
limit_allocator()
import torch
torch.set_num_threads(1)
from timm.models.vision_transformer import VisionTransformer
from edgetune import process
from edgetune.backends.pytorch import TorchBackend, warm_up
from edgetune.checkpoint import create_run_folder, save_base
from edgetune.optim import OptimizerSettings
from edgetune.store import checkpoint_writer, restore, trainable_space, write_model
from edgetune.job import TrainingState

folder = Path(sys.argv[1])
# All that the store asks of a plan: the last two of four blocks train, and the head.
plan = SimpleNamespace(
    token_ceiling=(4,) * 4, draws=True, split_block=2, trained_blocks=2, embeddings_train=False, optimizer="adamw"
)
warm_up(OptimizerSettings())
found = {}

def backend():
    return TorchBackend(VisionTransformer(img_size=32, depth=4, num_classes=7), OptimizerSettings())

def measured(name, action):
    before = process.snapshot().rss_bytes
    process.reset_high_water()
    result = action()
    found[name] = process.measure()[1] - before
    return result

first = backend()
space = trainable_space(plan)
first.reserve(space)
for state in first.optimizer.state.values():
    state["exp_avg_sq"].fill_(0.5)
base = measured("save the base", lambda: save_base(folder, first.model_tensors()))
with torch.no_grad():
    first.model.head.bias.fill_(2.0)
write = checkpoint_writer(folder, plan, first, 0, base)
measured("save a checkpoint", lambda: write(TrainingState()))
measured("save the model", lambda: write_model(folder, first))
trained = {name: value for name, value in first.model.named_parameters() if name in first.trained_names(space)}
sizes = {
    "weights": sum(value.nbytes for value in first.model.parameters()),
    "trained": sum(value.nbytes for value in trained.values()),
    "state": sum(value.nbytes for state in first.optimizer.state.values() for value in state.values()),
    "largest": max(value.nbytes for value in first.model.parameters()),
}
second = backend()
measured("restore", lambda: restore(folder, plan, second).restore_optimizer())
again = second.model.state_dict()
assert all(torch.equal(value, again[name]) for name, value in first.model.state_dict().items())
assert second.optimizer.state.keys() == first.optimizer.state.keys() == trained.keys()
for name, state in first.optimizer.state.items():
    assert all(torch.equal(value, second.optimizer.state[name][key]) for key, value in state.items())
print(json.dumps([sizes, found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not process.reset_works(), reason="the high-water mark is Linux's, where it can be reset")
def test_saving_needs_no_memory_and_going_on_only_that_of_the_optimizers_state(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes, found = ({name: size / MIB for name, size in part.items()} for part in json.loads(done.stdout))
    assert sizes["weights"] > 100
    assert sizes["trained"] > 50
    assert sizes["state"] == 2 * sizes["trained"]
    restoring = found.pop("restore")
    assert len(found) == 3
    for what, taken in found.items():
        assert taken < 3, f"to {what} took {taken:.1f} MiB"
    # Some of it is code that is paged in: 3 MiB, and more in a fresh installation.
    assert sizes["state"] < restoring < sizes["state"] + 2 * sizes["largest"] + 6, f"{restoring:.1f} MiB"
