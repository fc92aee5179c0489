"""Training from artifacts with ONNX Runtime beside torch: memory, time, losses and what is learnt, in one run.

    python benchmarks/ort_vs_torch.py            # writes benchmarks/ort_vs_torch.md; needs edgetune[export]

Every run is `edgetune finetune` in a process of its own; ONNX Runtime's can't import torch. Rounds interleave the two, so
that a busy machine hits both alike. DeiT-Tiny's weights are random: its time, memory and losses count, not its accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefix_cache import make_images
from watching import watch
from writing import machine, table

from edgetune.units import MIB, parse_bytes

MODEL = "deit_tiny_patch16_224"
BATCH, IMAGES, EPOCHS = 8, 32, 3
CAP = "200MiB"
REPLAYED_STEPS = 20
SAMPLE_EPOCHS = 3
WITHOUT_TORCH = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision', 'onnx'))); "
    "from edgetune.__main__ import entry; entry()"
)
TORCH, ORT = "torch", "onnxruntime"
# All blocks above the split train; tokens change only where the name says so.
SETUPS: tuple[tuple[str, list[str]], ...] = (
    ("split 0", ["--split", "0", "--trained-blocks", "12", "--no-cache"]),
    ("upper 4", ["--split", "8", "--no-cache"]),
    ("upper 4, half the tokens", ["--split", "8", "--no-cache", "--split-tokens", "0.5"]),
    ("upper 4, from cached features", ["--split", "8"]),
    ("upper 4, half the tokens, from cached features", ["--split", "8", "--split-tokens", "0.5"]),
)
STILL = ["--initial-budget", "1", "--token-floor", "1"]
COLUMNS = (
    "what trains",
    "torch: a step, of torch's at split 0",
    "onnxruntime: the same",
    "torch: RSS above the runtime, MiB",
    "onnxruntime: the same",
    "torch: peak RSS of the process, MiB",
    "onnxruntime: the same",
)


class Figures(NamedTuple):
    step_seconds: float  # of training, once the cache is there
    added_bytes: int  # to the runtime's resident memory
    peak_bytes: int  # of the process, from outside


def command_of(backend: str, artifacts: Path, arguments: Sequence[str]) -> list[str]:
    """`edgetune finetune` on a backend, of the model that was exported."""
    if backend == TORCH:
        model = ["--model", MODEL, "--weights", str(artifacts / "model.safetensors"), "--split", "lowest"]
        return [sys.executable, "-m", "edgetune", "finetune", *model, *arguments]
    return [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        "finetune",
        "--backend",
        "ort",
        "--artifacts",
        str(artifacts),
        *arguments,
    ]


def run(command: Sequence[str], folder: Path) -> tuple[dict[str, Any], int]:
    """(the report, peak RSS from outside, bytes). Raises: SystemExit with the run's own words where it fails."""
    errors = folder.with_suffix(".stderr")
    code, peak = watch([*command, "--quiet", "--threads", "1", "--output", str(folder)], errors)
    if code:
        raise SystemExit(f"{' '.join(command)}\n{errors.read_text()}")
    report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return report, peak


def figures(report: dict[str, Any], peak_bytes: int) -> Figures:
    training = report["train_seconds"] - (report["cache_seconds"] or 0.0)
    return Figures(training / report["steps"], report["training_peak_bytes"], peak_bytes)


def setups(artifacts: Path, images: Path, work: Path, rounds: int) -> str:
    shared = ["--data", str(images), "-b", str(BATCH), "--epochs", str(EPOCHS), *STILL]
    found: dict[tuple[str, str], list[Figures]] = {}
    for number in range(rounds):
        for place, (name, arguments) in enumerate(SETUPS):
            for backend in (TORCH, ORT):
                report, peak = run(
                    command_of(backend, artifacts, [*shared, *arguments]), work / f"{number}-{place}-{backend}"
                )
                print(f"round {number + 1}, {name}, {backend}: {figures(report, peak)}", flush=True)
                found.setdefault((name, backend), []).append(figures(report, peak))
    best = {key: Figures(*(min(values) for values in zip(*runs, strict=True))) for key, runs in found.items()}
    unit = best[SETUPS[0][0], TORCH].step_seconds
    rows = []
    for name, _ in SETUPS:
        pair = [best[name, backend] for backend in (TORCH, ORT)]
        rows.append(
            [
                name,
                *(f"{each.step_seconds / unit:.2f}" for each in pair),
                *(f"{each.added_bytes / MIB:.0f}" for each in pair),
                *(f"{each.peak_bytes / MIB:.0f}" for each in pair),
            ]
        )
    return table(COLUMNS, rows)


