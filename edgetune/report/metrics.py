"""`metrics.csv`: one row a step and one an evaluation, written as they happen, cut back to the checkpoint on resume."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from edgetune.checkpoint.files import disk_errors, write_atomically
from edgetune.errors import RunFolderError

# Units: epoch counts epochs done (0.5: half of the first); shares and accuracies from 0 to 1; memory in bytes; seconds
# of this step. A row of an evaluation has the val columns, a row of a step the others.
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "val_balanced_accuracy",
    "learning_rate",
    "images_per_second",
    "token_share",
    "trained_blocks",
    "memory_bytes",
    "seconds",
)
_HEADER = ",".join(COLUMNS).encode() + b"\n"
_VALIDATION = tuple(place for place, name in enumerate(COLUMNS) if name.startswith("val_"))


class MetricsLog:
    """Appends to one file. Every row is in the file when `append` returns; nothing stays open in between."""

    def __init__(self, path: Path) -> None:
        """A new file gets the header; an existing one is gone on with, less a last row that a kill cut off.

        Raises: RunFolderError if the file can't be written or read, or is another kind of table.
        """
        self.path = path
        with disk_errors(path):
            if not path.exists() or path.stat().st_size == 0:
                write_atomically(path, _HEADER)
                return
            with path.open("rb") as file:
                if file.readline(len(_HEADER)) != _HEADER:
                    raise RunFolderError(f"{path} is no table of this edgetune's metrics. Move it away.")
                file.seek(-1, 2)
                whole = file.read() == b"\n"
        if not whole:
            self._rewrite(float("inf"), keep_evaluation=True)

    def append(self, row: Mapping[str, float | None]) -> None:
        """Write one row; columns that `row` leaves out, or has as None, stay empty. A NaN is written as `nan`.

        Raises: ValueError for a column that there isn't; RunFolderError if the disk is full.
        """
        unknown = row.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"metrics.csv has no column {', '.join(sorted(unknown))}")
        line = ",".join(_text(row.get(name)) for name in COLUMNS).encode() + b"\n"
        with disk_errors(self.path), self.path.open("ab", buffering=0) as file:
            # One write, so that a kill leaves all of it or none.
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate_after(self, step: int, *, keep_evaluation: bool = True) -> None:
        """Remove the rows past `step`, which a resumed run writes again, and rows that are damaged.

        `keep_evaluation=False`: the evaluation at `step` itself will be done again too.
        """
        self._rewrite(step, keep_evaluation=keep_evaluation)

    def _rewrite(self, last_step: float, *, keep_evaluation: bool) -> None:
        def write(file: BinaryIO) -> None:
            file.write(_HEADER)
            with self.path.open("rb") as old:
                file.writelines(_kept(old, last_step, keep_evaluation))

        with disk_errors(self.path):
            write_atomically(self.path, write, expected_bytes=self.path.stat().st_size)


def _kept(lines: Iterator[bytes], last_step: float, keep_evaluation: bool) -> Iterator[bytes]:
    for line in lines:
        cells = line.rstrip(b"\n").split(b",")
        if not line.endswith(b"\n") or len(cells) != len(COLUMNS) or not cells[0].isdigit():
            continue  # the header, or a row that a kill or a full disk cut off
        step = int(cells[0])
        evaluation = any(cells[place] for place in _VALIDATION)
        if step < last_step or (step == last_step and (keep_evaluation or not evaluation)):
            yield line


def _text(value: float | None) -> str:
    return "" if value is None else str(value)
