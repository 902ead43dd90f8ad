"""Registration of objslot::assign: schema, choice of backend, fake. An index has no gradient."""

import torch
from torch import Tensor

from objslot.ops import _backends, _native
from objslot.ops._vmap import register_vmap
from objslot.ops.assign import native, reference

_lib = torch.library.Library("objslot", "FRAGMENT")
_lib.define("assign(Tensor scores, str? backend) -> Tensor")

_backends.register("assign", "reference", lambda **facts: None)
_backends.register("assign", "cpu", _native.why_not_cpu)


def facts(scores: Tensor) -> dict:
    """What the table of backends is asked with."""
    return {"device": scores.device, "dtype": scores.dtype, "rows": scores.shape[-2], "columns": scores.shape[-1]}


def _assign(scores, backend):
    if _backends.select("assign", backend, **facts(scores)) == "cpu":
        return native.assign(scores)
    return reference.assign(scores).contiguous()


def _fake_assign(scores, backend):
    return scores.new_empty(scores.shape[:-1], dtype=torch.int64)


_lib.impl("assign", _assign, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::assign", _fake_assign, lib=_lib)
register_vmap("assign", _lib)
