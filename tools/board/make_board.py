"""`make board`: edgetune on an emulated arm64 board, judged from outside.

Builds a bootable Debian 12 with a constraints file's packages (kept under build/board/), boots it under QEMU with so much
memory and no swap, installs the built wheel there, fine-tunes, interrupts, resumes and evaluates the bundled model, and
sees what does not fit killed without a cap and refused with one. Emulated time says nothing about a board's speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import check  # noqa: E402
import record  # noqa: E402
import startup  # noqa: E402

from edgetune.profiles import load_profile  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = {
    "qemu-system-aarch64": "qemu-system-arm", "mmdebstrap": "mmdebstrap", "cpio": "cpio", "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
}  # fmt: skip
# Of the bundled images, so many a class: emulated decoding is slow.
TRAIN_EACH, VAL_EACH, CLASSES = 8, 2, 10
# What a step of LARGE_BATCH on all of the bundled model takes beside the runtime, at least: a board with more memory is given
# several times as many images, so that no board can do it.
LARGE_BATCH, LARGE_MIB, RUNTIME_MIB = 64, 320, 250


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mem", type=int, default=512, help="MiB of RAM")
    parser.add_argument("--cpu", default="cortex-a53", help="as `qemu-system-aarch64 -cpu help` names it")
    parser.add_argument("--cores", type=int, default=4)
    parser.add_argument("--profile", default="raspberry-pi-zero-2w")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints" / "board.txt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="add the result to benchmarks/results/board.jsonl")
    asked = parser.parse_args()
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        print(f"board: skipped, this machine has no {', '.join(missing)}. apt-get install --no-install-recommends "
              f"{' '.join(sorted(set(PROGRAMS.values())))}")  # fmt: skip
        return 0
    work = ROOT / "build" / "board"
    image = work / f"image-{asked.constraints.stem}"
    _image(image, asked.constraints)
    job = work / f"job-{asked.profile}-{asked.mem}-{asked.constraints.stem}"
    _job(job, asked)
    print(f"booting {asked.mem} MiB, {asked.cores} x {asked.cpu} ...", flush=True)
    with (work / f"{job.name}.console").open("w") as console:
        subprocess.run(
            ["bash", HERE / "boot.sh", image, job, str(asked.mem), asked.cpu, str(asked.cores)],
            stdout=console,
            check=False,
        )
    return _judge(job / "out", asked, image)


def _image(folder: Path, constraints: Path) -> None:
    """The image, built anew when what it is made of changed."""
    made_of = [constraints, *(HERE / name for name in ("also.txt", "image.sh", "init.sh", "boot-job.sh"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_of)).hexdigest()
    stamp = folder / "made-of"
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print(f"building an image with {constraints.name} (minutes) ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["bash", HERE / "image.sh", folder, constraints], check=True, env={**_environment()})
    stamp.write_text(digest)


def _environment() -> dict[str, str]:
    return {**os.environ, "PIP_PYTHON": sys.executable, "PIP_ROOT_USER_ACTION": "ignore"}


def _job(job: Path, asked: argparse.Namespace) -> None:
    """The job's folder: the wheel as it is built from here, a few of the bundled images, what the board runs."""
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(job), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    for name in ("job.sh", "anonymous.py", "unguarded.py"):
        shutil.copy(HERE / name, job)
    shutil.copy(ROOT / "benchmarks" / "startup.py", job)
    too_large = LARGE_BATCH * max(1, -(-(asked.mem - RUNTIME_MIB) // LARGE_MIB))
    settings = {"PROFILE": asked.profile, "STEPS": asked.steps, "BATCH": asked.batch, "TOO_LARGE": too_large}
    (job / "settings.sh").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    taken: dict[str, int] = {}
    with zipfile.ZipFile(ROOT / "edgetune" / "assets" / "digits.zip") as archive:
        for name in archive.namelist():
            folder = str(Path(name).parent)
            most = max(TRAIN_EACH, -(-too_large // CLASSES)) if "train" in folder else VAL_EACH
            if name.endswith(".png") and taken.setdefault(folder, 0) < most:
                taken[folder] += 1
                archive.extract(name, job / "images")


def _judge(out: Path, asked: argparse.Namespace, image: Path) -> int:
    usable = load_profile(ROOT / "device_profiles" / f"{asked.profile}.toml").usable_anonymous_bytes
    try:
        found = json.loads((out / "startup.json").read_text())
        lean = startup.is_lean(found)
        own = startup.added(found, "torch", "ready")
        print(
            f"edgetune beside torch {found['torch']}: {own['anonymous_bytes'] / check.MIB:.1f} MiB anonymous, "
            f"{own['file_bytes'] / check.MIB:.1f} file-backed, {own['of_torch']:.2f} of the time of import torch"
        )
    except (OSError, ValueError, KeyError) as error:
        found, lean = {}, False
        print(f"board: no startup figures: {type(error).__name__}: {error}")
    wrong = check.problems(out, usable_anonymous_bytes=usable, lean=lean)
    for line in wrong:
        print(f"board: {line}")
    if wrong:
        print(f"board: FAILED; what came back is in {out}")
        return 1
    packages = (image / "packages.txt").read_text().split()
    torch = next(name for name in packages if name.startswith("torch-"))
    what = f"{asked.profile}, {asked.mem} MiB, {asked.cores} x {asked.cpu}, {torch}"
    print(check.closing_line(out, usable_anonymous_bytes=usable, what=what))
    if asked.record:
        record.add(out, what, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
