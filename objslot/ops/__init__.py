"""The ops: plain functions on tensors, each in a folder of its own with its reference and its backends."""

from importlib import import_module

from objslot.ops._backends import BACKENDS, explain, use_backend

_FOLDERS = {
    "sinkhorn": "sinkhorn",
    "sinkhorn_potentials": "sinkhorn",
    "sinkhorn_transport": "transport",
    "slot_softmax": "slot_softmax",
    "slot_attention": "slot_attention",
    "assign": "assign",
    "propagate": "propagate",
}

__all__ = ["BACKENDS", "explain", "use_backend", *_FOLDERS]


_missing = {}
for _name, _folder in _FOLDERS.items():
    # Imported here and not on demand: the folder "sinkhorn" would otherwise hide the function "sinkhorn".
    try:
        globals()[_name] = getattr(import_module(f"objslot.ops.{_folder}"), _name)
    except Exception as error:
        _missing[_name] = error
        globals().pop(_name, None)


def __getattr__(name):
    if name in _missing:
        raise ImportError(f"op {name} does not import") from _missing[name]
    raise AttributeError(f"module 'objslot.ops' has no attribute {name!r}")
