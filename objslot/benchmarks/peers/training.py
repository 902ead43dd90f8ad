"""A training step in the authors' formulation: what objslot's step is compared with.

Written from the paper's equations, not from anyone's code. Every ordered pair of frames has a plan and a matrix of
cross-entropies of its own; instances are matched one frame pair, clip and semantics at a time by scipy; both encoders
are separate modules and the student's is back-propagated through; the optimiser is AdamW as torch builds it; the
teacher follows parameter by parameter. Losses and gradients equal objslot's to rounding.

Shapes: B clips of T frames, HW positions, N semantics with P instances each, D channels.
"""

import copy
import itertools
import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from objslot.models import SMTC
from objslot.models.branch import SlotBranch, random_noise
from objslot.models.correspondence import draw_other_frames
from objslot.nn.semantic import SemanticSlotAttention
from objslot.objectives import valid_instances


def semantic_alignment_loss(
    student_logits: Tensor, teacher_masks: Tensor, teacher_keys: Tensor, *, eps: float = 0.05, n_iters: int = 3
) -> Tensor:
    """As `objslot.objectives.semantic_alignment_loss` with uniform marginals, pair by pair."""
    frames, positions = student_logits.shape[1], student_logits.shape[-1]
    keys = F.normalize(teacher_keys, dim=-1)
    log_masks = student_logits.log_softmax(dim=2)
    total = student_logits.new_zeros(())
    for i, j in itertools.permutations(range(frames), 2):
        with torch.no_grad():
            plan = torch.exp(keys[:, i] @ keys[:, j].transpose(1, 2) / eps)
            for _ in range(n_iters):
                plan = plan / plan.sum(dim=2, keepdim=True) / positions
                plan = plan / plan.sum(dim=1, keepdim=True) / positions
        cross_entropy = -torch.einsum("bnu,bnv->buv", log_masks[:, i], teacher_masks[:, j])
        total = total + (plan * cross_entropy).sum(dim=(1, 2)).mean()
    return total / (frames * (frames - 1))


def instance_alignment_loss(student: Tensor, teacher: Tensor, student_valid: Tensor, teacher_valid: Tensor) -> Tensor:
    """As `objslot.objectives.instance_alignment_loss`, frame pair by frame pair, one assignment of scipy at a time."""
    clips, frames, semantics, instances = student.shape[:4]
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher.detach(), dim=-1)
    total, count = student.new_zeros(()), student.new_zeros(())
    for i, j in itertools.product(range(frames), repeat=2):
        similarity = torch.einsum("bnpd,bnqd->bnpq", student[:, i], teacher[:, j])
        scores, match = similarity.detach().cpu().float().numpy(), np.empty((clips, semantics, instances), np.int64)
        for b, n in itertools.product(range(clips), range(semantics)):
            match[b, n] = linear_sum_assignment(-scores[b, n])[1]
        matches = F.one_hot(torch.from_numpy(match).to(similarity.device), instances).bool()
        apart = (F.relu(similarity - 0.5) * ~matches).sum(dim=-1) / max(instances - 1, 1)
        together = (similarity * (matches & teacher_valid[:, j, :, None])).sum(dim=-1)
        total = total + ((apart - together) * student_valid[:, i]).sum()
        count = count + student_valid[:, i].sum()
    return total / count.clamp_min(1)


def diversity_loss(semantic: Tensor) -> Tensor:
    """As `objslot.objectives.diversity_loss`, from the whole matrix of cosines."""
    masks = F.normalize(semantic, dim=-1)
    cosine = masks @ masks.transpose(-1, -2)
    apart = ~torch.eye(semantic.shape[-2], dtype=torch.bool, device=semantic.device)
    return cosine[..., apart].mean()


def slot_stage(core: SemanticSlotAttention, initial: Tensor, x: Tensor, mask: Tensor | None, iterations: int):
    """Slots and last logits of one stage: `initial` (..., G, P, D), x (..., HW, D), mask (..., G, HW) or None."""
    x = core.norm_inputs(x)
    keys, values = core.key(x), core.value(x)
    # The slots of all groups are the rows of one matrix.
    start = slots = initial.expand(*x.shape[:-2], *initial.shape[-3:]).flatten(-3, -2)
    for iteration in range(iterations):
        if iteration == iterations - 1:
            slots = slots.detach() - start.detach() + start
        logits = core.query(core.norm_slots(slots)) @ keys.transpose(-1, -2) / math.sqrt(core.width)
        logits = logits.unflatten(-2, initial.shape[-3:-1])
        attention = logits.softmax(dim=-2) + core.eps
        if mask is not None:
            attention = attention * mask.unsqueeze(-2)
        attention = attention / attention.sum(dim=-1, keepdim=True)
        slots = slots + attention.flatten(-3, -2) @ values
        slots = slots + core.mlp(core.norm_mlp(slots))
    return slots.unflatten(-2, initial.shape[-3:-1]), logits


