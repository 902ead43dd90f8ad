"""The ops: plain functions on tensors, each in a folder of its own with its reference and its backends.

A function hides the folder of the same name as an attribute of this package; `from objslot.ops.sinkhorn
import reference` finds the folder all the same.
"""

from objslot.ops._backends import BACKENDS, explain, use_backend
from objslot.ops.assign import assign
from objslot.ops.propagate import propagate
from objslot.ops.sinkhorn import sinkhorn, sinkhorn_potentials
from objslot.ops.slot_attention import slot_attention
from objslot.ops.slot_softmax import slot_softmax
from objslot.ops.transport import sinkhorn_transport

__all__ = [
    "BACKENDS",
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
