"""objslot: object-centric slots for video, and the fast optimal-transport and attention ops beneath them.

Importing this package is light: an op, `objslot.ops` or `objslot.nn`, and with it torch, is imported when it is first
asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "assign",
    "explain",
    "propagate",
    "sinkhorn",
    "sinkhorn_potentials",
    "sinkhorn_transport",
    "slot_attention",
    "slot_softmax",
    "use_backend",
]

if TYPE_CHECKING:
    from objslot import nn, ops  # noqa: F401
    from objslot.ops import (
        assign,
        explain,
        propagate,
        sinkhorn,
        sinkhorn_potentials,
        sinkhorn_transport,
        slot_attention,
        slot_softmax,
        use_backend,
    )


_MODULES = ("nn", "ops")


def __getattr__(name):
    if name in _MODULES:
        return import_module(f"objslot.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'objslot' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("objslot.ops"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES})
