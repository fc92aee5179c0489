"""What a run writes, so that a kill, a full disk or a power cut at any moment leaves something that loads.

numpy arrays come in and go out; torch is not known here.
"""

from edgetune.checkpoint.files import write_atomically
from edgetune.checkpoint.folders import create_run_folder, open_run_folder
from edgetune.checkpoint.states import (
    Checkpoint,
    OptimizerRecord,
    Restored,
    latest_checkpoint,
    open_base,
    read_base,
    save_base,
    save_checkpoint,
)
from edgetune.checkpoint.tensors import load_tensors, read_tensors, save_tensors

__all__ = [
    "Checkpoint",
    "OptimizerRecord",
    "Restored",
    "create_run_folder",
    "latest_checkpoint",
    "load_tensors",
    "open_base",
    "open_run_folder",
    "read_base",
    "read_tensors",
    "save_base",
    "save_checkpoint",
    "save_tensors",
    "write_atomically",
]
