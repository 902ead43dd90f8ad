"""Slot attention as a module, and the conversion of other implementations' weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from objslot.nn._core import SlotCore
from objslot.ops import _checks


class Slots(NamedTuple):
    """What `SlotAttention` returns: s slots of width D over n positions."""

    slots: Tensor
    attention: Tensor
    logits: Tensor
    initial: Tensor
    iterations: tuple[Tensor, ...] | None


class SlotAttention(SlotCore):
    """Slot attention (Locatello et al. 2020, Algorithm 1).

    Args:
        slots: number of slots; another one can be asked for at every call of a "random" module.
        width: D, width of a slot.
        iterations: I, at least 1; another one can be asked for at every call.
        input_width: width of the inputs; None means `width`.
        mlp_width: hidden width of the MLP; None means the larger of `width` and 128.
        heads: heads of the attention; slots compete within each head.
        head_width: width of a head; None means width / heads.
        update: "gru", or "residual" for slots + updates.
        initial: "random" draws every slot from one learned Gaussian; "learned" learns every slot.
        gradient: "full" goes back through every iteration; "last" through the last one and from there straight
            to the initial slots, in memory that does not depend on the number of iterations.
        bias: biases in the projections to query, key and value.
        eps: added to the softmax, see `objslot.slot_attention`.

    Weights of the `slot-attention` package and of modules named as in the original code load through
    `convert_state_dict`; with these, `bias` is True for the package and False for the original.
    """

    def __init__(
        self,
        slots: int,
        width: int,
        *,
        iterations: int = 3,
        input_width: int | None = None,
        mlp_width: int | None = None,
        heads: int = 1,
        head_width: int | None = None,
        update: str = "gru",
        initial: str = "random",
        gradient: str = "full",
        bias: bool = False,
        eps: float = 1e-8,
    ):
        super().__init__(
            width, input_width=input_width, mlp_width=mlp_width, heads=heads, head_width=head_width,
            update=update, bias=bias, eps=eps,
        )  # fmt: skip
        _checks.at_least("slots", slots, 1)
        _checks.at_least("iterations", iterations, 1)
        _checks.choice("initial", initial, ("random", "learned"))
        _checks.choice("gradient", gradient, ("full", "last"))
        self.slots, self.iterations, self.gradient = slots, iterations, gradient
        if initial == "random":
            self.mu = nn.Parameter(torch.randn(width))
            self.log_sigma = nn.Parameter(torch.zeros(width))
        else:
            self.mu = nn.Parameter(torch.randn(slots, width))
            self.log_sigma = None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        initial: Tensor | None = None,
        slots: int | None = None,
        iterations: int | None = None,
        generator: torch.Generator | None = None,
        return_iterations: bool = False,
    ) -> Slots:
        """Bind the inputs to slots.

        Args:
            x: (..., n, input_width).
            mask: (..., n), weights of the positions, or bool; where it is 0 the position is not read.
            initial: (..., s, width), initial slots, broadcast over leading dimensions; None makes them.
            slots: number of slots to draw; None means that of the module. Only for "random" ones.
            iterations: None means that of the module.
            generator: source of the noise of "random" slots.
            return_iterations: also return the attention after every iteration, without gradient.

        Returns:
            Slots: slots (..., s, D); attention (..., s, n), softmax over the slots of the logits (..., s, n) of
            the last iteration (mean over heads); initial (..., s, D); iterations, a tuple of attentions or None.

        Raises:
            ValueError or TypeError naming the argument.
        """
        iterations = self.iterations if iterations is None else iterations
        self.check_inputs(x, mask, iterations)
        if initial is None:
            initial = self._initial(x, slots, generator)
        else:
            _checks.tensor("initial", initial, "(..., s, width)")
            if slots is not None:
                raise ValueError("slots: expected None beside initial slots, which say how many there are")
            _checks.expandable("initial", initial, (*x.shape[:-2], *initial.shape[-2:-1], self.width), "(..., s, D)")
            initial = initial.expand(*x.shape[:-2], *initial.shape[-2:])
        final, logits, history, _ = self.iterate(
            initial.unsqueeze(-3),
            self.memory(x, initial.shape[-2] * iterations),
            None if mask is None else mask.unsqueeze(-2),
            iterations=iterations,
            only_last=self.gradient == "last",
            return_iterations=return_iterations,
        )
        logits = logits.squeeze(-3)
        maps = tuple(step.squeeze(-3).softmax(-2) for step in history) if return_iterations else None
        return Slots(final.squeeze(-3), logits.softmax(-2), logits, initial, maps)

    def _initial(self, x: Tensor, slots: int | None, generator: torch.Generator | None) -> Tensor:
        count = self.slots if slots is None else slots
        _checks.at_least("slots", count, 1)
        if self.log_sigma is None:
            if count != self.slots:
                raise ValueError(f"slots: this module learned {self.slots} initial slots, got {count}")
            return self.mu.expand(*x.shape[:-2], count, self.width)
        noise = torch.randn(
            *x.shape[:-2], count, self.width, device=self.mu.device, dtype=self.mu.dtype, generator=generator
        )
        return self.mu + self.log_sigma.exp() * noise


_NAMES = {
    "slots_mu": "mu",
    "slots_logsigma": "log_sigma",
    "slots_log_sigma": "log_sigma",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "project_q": "query",
    "project_k": "key",
    "project_v": "value",
    "norm_input": "norm_inputs",
    "norm_pre_ff": "norm_mlp",
    "combine_heads": "combine",
}


def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `SlotAttention.load_state_dict` from those of another implementation.

    Knows the names of the `slot-attention` package (`to_q`, `norm_input`, `norm_pre_ff`, ...; also its
    multi-head module) and of the original code (`project_q`, `norm_inputs`, `norm_mlp`, `slots_log_sigma`, ...).
    Names that are this module's own pass unchanged.
    """
    converted = {}
    for name, value in state.items():
        head, dot, tail = name.partition(".")
        head = _NAMES.get(head, head)
        if head in ("mu", "log_sigma") and value.dim() == 3:
            value = value[0]
            value = value[0] if value.shape[0] == 1 else value
        converted[head + dot + tail] = value
    return converted
