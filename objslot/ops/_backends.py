"""Which implementation serves a call, and why the others do not.

An op registers one row a backend: a function `why_not(**facts)` that returns None when the backend can serve
the call and otherwise the reason as a short phrase ("needs a CUDA tensor, got cpu"). `facts` always holds
`device` and `dtype`; an op adds the sizes its rows look at.

The choice is made in this order: the `backend=` argument, the innermost `use_backend`, the environment
variable OBJSLOT_BACKEND, the first row in the order of AUTOMATIC_ORDER that can serve the call. A choice by
name never falls back. Rows of kernels that were never seen right on hardware take part in the automatic choice
only where `objslot info --check` has proven them (see `_proof`).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from objslot.errors import BackendError
from objslot.ops import _proof

BACKENDS = ("reference", "cpu", "triton", "cuda")
AUTOMATIC_ORDER = ("cuda", "triton", "cpu", "reference")

WhyNot = Callable[..., str | None]

_rows: dict[str, dict[str, tuple[WhyNot, bool]]] = {}
# What the innermost `use_backend` names.
forced: ContextVar[str | None] = ContextVar("objslot_backend", default=None)


def register(op: str, backend: str, why_not: WhyNot, *, automatic: bool = True) -> None:
    """Add a row to the table: `backend` serves `op` wherever `why_not(**facts)` is None.

    `automatic=False` keeps a backend that was never proven on hardware out of the automatic choice, but for devices
    on which the user has proven it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    rows = _rows.setdefault(op, {})
    rows[backend] = (why_not, automatic)
    _rows[op] = {name: rows[name] for name in AUTOMATIC_ORDER if name in rows}


def registered() -> dict[str, tuple[str, ...]]:
    """The backends of every op imported so far, in the order in which the automatic choice tries them."""
    return {op: tuple(rows) for op, rows in _rows.items()}


def named() -> str | None:
    """The backend that `use_backend` or the environment asks for by name."""
    return forced.get() or os.environ.get("OBJSLOT_BACKEND") or None


def select(op: str, requested: str | None = None, **facts) -> str:
    """The backend that serves this call; raises BackendError when the one asked for by name cannot."""
    name = requested or named()
    if name is not None and name != "auto":
        reason = _reason(op, name, facts)
        if reason is not None:
            raise BackendError(f"{op}: backend {name!r} cannot serve this call: {reason}")
        return name
    for backend, (why_not, _) in _rows[op].items():
        if _automatic(op, backend, facts) and why_not(**facts) is None:
            return backend
    raise BackendError(f"{op}: no backend serves this call: {_reasons(op, facts)}")


def serves(op: str, **facts) -> bool:
    """Whether what the context and the environment ask for can serve this call, or they leave the choice open."""
    name = forced.get() or os.environ.get("OBJSLOT_BACKEND") or "auto"
    return name == "auto" or (name in BACKENDS and _reason(op, name, facts) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op called in this context by the backend `name`, or "auto" for the automatic choice.

    Holds for the current thread or asyncio task. Raises BackendError for an unknown name at once, and at the
    call for a backend that cannot serve it.
    """
    _check_name(name)
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend `chosen` (None when none serves) and why each other one is not."""

    op: str
    chosen: str | None
    origin: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'} ({self.origin})"]
        lines += [f"  {backend:<9} {reason}" for backend, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Say which backend would serve `op(*args, **kwargs)`, and why each of the others would not.

    `op` is a public op or its name. Nothing is computed; a backend that cannot serve raises nothing.
    """
    if isinstance(op, str):
        found = getattr(sys.modules["objslot.ops"], op, None)
        if not hasattr(sys.modules.get(getattr(found, "__module__", None)), "facts"):
            raise ValueError(f"op: expected the name of an op, got {op!r}")
        op = found
    requested = kwargs.pop("backend", None)
    facts = sys.modules[op.__module__].facts(*args, **kwargs)
    return explain_facts(row_of(op), requested, **facts)


def row_of(op: Callable) -> str:
    """The name under which a public op has its rows: functions of one folder may share them."""
    return op.__name__ if op.__name__ in _rows else op.__module__.rpartition(".")[2]


def explain_facts(op: str, requested: str | None = None, **facts) -> Explanation:
    """`explain` for facts that are known already."""
    sources = (
        ("backend=", requested),
        ("use_backend", forced.get()),
        ("OBJSLOT_BACKEND", os.environ.get("OBJSLOT_BACKEND")),
    )
    origin, name = next(((origin, name) for origin, name in sources if name), ("automatic", "auto"))
    reasons = _reasons(op, facts)
    if name == "auto":
        usable = [backend for backend in _rows[op] if reasons[backend] is None and _automatic(op, backend, facts)]
        chosen = usable[0] if usable else None
    else:
        _check_name(name)
        chosen = name if reasons[name] is None else None

    def phrase(backend, reason):
        if backend == chosen:
            return "serves this call"
        if reason is not None:
            return reason
        if _automatic(op, backend, facts):
            return "could serve it"
        return "could serve it when asked for by name, or once `objslot info --check` finds it right and faster here"

    return Explanation(
        op, chosen, origin, {backend: phrase(backend, reason) for backend, reason in reasons.items()}
    )


def _automatic(op: str, backend: str, facts: dict) -> bool:
    return _rows[op][backend][1] or _proof.holds(op, backend, facts["device"])


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}, or auto")


def _reason(op: str, name: str, facts: dict) -> str | None:
    _check_name(name)
    row = _rows[op].get(name)
    return f"{op} has no {name} kernels" if row is None else row[0](**facts)


def _reasons(op: str, facts: dict) -> dict[str, str | None]:
    return {name: _reason(op, name, facts) for name in BACKENDS}
