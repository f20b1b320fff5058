"""qbench: what int8 does to your network on this machine. Importing it imports nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "QuantizedModel": "qbench.model",
    "Recipe": "qbench.recipe",
    "Record": "qbench.record",
    "Task": "qbench.task",
    "compare_latency": "qbench.measure",
    "load": "qbench.saved",
    "quantize": "qbench.quantization",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'qbench' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
