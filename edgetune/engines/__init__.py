"""What computes a run: torch, or ONNX Runtime from artifacts. Each module answers `base.Engine`."""

from edgetune.engines.base import Built, Engine, engine_of

__all__ = ["Built", "Engine", "engine_of"]
