"""Slot attention modules: `SlotAttention` (one stage) and `SemanticSlotAttention` (semantics, then instances).

Signatures::

    SlotAttention(slots, width, *, iterations=3, input_width=None, mlp_width=None, heads=1, update="gru" | "residual",
                  initial="random" | "learned", gradient="full" | "last", bias=False, eps=1e-8)
        forward(x (..., n, input_width), mask (..., n) = None, *, initial (..., s, width) = None, slots=None,
                iterations=None, generator=None, return_iterations=False) -> Slots
        Slots(slots (..., s, width), attention (..., s, n) softmax over the slots, logits (..., s, n),
              initial (..., s, width), iterations: tuple of (..., s, n) attention maps, or None)

    SemanticSlotAttention(semantics, width, *, instances=4, iterations=3, input_width=None, mlp_width=None,
                          update="residual" | "gru", aggregation="soft" | "hard" | "raw_logit" | "none",
                          full_bptt=False, bias=False, eps=1e-8)
        forward(x (..., n, input_width), mask (..., n) = None, *, instances=None, iterations=None, noise=None,
                generator=None, return_iterations=False) -> SemanticSlots
        noise: broadcastable to (..., N, P, width); None draws one (N, P, width) from `generator`, shared by the call.
        SemanticSlots, with N semantics, P instances of each, n positions, D = width:
            semantic_slots    (..., N, D)       after the last update
            instance_slots    (..., N, P, D)    after the last update
            initial_instances (N, P, D), or (..., N, P, D) as the noise came: mu + sigma * noise
            semantic_logits   (..., N, n)       q k^T / sqrt(D) of the last iteration
            instance_logits   (..., N, P, n)
            semantic          (..., N, n)       softmax over N of semantic_logits
            instance          (..., N, P, n)    softmax over P of instance_logits
            iterations        None, or SlotIterations(semantic: tuple of (..., N, n), instance: tuple of
                              (..., N, P, n)), the masks of every iteration, without gradient
        parameters `mu` (N, D) and `log_sigma` (N, D); property `sigma` = exp(log_sigma), 1 at the start.
"""

from objslot.nn.semantic import SemanticSlotAttention, SemanticSlots, SlotIterations
from objslot.nn.slot_attention import SlotAttention, Slots, convert_state_dict

__all__ = [
    "SemanticSlotAttention",
    "SemanticSlots",
    "SlotAttention",
    "SlotIterations",
    "Slots",
    "convert_state_dict",
]