def losses(folder: Path) -> list[float]:
    """Of each step, from a run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def replayed(artifacts: Path, images: Path, work: Path) -> list[str]:
    """Steps of ALaST from artifacts, with the cache, under a cap that torch does not even start in; then torch's losses."""
    steps = ["--steps", str(REPLAYED_STEPS), "-b", str(BATCH), "--opt", "sgd", "--data", str(images)]
    capped = [
        "--device",
        "auto",
        "--ram-cap",
        CAP,
        "--split",
        "8",
        "--no-head-first",
        "--cache-precision",
        "float32",
        *steps,
    ]
    report, peak = run(command_of(ORT, artifacts, capped), work / "capped")
    again = [sys.executable, "-m", "edgetune", "finetune", "--replay", str(work / "capped")]
    run(again, work / "replayed")
    there, here = losses(work / "replayed"), losses(work / "capped")
    apart = max(abs(one - other) for one, other in zip(here, there, strict=True))
    return [
        f"{MODEL} at 224 px, batch {BATCH}, ALaST, from artifacts under `--device auto --ram-cap {CAP}` with "
        f"{report['cached_blocks']} of its blocks cached: peak {peak / MIB:.1f} MiB of {parse_bytes(CAP) / MIB:.0f} from outside"
        f"{'' if peak <= parse_bytes(CAP) else ' OVER'}, predicted {report['predicted_peak_bytes'] / MIB:.1f}. "
        f"Its {len(here)} SGD steps, replayed by torch with the same images and selections (`--replay`): losses within "
        f"{apart:.0e} (bar: 1e-4)."
    ]


def learnt(work: Path) -> list[str]:
    """The bundled model on the bundled images, by both."""
    artifacts = work / "micro"
    export = [sys.executable, "-m", "edgetune", "export", "--model", "edgetune_micro", "--classes", "10", "-o"]
    subprocess.run([*export, str(artifacts)], check=True, capture_output=True)
    shared = ["-b", "32", "--epochs", str(SAMPLE_EPOCHS)]
    torch, _ = run(
        [sys.executable, "-m", "edgetune", "finetune", "--model", "edgetune_micro", "--split", "lowest", *shared],
        work / "micro-torch",
    )
    ort, _ = run(command_of(ORT, artifacts, shared), work / "micro-ort")
    apart = 100 * (ort["val_accuracy"] - torch["val_accuracy"])
    return [
        f"The bundled model on the bundled digits, {SAMPLE_EPOCHS} epochs of ALaST at its defaults: torch "
        f"{torch['val_accuracy']:.3f}, onnxruntime {ort['val_accuracy']:.3f} of {ort['val_images']} validation images, "
        f"{apart:+.1f} points (bar: within one)."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder to keep the runs in; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        images, artifacts = work / "images", work / "artifacts"
        make_images(images, IMAGES)
        export = [sys.executable, "-m", "edgetune", "export", "--model", MODEL, "--no-pretrained", "--classes", "2"]
        subprocess.run([*export, "--split", "0,8", "-o", str(artifacts)], check=True, capture_output=True)
        facts = [*replayed(artifacts, images, work), *learnt(work)]
        rows = setups(artifacts, images, work, args.rounds)
    text = (
        "# ONNX Runtime beside torch\n\n"
        f"Made by `python benchmarks/ort_vs_torch.py --rounds {args.rounds}` on {machine()}. One thread.\n\n"
        + "\n\n".join(facts)
        + f"\n\n{MODEL}, 224 px, batch {BATCH}, AdamW, {args.rounds} interleaved rounds, the best of each; a step's time is "
        f"without caching. onnxruntime computes gradients of all blocks above its variant's split.\n\n{rows}\n"
    )
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
