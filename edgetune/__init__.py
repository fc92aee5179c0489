"""edgetune: fine-tune Vision Transformers on the device that will use them, under a memory cap that holds."""

__version__ = "0.1.0"