class AuthorsModel(nn.Module):
    """The model that `model` is, with copies of its weights; call it as `SMTC`, on normalised frames.

    Takes the configurations of the paper: uniform marginals, soft aggregation, residual update, one encoder. The
    student's encoder learns where that of `model` does by its configuration.
    """

    def __init__(self, model: SMTC):
        super().__init__()
        self.config, self.width = model.config, model.width
        self.encoder = copy.deepcopy(model.encoder)
        self.teacher_encoder = copy.deepcopy(model.teacher_encoder or model.encoder)
        self.encoder.set_training(model.config.train_encoder)
        self.teacher_encoder.set_training(False)
        self.student = copy.deepcopy(model.student)
        self.teacher = copy.deepcopy(model.teacher)

    def fuse(self, branch: SlotBranch, keys: Tensor, index: Tensor) -> Tensor:
        """Features (B, T, HW, D) joined with what corresponds to them in the frames `index` (B, T, K)."""
        fusion = branch.fusion
        clip = torch.arange(len(keys), device=keys.device).view(-1, 1, 1)
        unit = F.normalize(keys, dim=-1)
        correspondence = torch.einsum("btud,btkvd->btkuv", unit, unit[clip, index]).mean(dim=2)
        embedding = fusion.embed(correspondence / fusion.temperature)
        return branch.project(keys) + fusion.norm(embedding) * fusion.scale

    def stages(self, branch: SlotBranch, fused: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What both stages find in fused features (B, T, HW, D)."""
        config, core = self.config, branch.slots
        start = core.mu.expand(*fused.shape[:2], 1, -1, -1)
        semantic_slots, semantic_logits = slot_stage(core, start, fused, None, config.iterations)
        semantic_slots, semantic_logits = semantic_slots.squeeze(2), semantic_logits.squeeze(2)
        semantic = semantic_logits.softmax(dim=-2)
        start = core.mu.unsqueeze(-2) + core.sigma.unsqueeze(-2) * noise
        instance_slots, _ = slot_stage(core, start, fused, semantic, config.iterations)
        valid = valid_instances(
            semantic,
            semantic_slots,
            instance_slots,
            similarity=config.valid_similarity,
            threshold=config.valid_threshold,
            area=config.valid_area,
        )
        return {
            "logits": semantic_logits,
            "semantic": semantic,
            "objects": branch.head(instance_slots),
            "valid": valid,
        }

    def slots(self, branch: SlotBranch, keys: Tensor, index: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What both stages find in frames with `keys` (B, T, HW, D)."""
        return self.stages(branch, self.fuse(branch, keys, index), noise)

    def losses(self, found: dict, target: dict, keys: Tensor) -> dict[str, Tensor]:
        """Of what the student and the teacher found, with the teacher's keys."""
        config = self.config
        masks = (target["logits"] / config.teacher_temperature).softmax(dim=-2)
        losses = {
            "semantic": semantic_alignment_loss(
                found["logits"], masks, keys, eps=config.eps, n_iters=config.sinkhorn_iterations
            ),
            "instance": instance_alignment_loss(found["objects"], target["objects"], found["valid"], target["valid"]),
            "diversity": diversity_loss(found["semantic"]),
        }
        weights = config.semantic_weight, config.instance_weight, config.diversity_weight
        total = sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True))
        return {"loss": total, **losses}

    def forward(self, student: Tensor, teacher: Tensor, generator=None) -> dict[str, Tensor]:
        """Losses on frames (B, T, 3, H, W) as the student and the teacher see them."""
        config = self.config
        keys = self.encoder(student).keys
        clips, frames = keys.shape[:2]
        index = draw_other_frames(clips, frames, config.n_other, sampling=config.sampling, generator=generator)
        shape = (clips, frames, config.slots, config.instances, self.width)
        found = self.slots(self.student, keys, index, random_noise(shape, keys.device, generator))
        with torch.no_grad():
            keys = self.teacher_encoder(teacher).keys
            target = self.slots(self.teacher, keys, index, random_noise(shape, keys.device, generator))
        return self.losses(found, target, keys)

    @torch.no_grad()
    def update_teacher(self, momentum: float = 0.999) -> None:
        """Moving average of every parameter, one after the other."""
        pairs = [(self.teacher, self.student)]
        if self.config.train_encoder:
            pairs.append((self.teacher_encoder, self.encoder))
        for teacher, student in pairs:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.copy_(momentum * old + (1 - momentum) * new)


class AuthorsStep:
    """One optimiser step on normalised frames; call it with both views and the generators of the clips."""

    def __init__(self, model: SMTC, *, lr: float = 4e-4, weight_decay: float = 0.1):
        self.model = AuthorsModel(model)
        learning = [*self.model.encoder.parameters(), *self.model.student.parameters()]
        self.optimizer = torch.optim.AdamW([p for p in learning if p.requires_grad], lr=lr, weight_decay=weight_decay)

    def __call__(self, student: Tensor, teacher: Tensor, generator=None) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        losses = self.model(student, teacher, generator)
        losses["loss"].backward()
        self.optimizer.step()
        self.model.update_teacher()
        return losses
