"""Every error a user can meet. Each says what was wanted, what was found and what to try.

EdgetuneError            exit code 1: what was named can't be used
├── UsageError           2: the command line isn't understood
│   ├── UnknownDevice
│   └── UnknownModel
├── ProfileError         1: a device profile file is wrong
├── DataError            1: images or labels can't be used
├── WeightsError         1: weights are missing, damaged or do not belong to the model
├── UnsupportedModel     1: the model exists, but this method (or edgetune) can't train it
├── BackendUnavailable   1: an optional package is not installed
├── ArtifactsError       1: training artifacts are damaged, of another version, or not those of this run
├── RunFolderError       1: a run folder can't be written, read or resumed
├── FeaturesDamaged      1: cached features can't be read back
├── FeaturesOverflow     1: a feature is too large for float16 (a run goes on in float32)
├── DoesNotFit           3: no plan keeps the run under the cap
├── CapExceeded          4: the run passed its cap, or stopped to avoid it
└── Interrupted          129 (hang-up), 130 (Ctrl-C) or 143 (SIGTERM): stopped cleanly
"""

from __future__ import annotations


class EdgetuneError(Exception):
    """The root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1
    # The `RunReport` of a run that this error ended; None if no run folder was left.
    report: object = None


class UsageError(EdgetuneError):
    exit_code = 2


class UnknownDevice(UsageError):
    pass


class UnknownModel(UsageError):
    pass


class ProfileError(EdgetuneError):
    pass


class DataError(EdgetuneError):
    pass


class WeightsError(EdgetuneError):
    pass


class UnsupportedModel(EdgetuneError):
    pass


class BackendUnavailable(EdgetuneError):
    pass


class ArtifactsError(EdgetuneError):
    pass


class RunFolderError(EdgetuneError):
    pass


class FeaturesDamaged(EdgetuneError):
    pass


class FeaturesOverflow(EdgetuneError):
    pass


class DoesNotFit(EdgetuneError):
    """No plan fits. `smallest_cap_bytes` is the least cap that would, for the same method, batch and floor."""

    exit_code = 3

    def __init__(self, message: str, smallest_cap_bytes: int) -> None:
        super().__init__(message)
        self.smallest_cap_bytes = smallest_cap_bytes


class CapExceeded(EdgetuneError):
    exit_code = 4


class Interrupted(EdgetuneError):
    """Raised after the step was finished and the checkpoint written."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
