"""What a run costs before its first step, beside bare torch: modules, resident memory and time, in fresh processes.

    python benchmarks/startup.py                       the table, benchmarks/startup.md
    python benchmarks/startup.py --once MODEL          one process, as JSON (what `make board` runs on the board)
    python benchmarks/startup.py --once MODEL --timm   the same with timm imported, as it was before edgetune had its own ViT

Needs Linux. Times are relative to `import torch` in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("edgetune_micro", "deit_tiny_patch16_224")
# What a small board has no room for. (CUDA builds of torch import some of it by themselves.)
HEAVY = ("timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub")
MIB = 2**20
RUNS = 3
# What the issue that asked for it allows edgetune beside torch, before a model is built.
MOST_ADDED_BYTES, MOST_TIME = 30 * MIB, 0.3


def _resident() -> dict[str, int]:
    kilobytes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            kilobytes[name] = int(value.split()[0])
    return {"anonymous_bytes": kilobytes["RssAnon"] * 1024, "file_bytes": kilobytes["RssFile"] * 1024}


def _now() -> dict[str, Any]:
    return {**_resident(), "seconds": time.perf_counter(), "modules": len(sys.modules)}


def once(model: str, *, timm: bool) -> dict[str, Any]:
    """The process at four moments: before torch, after it, before the model is built, after the first step."""
    marks = {"start": _now()}
    import torch

    marks["torch"] = _now()
    torch_has = [name for name in HEAVY if name in sys.modules]
    if timm:
        importlib.import_module("timm.models.vision_transformer")
    import numpy as np

    import edgetune.cli.finetune
    import edgetune.run  # noqa: F401
    from edgetune.backends.pytorch import TorchBackend, own_kernels
    from edgetune.cost import all_tokens_kept
    from edgetune.optim import OptimizerSettings
    from edgetune.vit.models import ModelSource, describe, load_model

    own_kernels()
    torch.set_num_threads(1)
    source = ModelSource(name=model, pretrained=model == "edgetune_micro")
    shape, preprocess = describe(source, 10)
    marks["ready"] = _now()
    backend = TorchBackend(load_model(source, 10).model, OptimizerSettings())
    images = np.zeros((2, 3, preprocess.height_px, preprocess.width_px), np.float32)
    backend.step(
        [(images, np.zeros(2, np.int64))],
        all_tokens_kept(shape, (True,) * shape.depth),
        images=2,
        weight_sum=2.0,
        learning_rate=1e-4,
        seed=0,
        with_deltas=True,
    )
    marks["step"] = _now()
    return {
        "model": model,
        "torch": torch.__version__,
        "weights_bytes": shape.weight_bytes,
        "marks": marks,
        "heavy": [name for name in HEAVY if name in sys.modules and name not in torch_has],
    }


def added(found: dict[str, Any], since: str, until: str) -> dict[str, float]:
    """What lies between two moments: bytes, modules, and seconds relative to `import torch`."""
    marks = found["marks"]
    change = {key: marks[until][key] - marks[since][key] for key in marks[since]}
    importing = marks["torch"]["seconds"] - marks["start"]["seconds"]
    return {**change, "of_torch": change["seconds"] / importing}


def is_lean(found: dict[str, Any]) -> bool:
    """Whether edgetune adds no more than it may, before the model is built."""
    own = added(found, "torch", "ready")
    within = own["anonymous_bytes"] + own["file_bytes"] <= MOST_ADDED_BYTES
    return within and own["of_torch"] <= MOST_TIME and not found["heavy"]


def _row(name: str, found: list[dict[str, Any]]) -> list[str]:
    torch, own, step = (
        [added(each, *span) for each in found] for span in (("start", "torch"), ("torch", "ready"), ("ready", "step"))
    )

    def middle(values: list[dict[str, float]], key: str) -> float:
        return sorted(value[key] for value in values)[len(values) // 2]

    memory = [
        f"{middle(values, 'anonymous_bytes') / MIB:.1f} + {middle(values, 'file_bytes') / MIB:.1f}"
        for values in (torch, own, step)
    ]
    return [
        name,
        memory[0],
        memory[1],
        f"{middle(own, 'modules'):.0f}",
        f"{middle(own, 'of_torch'):.2f}",
        ", ".join(found[0]["heavy"]) or "-",
        memory[2],
        f"{middle(step, 'of_torch'):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", metavar="MODEL")
    parser.add_argument("--timm", action="store_true")
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(once(asked.once, timm=asked.timm)))
        return
    from writing import machine, table

    rows = []
    for model in MODELS:
        for timm in (True, False):
            command = [sys.executable, __file__, "--once", model, *(["--timm"] if timm else [])]
            found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]
            rows.append(_row(f"{model}, {'timm imported' if timm else 'own ViT'}", found))
    columns = [
        "", "import torch, MiB", "edgetune before the model, MiB", "modules", "time, of torch's", "heavy imports",
        "model and first step, MiB", "time, of torch's",
    ]  # fmt: skip
    text = (
        "# What a run costs before its first step\n\n"
        "`python benchmarks/startup.py`: fresh processes, resident memory as anonymous + file-backed, medians of "
        f"{RUNS}.\nThe figures of a small board are in [board.md](board.md).\n\n{table(columns, rows)}\n\n{machine()}\n"
    )
    (Path(__file__).parent / "startup.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
