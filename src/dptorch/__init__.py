"""dptorch: differential privacy for any PyTorch model."""

from dptorch.tape import Tape, record

__version__ = "0.1.0"

__all__ = ["Tape", "__version__", "record"]
