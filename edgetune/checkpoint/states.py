"""Checkpoints of a run: `checkpoints/base.safetensors` once, then a folder for each state that is kept.

    checkpoints/base.safetensors                       the weights that the run started from
    checkpoints/step-00000120/tensors.safetensors      what changed since: trained weights, optimizer state
    checkpoints/step-00000120/state.json               `Checkpoint`: everything else, and the tensors' digest

A folder gets its name only when all of it is on the disk, and older ones go only after that, so a kill or a power cut
at any moment leaves at least one that loads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgetune.checkpoint.files import (
    disk_errors,
    remove_half_made,
    require_free_bytes,
    sync_folder,
    temporary_path,
    write_atomically,
)
from edgetune.checkpoint.tensors import Array, open_tensors, read_tensors, save_tensors
from edgetune.errors import RunFolderError

FORMAT_VERSION = 1
_FOLDER = "checkpoints"
_BASE = "base.safetensors"
_STATE = "state.json"
# A second state of the same step (saved after an evaluation, say) gets a serial number: nothing is ever replaced.
_NAME = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")
_STATE_BYTES = 1024**2  # room for state.json and the file system's own
_MAX_STATE_BYTES = 64 * 1024**2


class OptimizerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which optimizer the tensors belong to, and how many steps each parameter has seen, by the parameter's name."""

    name: str
    steps: dict[str, int] = {}


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's state besides its tensors, as `state.json` holds it.

    `step`: optimizer steps done. `training`: what the loop keeps (counters, best epoch, ALaST's budgets), as built-in
    values; floats come back to the bit. `base_sha256`: the base weights that the tensors change.
    `tensors_file` and `tensors_sha256` are filled in by `save_checkpoint`.
    """

    format_version: int = FORMAT_VERSION
    step: int
    seed: int
    optimizer: OptimizerRecord
    training: dict[str, Any]
    base_sha256: str
    tensors_file: str = "tensors.safetensors"
    tensors_sha256: str = ""


class Restored(NamedTuple):
    """What `latest_checkpoint` found; each of its tensors is read when it is asked for.

    `notes` are sentences for the user: which newer states were damaged.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Array]
    notes: tuple[str, ...]


def save_base(run_folder: Path, tensors: Mapping[str, Array]) -> str:
    """Write the weights that a run starts from, once, before its first checkpoint; returns the file's SHA-256.

    Raises: RunFolderError as `save_tensors`, and if the run has checkpoints already (they stand on the base it has).
    """
    folder = run_folder / _FOLDER
    if _found(folder):
        raise RunFolderError(f"{folder} holds checkpoints already. Resume this run, or choose another folder.")
    _make(folder)
    return save_tensors(folder / _BASE, tensors)


def read_base(run_folder: Path, sha256: str) -> Iterator[tuple[str, Array]]:
    """The base weights, one tensor at a time. Raises: RunFolderError as `read_tensors`."""
    return read_tensors(run_folder / _FOLDER / _BASE, sha256)


def open_base(run_folder: Path, sha256: str) -> Mapping[str, Array]:
    """The base weights, each read when it is asked for. Raises: RunFolderError as `open_tensors`."""
    return open_tensors(run_folder / _FOLDER / _BASE, sha256)


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint, tensors: Mapping[str, Array]) -> Path:
    """Keep this state and the newest one of an earlier step; returns the new state's folder.

    States of the same and of later steps go: the run went on from an earlier state, so they are not its past.

    Raises: RunFolderError for a full or read-only disk; the states kept before are untouched then.
    """
    folder = run_folder / _FOLDER
    try:
        final = _write(folder, checkpoint, tensors)
    except RunFolderError as error:
        raise RunFolderError(
            f"Step {checkpoint.step} was not saved; what was saved before is untouched. {error}"
        ) from error
    _remove_others(folder, final, checkpoint.step)
    return final


def _write(folder: Path, checkpoint: Checkpoint, tensors: Mapping[str, Array]) -> Path:
    _make(folder)
    with disk_errors(folder):
        remove_half_made(folder)
        require_free_bytes(folder, sum(tensor.nbytes for tensor in tensors.values()) + _STATE_BYTES)
        temporary = temporary_path(folder)
        try:
            temporary.mkdir()
            digest = save_tensors(temporary / checkpoint.tensors_file, tensors)
            complete = msgspec.structs.replace(checkpoint, tensors_sha256=digest)
            write_atomically(temporary / _STATE, msgspec.json.format(msgspec.json.encode(complete), indent=1))
            final = _free_name(folder, checkpoint.step)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder)  # before the others go
    return final


def latest_checkpoint(run_folder: Path) -> Restored | None:
    """The newest state that loads, every byte checked; None if the run has none yet.

    Needs no memory for the state's tensors: they stay in their file until they are asked for.

    Raises: RunFolderError if there are states and none of them loads, with the reason for each.
    """
    reasons: list[str] = []
    found = _found(run_folder / _FOLDER)
    for folder in reversed(found):
        try:
            checkpoint = _read_state(folder / _STATE)
            tensors = open_tensors(folder / checkpoint.tensors_file, checkpoint.tensors_sha256)
        except RunFolderError as error:
            reasons.append(str(error))
            continue
        notes = tuple(f"{reason} Going on from step {checkpoint.step} instead." for reason in reasons)
        return Restored(checkpoint, tensors, notes)
    if reasons:
        raise RunFolderError(f"{run_folder} has no checkpoint that can be read. " + " ".join(reasons))
    return None


def _read_state(path: Path) -> Checkpoint:
    with disk_errors(path, "read"), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_STATE_BYTES:
            raise RunFolderError(f"{path} is damaged: no state is as large.")
        data = file.read()
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise RunFolderError(
                f"{path} has format {version}; this edgetune reads format {FORMAT_VERSION}. "
                "Resume with the edgetune that wrote it."
            )
        state = msgspec.json.decode(data, type=Checkpoint)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.") from error
    if Path(state.tensors_file).name != state.tensors_file:
        raise RunFolderError(f"{path} is damaged: its tensors are outside its folder ({state.tensors_file!r}).")
    return state


class _Version(msgspec.Struct):
    format_version: int


def _make(folder: Path) -> None:
    if not folder.is_dir():
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def _found(folder: Path) -> list[Path]:
    """The states in `folder`, oldest step first."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{folder} can't be read: {error.strerror}. Check the path and permissions.") from error
    return sorted((folder / name for name in names if _NAME.fullmatch(name)), key=_place)


def _place(folder: Path) -> tuple[int, int]:
    """(step, serial number) of a state's folder."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1)), int(match.group(2) or 0)


def _free_name(folder: Path, step: int) -> Path:
    serials = [serial for found, serial in map(_place, _found(folder)) if found == step]
    return folder / (f"step-{step:08d}-{max(serials) + 1}" if serials else f"step-{step:08d}")


def _remove_others(folder: Path, newest: Path, step: int) -> None:
    """Remove all states but `newest` and the last one of an earlier step. One that can't be removed is left."""
    earlier = [state for state in _found(folder) if _place(state)[0] < step]
    for state in _found(folder):
        if state != newest and state != (earlier or [newest])[-1]:
            # Out of the way first: a kill in the middle of removing must not leave half a state under its name.
            doomed = temporary_path(folder)
            with suppress(OSError):
                state.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
