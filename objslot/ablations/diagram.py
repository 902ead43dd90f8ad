"""Figure 1: the two slot stages side by side, with the shapes that the code really has."""

from __future__ import annotations

from html import escape

import torch
from torch import nn

from objslot.models import SMTC

_STYLE = """
  svg { color-scheme: light dark; --ink: #1c1c1e; --quiet: #606066; --line: #8a8a92; --lift: #f3f3f6;
    --other: #c0182b; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #ececf0; --quiet: #a2a2aa; --line: #77777f; --lift: #232327; --other: #ff6b78; }
  }
  text { font: 15px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; }
  .shape { font-size: 13px; fill: var(--quiet); }
  .title { font-weight: 600; }
  rect { fill: var(--lift); stroke: var(--line); rx: 6px; }
  path { stroke: var(--line); fill: none; stroke-width: 1.5; }
  marker path { fill: var(--line); }
  .other text, text.other { fill: var(--other); }
  .other rect { stroke: var(--other); }
  path.other { stroke: var(--other); }
"""
_ROW, _BOX = 96, 60
_LEFT, _RIGHT, _WIDE, _NARROW = 190, 570, 700, 330


def measure_shapes(model: SMTC) -> dict[str, tuple[int, ...]]:
    """Shapes of one pass over a clip of two frames: keys, correspondence, fused, and what both stages make."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            value = output[0] if name == "fused" else inputs[0]
            shapes[name] = tuple(value.shape)

        return hook

    fusion = model.student.fusion
    hooks = [fusion.register_forward_hook(note("fused")), fusion.embed.register_forward_hook(note("correspondence"))]
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            frames = torch.zeros(1, 2, 3, *model.frame_size, device=parameter.device, dtype=parameter.dtype)
            features = model.encode(frames)
            maps = model.segment(features)
            found = {name: tuple(getattr(maps, name).shape) for name in maps._fields[:5]}
            objects = model.student.head(maps.instance_slots)
    finally:
        for hook in hooks:
            hook.remove()
    mu = tuple(model.student.slots.mu.shape)
    return {
        "frames": tuple(frames.shape),
        "keys": tuple(features.keys.shape),
        **shapes,
        "mu": mu,
        **found,
        "objects": tuple(objects.shape),
    }


def draw_diagram(model: SMTC) -> str:
    """The diagram as one SVG, light or dark as the reader's screen; shapes are those of a pass of `model`."""
    shapes = measure_shapes(model)
    iterations = model.config.iterations
    parts: list[str] = []

    def box(x: int, row: int, width: int, text: str, shape: str | tuple = "", kind: str = "") -> None:
        y = 20 + row * _ROW
        shape = shape if isinstance(shape, str) else _text(shape)
        middle = y + _BOX / 2 + (5 if not shape else -4)
        below = f'<text class="shape" x="{x}" y="{middle + 20}">{escape(shape)}</text>' if shape else ""
        parts.append(
            f'<g class="{kind}"><rect x="{x - width / 2}" y="{y}" width="{width}" height="{_BOX}"/>'
            f'<text x="{x}" y="{middle}">{escape(text)}</text>{below}</g>'
        )

    def arrow(x: int, row: int, x_end: int | None = None, kind: str = "") -> None:
        start, end = 20 + row * _ROW + _BOX, 20 + (row + 1) * _ROW - 3
        parts.append(f'<path class="{kind}" d="M{x} {start} L{x_end or x} {end}" marker-end="url(#tip)"/>')

    middle = (_LEFT + _RIGHT) // 2
    box(middle, 0, _WIDE, "frames → frozen encoder → keys F", f"{_text(shapes['frames'])} → {_text(shapes['keys'])}")
    arrow(middle, 0)
    box(
        middle, 1, _WIDE, "X = F + E, E from the correspondence C with another frame",
        f"C {_text(shapes['correspondence'])} → X {_text(shapes['fused'])}",
    )  # fmt: skip
    for side in (_LEFT, _RIGHT):
        arrow(side, 1)
    box(_LEFT, 2, _NARROW, "Stage 1 starts at mu", shapes["mu"])
    box(_RIGHT, 2, _NARROW, "Stage 2 starts at mu + sigma · noise", shapes["initial"], "other")
    for side in (_LEFT, _RIGHT):
        arrow(side, 2)
    box(_LEFT, 3, _NARROW, f"{iterations} × : q from the slots, k and v from X", "the same layers in both stages")
    box(_RIGHT, 3, _NARROW, f"{iterations} × : q from the slots, k and v from X", "the same layers in both stages")
    for side in (_LEFT, _RIGHT):
        arrow(side, 3)
    box(_LEFT, 4, _NARROW, "softmax over the N semantics", shapes["semantic"])
    box(_RIGHT, 4, _NARROW, "softmax over P inside each semantics", shapes["instance"], "other")
    for side in (_LEFT, _RIGHT):
        arrow(side, 4)
    box(_LEFT, 5, _NARROW, "L1 norm over the positions, update", shapes["semantic_slots"])
    box(_RIGHT, 5, _NARROW, f"times the mask of stage 1 ({model.config.aggregation})", "then L1 norm, update", "other")
    for side in (_LEFT, _RIGHT):
        arrow(side, 5)
    box(_LEFT, 6, _NARROW, "masks A: alignment by transport, diversity", shapes["semantic"])
    box(_RIGHT, 6, _NARROW, "slots: alignment by assignment", shapes["objects"], "other")
    y = 20 + 5 * _ROW + _BOX / 2
    edge, target = _LEFT + _NARROW // 2, _RIGHT - _NARROW // 2
    turn, last = (edge + target) // 2, 20 + 6 * _ROW + _BOX / 2
    parts.append(
        f'<path class="other" d="M{edge} {last} H{turn} V{y} H{target - 3}" marker-end="url(#tip)"/>'
        f'<text class="other" x="{turn}" y="{y - 8}">A</text>'
    )
    height = 20 + 7 * _ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        f'aria-label="The two slot stages and the shapes of what they make">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z"/></marker></defs>'
    )
    return f"{head}<style>{_STYLE}</style>{tip}{''.join(parts)}</svg>\n"


def _text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
