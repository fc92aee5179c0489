"""What each step of a run trained and kept, one line of JSON a step: so that another run can do the same steps again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgetune.checkpoint import write_atomically
from edgetune.checkpoint.files import disk_errors
from edgetune.cost import Selection
from edgetune.errors import RunFolderError

SELECTIONS_FILE = "selections.jsonl"


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step, from 1. `trains` by block; `tokens`: patch tokens that each block sees."""

    step: int
    trains: tuple[bool, ...]
    tokens: tuple[int, ...]
    embeddings_train: bool = False


class SelectionLog:
    """Appends to the file of a run; what was written after the step it goes on from is written again."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / SELECTIONS_FILE
        kept = [line for line in _lines(self._path) if line.step <= step] if self._path.exists() else []
        write_atomically(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))

    def append(self, step: int, selection: Selection) -> None:
        """Raises: RunFolderError if the disk refuses."""
        line = Line(step, selection.trains, selection.tokens, selection.embeddings_train)
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def read_selections(folder: Path) -> tuple[Selection, ...]:
    """Of each step of a run, in order. Raises: RunFolderError if the run has no such file, or it is damaged."""
    path = folder / SELECTIONS_FILE
    with disk_errors(path, "read"):
        lines = _lines(path)
    if [line.step for line in lines] != list(range(1, len(lines) + 1)):
        raise RunFolderError(f"{path} is damaged: steps are missing. Replay another run.")
    return tuple(Selection(line.trains, line.tokens, line.embeddings_train) for line in lines)


def _lines(path: Path) -> list[Line]:
    """All whole lines; one that a kill cut off at the end is left out."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        return [msgspec.json.decode(line, type=Line) for line in whole.split(b"\n") if line]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.") from error
