"""The two slot stages of SMTC: semantics first, then instances of every semantics inside its mask."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from objslot.nn._core import SlotCore
from objslot.ops import _checks

AGGREGATIONS = ("soft", "hard", "raw_logit", "none")
LOGIT_THRESHOLD = 0.3


class SlotIterations(NamedTuple):
    """Masks after every iteration, without gradient: tuples of (..., N, n) and of (..., N, P, n)."""

    semantic: tuple[Tensor, ...]
    instance: tuple[Tensor, ...]


class SemanticSlots(NamedTuple):
    """What `SemanticSlotAttention` returns: N semantics, P instances of each, n positions, width D."""

    semantic_slots: Tensor
    instance_slots: Tensor
    initial_instances: Tensor
    semantic_logits: Tensor
    instance_logits: Tensor
    semantic: Tensor
    instance: Tensor
    iterations: SlotIterations | None


class SemanticSlotAttention(SlotCore):
    """Semantic slots that start at learned means, then instance slots drawn around them (SMTC, section 3.2).

    Stage 1 starts at mu and lets N semantics compete for the positions. Stage 2 starts at mu + sigma * noise, P
    draws of every semantics, and lets the instances of one semantics compete inside its mask. All layers, mu and
    sigma are shared by the stages. sigma is learned: the draw is differentiable.

    Args:
        semantics: N.
        width: D, width of a slot.
        instances: P, at least 1; another one can be asked for at every call.
        iterations: I of both stages, at least 1; another one can be asked for at every call.
        input_width: width of the inputs; None means `width`.
        mlp_width: hidden width of the MLP; None means the larger of `width` and 128.
        update: "residual" for slots + updates, or "gru".
        aggregation: what stage 2 weights the positions with: "soft", the softmax over the semantics; "hard", 1
            for the winning semantics; "raw_logit", 1 where the semantic logit is above 0.3; "none", 1 everywhere.
        full_bptt: False goes back through the last iteration and from there straight to the initial slots, in
            memory that does not depend on the number of iterations; True through all iterations.
        bias: biases in the projections to query, key and value.
        eps: added to the softmax, see `objslot.slot_attention`.
    """

    def __init__(
        self,
        semantics: int,
        width: int,
        *,
        instances: int = 4,
        iterations: int = 3,
        input_width: int | None = None,
        mlp_width: int | None = None,
        update: str = "residual",
        aggregation: str = "soft",
        full_bptt: bool = False,
        bias: bool = False,
        eps: float = 1e-8,
    ):
        super().__init__(
            width, input_width=input_width, mlp_width=mlp_width, heads=1, head_width=None,
            update=update, bias=bias, eps=eps,
        )  # fmt: skip
        for name, value in (("semantics", semantics), ("instances", instances), ("iterations", iterations)):
            _checks.at_least(name, value, 1)
        _checks.choice("aggregation", aggregation, AGGREGATIONS)
        self.semantics, self.instances, self.iterations = semantics, instances, iterations
        self.aggregation, self.full_bptt = aggregation, full_bptt
        self.mu = nn.Parameter(torch.randn(semantics, width))
        self.log_sigma = nn.Parameter(torch.zeros(semantics, width))

    @property
    def sigma(self) -> Tensor:
        """Standard deviations (N, D) of the Gaussians that instances are drawn from."""
        return self.log_sigma.exp()

    def draw_noise(self, instances: int | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (N, P, D) on the device of the module; the generator may live on another one."""
        instances = self.instances if instances is None else instances
        _checks.at_least("instances", instances, 1)
        device = self.mu.device if generator is None else generator.device
        noise = torch.randn(
            self.semantics, instances, self.width, generator=generator, device=device, dtype=self.mu.dtype
        )
        return noise.to(self.mu.device)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        instances: int | None = None,
        iterations: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_iterations: bool = False,
    ) -> SemanticSlots:
        """Bind the inputs to semantics, and each semantics' positions to its instances.

        Args:
            x: (..., n, input_width).
            mask: (..., n), weights of the positions, or bool; where it is 0 the position is not read.
            instances: P of this call; None means that of `noise` or else of the module.
            iterations: I of this call; None means that of the module.
            noise: (..., N, P, D), leading dimensions broadcast to those of x; (N, P, D) starts every element of
                the batch at the same instances. None draws one (N, P, D).
            generator: source of the noise that is drawn.
            return_iterations: also return the masks after every iteration, without gradient.

        Returns:
            SemanticSlots: semantic_slots (..., N, D), instance_slots (..., N, P, D), initial_instances as the
            noise came, semantic_logits (..., N, n), instance_logits (..., N, P, n), semantic = softmax over N,
            instance = softmax over P, iterations (SlotIterations or None).

        Raises:
            ValueError or TypeError naming the argument.
        """
        iterations = self.iterations if iterations is None else iterations
        self.check_inputs(x, mask, iterations)
        noise = self._noise(x, noise, instances, generator)
        memory = self.memory(x, self.semantics * (1 + noise.shape[-2]) * iterations)
        settings = {
            "iterations": iterations,
            "only_last": not self.full_bptt,
            "return_iterations": return_iterations,
        }
        batch = x.shape[:-2]

        start = self.mu.expand(*batch, 1, self.semantics, self.width)
        positions = None if mask is None else mask.unsqueeze(-2)
        slots, logits, semantic_history, memory = self.iterate(start, memory, positions, **settings)
        semantic_slots, semantic_logits = slots.squeeze(-3), logits.squeeze(-3)
        semantic = semantic_logits.softmax(-2)

        initial = self.mu.unsqueeze(-2) + self.sigma.unsqueeze(-2) * noise
        start = initial.expand(*batch, *initial.shape[-3:])
        inside = self._inside(semantic, semantic_logits, positions)
        instance_slots, instance_logits, instance_history, _ = self.iterate(start, memory, inside, **settings)

        history = None
        if return_iterations:
            history = SlotIterations(
                tuple(step.squeeze(-3).softmax(-2) for step in semantic_history),
                tuple(step.softmax(-2) for step in instance_history),
            )
        return SemanticSlots(
            semantic_slots,
            instance_slots,
            initial,
            semantic_logits,
            instance_logits,
            semantic,
            instance_logits.softmax(-2),
            history,
        )

    def _inside(self, semantic: Tensor, logits: Tensor, positions: Tensor | None) -> Tensor | None:
        """The weights (..., N, n) of the positions in stage 2."""
        if self.aggregation == "none":
            return None if positions is None else positions.expand(*semantic.shape)
        if self.aggregation == "soft":
            weights = semantic
        elif self.aggregation == "hard":
            weights = torch.zeros_like(semantic).scatter(-2, semantic.argmax(-2, keepdim=True), 1)
        else:
            weights = (logits > LOGIT_THRESHOLD).to(logits.dtype)
        return weights if positions is None else weights * positions

    def _noise(
        self, x: Tensor, noise: Tensor | None, instances: int | None, generator: torch.Generator | None
    ) -> Tensor:
        if noise is None:
            return self.draw_noise(instances, generator=generator)
        _checks.tensor("noise", noise, "(..., N, P, D)")
        if instances is not None and instances != noise.shape[-2]:
            raise ValueError(f"instances: expected {noise.shape[-2]}, as many as in noise, got {instances}")
        expected = (*x.shape[:-2], self.semantics, noise.shape[-2], self.width)
        _checks.expandable("noise", noise, expected, "(..., N, P, D)")
        _checks.at_least("instances", noise.shape[-2], 1)
        return noise
