"""Inference: objects in videos with a trained model, and the baselines it is compared with.

Importing this package is light: each of its modules is imported when something of it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from objslot.inference.baselines import colour_null, frozen_backbone
    from objslot.inference.segment import segment_video

__all__ = ["colour_null", "frozen_backbone", "segment_video"]

_MODULES = {"colour_null": "baselines", "frozen_backbone": "baselines", "segment_video": "segment"}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'objslot.inference' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"objslot.inference.{_MODULES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
