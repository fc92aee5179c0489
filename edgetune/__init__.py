"""edgetune: fine-tune Vision Transformers on the device that will use them, under a memory cap that holds.

The public names are below; each is imported when it is first used, so that `import edgetune` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.devices import find_device as find_device
    from edgetune.devices import list_devices as list_devices
    from edgetune.errors import DoesNotFit as DoesNotFit
    from edgetune.errors import EdgetuneError as EdgetuneError
    from edgetune.inference import load_run as load_run
    from edgetune.inference import predict as predict
    from edgetune.planner import Plan as Plan
    from edgetune.profiles import DeviceProfile as DeviceProfile
    from edgetune.report import RunReport as RunReport
    from edgetune.report import read_report as read_report
    from edgetune.run import finetune as finetune
    from edgetune.run import resume as resume
    from edgetune.settings import RunSettings as RunSettings

__version__ = "0.1.0"

_HOMES = {
    "DeviceProfile": "profiles",
    "DoesNotFit": "errors",
    "EdgetuneError": "errors",
    "Plan": "planner",
    "RunReport": "report",
    "RunSettings": "settings",
    "find_device": "devices",
    "finetune": "run",
    "list_devices": "devices",
    "load_run": "inference",
    "predict": "inference",
    "read_report": "report",
    "resume": "run",
}
__all__ = [
    "DeviceProfile",
    "DoesNotFit",
    "EdgetuneError",
    "Plan",
    "RunReport",
    "RunSettings",
    "__version__",
    "find_device",
    "finetune",
    "list_devices",
    "load_run",
    "predict",
    "read_report",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
    return getattr(import_module(f"edgetune.{_HOMES[name]}"), name)
