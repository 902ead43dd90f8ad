"""The losses: semantic alignment by optimal transport, instance alignment by assignment, and diversity.

Shapes: B clips of T frames, HW positions, N semantics with P instances each, D channels. What comes from the
teacher carries no gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.ops import assign
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.transport import alignment

# The least mass, on a scale of 0 to 1, that a position keeps before a frame's masses are made to sum to one.
_MASS_FLOOR = 1e-4
# Unmatched instances are pushed apart only while their cosine is above this.
_MARGIN = 0.5


def marginals(kind: str, keys: Tensor, cls_attention: Tensor | None = None) -> Tensor | None:
    """Mass of every position in the transport plan: (B, T, HW) float32 of sum 1 over HW, or None if uniform.

    `kind` is "uniform"; "caam", the class-agnostic activation map: channel mean of the ReLU of `keys`
    (B, T, HW, D), min-max scaled in each frame; or "attention": `cls_attention` (B, T, HW). Raises
    `UserError` for another kind, or without the attention it needs.
    """
    if kind == "uniform":
        return None
    if kind == "caam":
        activation = keys.float().relu().mean(dim=-1)
        low, high = activation.amin(dim=-1, keepdim=True), activation.amax(dim=-1, keepdim=True)
        mass = (activation - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    elif kind == "attention":
        if cls_attention is None:
            raise UserError('marginal: got "attention", but the encoder gives no class-token attention')
        mass = cls_attention.float()
        mass = mass / mass.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        raise UserError(f"marginal: got {kind!r}, expected uniform, caam or attention")
    mass = mass.clamp_min(_MASS_FLOOR)
    return mass / mass.sum(dim=-1, keepdim=True)


def semantic_alignment_loss(
    student_logits: Tensor,
    teacher_masks: Tensor,
    teacher_keys: Tensor,
    mass: Tensor | None = None,
    *,
    eps: float = 0.05,
    n_iters: int = 3,
) -> Tensor:
    """Cross-entropy of semantics that optimal transport pairs up, mean over the ordered pairs of frames.

    sum over u, v of plan[u, v] * CE(teacher_masks_j[:, v], softmax(student_logits_i)[:, u]), where the plan
    between frames i and j is entropic transport on the cosine of `teacher_keys`, with marginals `mass`. The
    cross-entropy is linear in the teacher's mask, so this is -<log softmax(student_logits_i), plan @
    teacher_masks_j> and the plan itself is never made. It is a constant for the gradient, which reaches
    `student_logits` alone.

    Args:
        student_logits: (B, T, N, HW) semantic logits.
        teacher_masks: (B, T, N, HW) semantic masks, summing to 1 over N.
        teacher_keys: (B, T, HW, D).
        mass: (B, T, HW) from `marginals`, or None for uniform.
        eps: entropic regularisation.
        n_iters: Sinkhorn iterations.

    Returns a float32 scalar (float64 of float64 logits). Raises `UserError` for clips of one frame.
    """
    frames = student_logits.shape[1]
    if frames < 2:
        raise UserError(f"semantic alignment: got clips of {frames} frame, expected at least 2")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    with torch.no_grad():
        # The student's side is the same for every j, so the targets of a frame add up before the product.
        # Half keys are multiplied as they are: that is as exact, and takes a sixth of the products.
        target = alignment(
            teacher_keys if compute_dtype(teacher_keys.dtype) == dtype else teacher_keys.to(dtype),
            teacher_masks.to(dtype).transpose(-1, -2),
            None if mass is None else mass.to(dtype),
            eps=eps,
            n_iters=n_iters,
        )
        # In the order of the logits, so that the sum below and its gradient read memory in order.
        target = target.transpose(-1, -2).flatten()
    log_masks = student_logits.to(dtype).log_softmax(dim=2)
    clips = student_logits.shape[0]
    return -torch.dot(log_masks.flatten(), target) / (clips * frames * (frames - 1))


def valid_instances(
    semantic: Tensor,
    semantic_slots: Tensor,
    instance_slots: Tensor,
    *,
    similarity: float = 0.5,
    threshold: float = 0.5,
    area: float = 0.2,
) -> Tensor:
    """Which instances take part in the alignment: (B, T, N, P) bool.

    An instance is valid when the cosine of its slot (B, T, N, P, D) to that of its semantics (B, T, N, D)
    is above `similarity` and the share of positions where the semantic mask (B, T, N, HW) exceeds
    `threshold` is above `area`.
    """
    close = (
        F.cosine_similarity(semantic_slots.unsqueeze(-2).float(), instance_slots.float(), dim=-1) > similarity
    )
    present = (semantic > threshold).float().mean(dim=-1) > area
    return close & present.unsqueeze(-1)


def instance_alignment_loss(
    student: Tensor, teacher: Tensor, student_valid: Tensor, teacher_valid: Tensor
) -> Tensor:
    """Pull matched instances of the same semantics together over all ordered pairs of frames, i = j included.

    With S the cosine of student instance p of frame i and teacher instance q of frame j, matched one to one
    by the exact assignment of greatest total S, an instance adds: mean over the unmatched q of relu(S[p, q]
    - 0.5), minus S[p, match] where the match is valid. The mean is over the valid student instances; 0 when
    there is none.

    Args:
        student, teacher: (B, T, N, P, D) projected slots, of any norm. No gradient reaches the teacher's.
        student_valid, teacher_valid: (B, T, N, P) bool, from `valid_instances`.

    Returns a float32 scalar (float64 of float64 slots).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    instances = student.shape[-2]
    student = F.normalize(student.to(dtype), dim=-1).unsqueeze(2)
    teacher = F.normalize(teacher.detach().to(dtype), dim=-1).unsqueeze(1)
    similarity = student @ teacher.transpose(-1, -2)
    match = assign(similarity.detach())
    matched = similarity.gather(-1, match.unsqueeze(-1)).squeeze(-1)
    unmatched = ((similarity - _MARGIN).relu().sum(dim=-1) - (matched - _MARGIN).relu()) / max(
        instances - 1, 1
    )
    match_valid = teacher_valid.unsqueeze(1).expand(match.shape).gather(-1, match)
    term = unmatched - match_valid * matched
    counted = student_valid.unsqueeze(2).expand(match.shape)
    # The sum is 0 too where the count is.
    return torch.where(counted, term, 0).sum() / _mean_over_processes(counted.sum()).clamp_min(1e-6)


def _mean_over_processes(count: Tensor) -> Tensor:
    """Makes the mean of the processes' losses the loss of their clips together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return count.float()
    total = count.float()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def diversity_loss(semantic: Tensor) -> Tensor:
    """Mean cosine between the masks (B, T, N, HW) of different semantics over positions; 0 for N = 1."""
    semantics = semantic.shape[-2]
    masks = F.normalize(semantic.to(torch.promote_types(semantic.dtype, torch.float32)), dim=-1)
    # The sum over all pairs of unit vectors is the squared norm of their sum.
    total = masks.sum(dim=-2).square().sum(dim=-1) - masks.square().sum(dim=(-2, -1))
    return (total / max(semantics * (semantics - 1), 1)).mean()
