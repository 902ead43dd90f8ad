"""SMTC: semantic slots shared by all videos, instance slots inside each, learned from unlabelled clips.

Qian, Ding, Liu, Lin: Semantics Meets Temporal Correspondence: Self-supervised Object-centric Learning in
Videos, ICCV 2023.
"""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from objslot import objectives
from objslot.errors import UserError
from objslot.models import files
from objslot.models.config import SMTCConfig
from objslot.models.correspondence import TemporalFusion, draw_other_frames, gather_frames, previous_frames
from objslot.models.encoder import FrameFeatures, build_encoder
from objslot.nn import SemanticSlotAttention


class IterationMaps(NamedTuple):
    """The masks after one slot attention iteration of both stages."""

    semantic: Tensor
    """(B, T, N, HW), summing to 1 over N."""
    instance: Tensor
    """(B, T, N, P, HW), summing to 1 over P."""


class SlotMaps(NamedTuple):
    """N semantics and P instances of each, found in B clips of T frames on an h x w grid of HW positions."""

    semantic: Tensor
    """(B, T, N, HW): A, softmax over N."""
    instance: Tensor
    """(B, T, N, P, HW): M, softmax over P; the final mask of an instance is A[n] * M[n, p]."""
    semantic_slots: Tensor
    """(B, T, N, D)."""
    instance_slots: Tensor
    """(B, T, N, P, D)."""
    initial: Tensor
    """(N, P, D): the instance slots before the first iteration, the same in every frame."""
    grid: tuple[int, int]
    """(h, w)."""
    iterations: list[IterationMaps] | None
    """The masks after every iteration, when asked for."""


class SlotBranch(nn.Module):
    """What student and teacher have one each of: projection, fusion, both slot stages, instance head."""

    def __init__(self, config: SMTCConfig, encoder_width: int, grid: tuple[int, int]):
        super().__init__()
        width = config.width or encoder_width
        self.project = nn.Identity() if width == encoder_width else nn.Linear(encoder_width, width)
        self.fusion = TemporalFusion(
            width, grid, correspondence=config.correspondence, temperature=config.correspondence_temperature
        )
        self.slots = SemanticSlotAttention(
            config.slots,
            width,
            instances=config.instances,
            iterations=config.iterations,
            update=config.update,
            aggregation=config.aggregation,
            full_bptt=config.full_bptt,
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, keys: Tensor, other: Tensor, **slot_options):
        """SemanticSlots of frames with `keys` (B, T, HW, D), and the fusion ratio.

        `other` are the frames they correspond to, from `TemporalFusion.prepare`; `slot_options` go to
        SemanticSlotAttention.
        """
        fused, ratio = self.fusion(self.project(keys), keys, other)
        return self.slots(fused, **slot_options), ratio


class SMTC(nn.Module):
    """The model: an encoder, a student that learns, and a teacher that follows it as a moving average.

    `grid` and `frame_size` are the positions and the pixels, (height, width), of training frames; `width`
    is that of the slots. Call it to get the losses, `segment` to get masks. Raises `UserError` for an
    encoder that cannot be had, or that gives no class-token attention where the configuration needs it.
    """

    def __init__(self, config: SMTCConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(
            config.encoder,
            weights=config.weights,
            pretrained=config.pretrained,
            image_size=config.frame_size,
            key_center=config.key_center,
            train=config.train_encoder,
        )
        if config.marginal == "attention" and not self.encoder.has_cls_attention:
            raise UserError(
                f'marginal: got "attention", but encoder {config.encoder} gives no class-token attention'
            )
        self.frame_size = self.encoder.snap(config.frame_size)
        self.grid = self.encoder.grid(self.frame_size)
        self.width = config.width or self.encoder.width
        self.student = SlotBranch(config, self.encoder.width, self.grid)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        # A frozen encoder is the same on both sides: one module, one copy in memory and on disk.
        self.teacher_encoder = copy.deepcopy(self.encoder) if config.train_encoder else None
        if self.teacher_encoder is not None:
            self.teacher_encoder.set_training(False)
        self.train()

    def train(self, mode: bool = True) -> "SMTC":
        super().train(mode)
        self.teacher.eval()
        return self

    def set_encoder_training(self, train: bool):
        """Freeze the encoder for a while, or let it learn again; only where the configuration trains it."""
        if not self.config.train_encoder:
            raise UserError("train_encoder: the encoder of this model is frozen by its configuration")
        self.encoder.set_training(train)

    def encode(self, frames: Tensor, *, use_teacher: bool = False) -> FrameFeatures:
        """Features of frames (B, T, 3, H, W), floating point, normalised, H and W multiples of the patch."""
        if use_teacher and self.teacher_encoder is not None:
            return self.teacher_encoder(frames)
        return self.encoder(frames)

    def forward(
        self,
        student: Tensor | FrameFeatures,
        teacher: Tensor | FrameFeatures,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses on B clips of T frames, each seen by the student and, augmented otherwise, by the teacher.

        Frames are (B, T, 3, H, W), normalised; features come from `encode`. `generator` draws the frames that
        correspond and the noise of the instances.

        Returns scalars: loss (weighted sum), semantic, instance, diversity; without gradient valid_share
        (valid student instances) and fusion_ratio (|E| / |F|). Raises `UserError` for clips that do not fit
        each other, or are too short.
        """
        config = self.config
        if not isinstance(student, FrameFeatures):
            student = self.encode(student)
        with torch.no_grad():
            if not isinstance(teacher, FrameFeatures):
                teacher = self.encode(teacher, use_teacher=True)
        if student.keys.shape != teacher.keys.shape or student.grid != teacher.grid:
            raise UserError(
                f"teacher: got features {tuple(teacher.keys.shape)} on grid {teacher.grid}, expected those "
                f"of the student, {tuple(student.keys.shape)} on grid {student.grid}"
            )
        clips, frames = student.keys.shape[:2]
        index = draw_other_frames(
            clips, frames, config.n_other, sampling=config.sampling, generator=generator
        )
        noise_shape = (clips, frames, config.slots, config.instances, self.width)

        found, ratio = self._slots(
            self.student, student, index, _draw(noise_shape, student.keys.device, generator)
        )
        with torch.no_grad():
            target, _ = self._slots(
                self.teacher, teacher, index, _draw(noise_shape, student.keys.device, generator)
            )
            target_objects = self.teacher.head(target.instance_slots)
            mass = objectives.marginals(config.marginal, teacher.keys, teacher.cls_attention)
            valid, target_valid = (self._valid(slots) for slots in (found, target))

        semantic = objectives.semantic_alignment_loss(
            found.semantic_logits,
            target.semantic,
            teacher.keys,
            mass,
            eps=config.eps,
            n_iters=config.sinkhorn_iterations,
        )
        instance = objectives.instance_alignment_loss(
            self.student.head(found.instance_slots), target_objects, valid, target_valid
        )
        diversity = objectives.diversity_loss(found.semantic)
        loss = (
            config.semantic_weight * semantic
            + config.instance_weight * instance
            + config.diversity_weight * diversity
        )
        return {
            "loss": loss,
            "semantic": semantic,
            "instance": instance,
            "diversity": diversity,
            "valid_share": valid.float().mean(),
            "fusion_ratio": ratio,
        }

    def _slots(self, branch: SlotBranch, features: FrameFeatures, index: Tensor, noise: Tensor):
        prepared = branch.fusion.prepare(features.keys, features.grid)
        other = gather_frames(prepared, index).mean(dim=2)
        return branch(features.keys, other, noise=noise)

    def _valid(self, slots) -> Tensor:
        config = self.config
        return objectives.valid_instances(
            slots.semantic,
            slots.semantic_slots,
            slots.instance_slots,
            similarity=config.valid_similarity,
            threshold=config.valid_threshold,
            area=config.valid_area,
        )

    @torch.no_grad()
    def update_teacher(self):
        """Move the teacher towards the student; call it after every optimiser step."""
        _follow(self.teacher, self.student, self.config.teacher_momentum)
        if self.teacher_encoder is not None and self.encoder.trains:
            _follow(self.teacher_encoder, self.encoder, self.config.teacher_momentum)

    def parameter_groups(self, lr: float, weight_decay: float, encoder_lr_scale: float) -> list[dict]:
        """What learns, for an optimiser: weight decay on matrices only, the encoder at a scaled rate."""
        groups = []
        parts = [("slots", self.student, lr)]
        if self.config.train_encoder:
            parts.append(("encoder", self.encoder, lr * encoder_lr_scale))
        for name, module, rate in parts:
            matrices = _matrices(module)
            rest = [parameter for parameter in module.parameters() if id(parameter) not in matrices]
            groups.append(
                {"name": name, "params": list(matrices.values()), "lr": rate, "weight_decay": weight_decay}
            )
            groups.append({"name": f"{name} without decay", "params": rest, "lr": rate, "weight_decay": 0.0})
        return groups

    @torch.no_grad()
    def segment(
        self,
        features: FrameFeatures,
        *,
        instances: int | None = None,
        iterations: int | None = None,
        seed: int = 0,
        use_teacher: bool = False,
        return_iterations: bool = False,
        previous_keys: Tensor | None = None,
    ) -> SlotMaps:
        """Masks of B clips of T frames, on any grid, with any number of instances and iterations.

        A frame corresponds to the one before it; the first to the frame whose `previous_keys` (B, HW, D)
        are given, else to the one after it. The noise of the instances is drawn once from `seed`: an
        instance starts the same in every frame, whatever the batch, and the first P instances start the
        same for every larger P. So a video in chunks, each given the last keys of the one before, gives
        what it gives as a whole.

        Raises `UserError` for features of another width or grid, or counts below 1.
        """
        instances = self.config.instances if instances is None else instances
        for name, value in (("instances", instances), ("iterations", iterations)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}: got {value!r}, expected an integer >= 1")
        keys = features.keys
        if (
            keys.ndim != 4
            or keys.shape[2] != features.grid[0] * features.grid[1]
            or keys.shape[3] != self.encoder.width
        ):
            raise UserError(
                f"features: got keys {tuple(keys.shape)} on grid {tuple(features.grid)}, expected "
                f"(clips, frames, positions of the grid, {self.encoder.width})"
            )
        if previous_keys is not None and previous_keys.shape != keys[:, 0].shape:
            raise UserError(
                f"previous_keys: got {tuple(previous_keys.shape)}, expected {tuple(keys[:, 0].shape)}"
            )
        branch = self.teacher if use_teacher else self.student
        prepared = branch.fusion.prepare(keys, features.grid)
        other = prepared[:, previous_frames(keys.shape[1], sampling=self.config.sampling).to(keys.device)]
        if previous_keys is not None and self.config.sampling != "self":
            other[:, 0] = branch.fusion.prepare(previous_keys, features.grid)
        slots, _ = branch(
            keys,
            other,
            noise=_seeded_noise(self.config.slots, instances, self.width, seed).to(keys.device),
            instances=instances,
            iterations=iterations,
            return_iterations=return_iterations,
        )
        maps = None
        if slots.iterations is not None:
            maps = [
                IterationMaps(*pair)
                for pair in zip(slots.iterations.semantic, slots.iterations.instance, strict=True)
            ]
        return SlotMaps(
            slots.semantic,
            slots.instance,
            slots.semantic_slots,
            slots.instance_slots,
            slots.initial_instances,
            features.grid,
            maps,
        )

    def save(self, directory: str | Path):
        """Write config.json (under "model") and model.safetensors, each whole or not at all.

        Other entries of an existing config.json stay. Raises `UserError` when it describes another model.
        """
        files.save_model(directory, self.config.to_dict(), self.state_dict())

    @classmethod
    def load(cls, directory: str | Path) -> "SMTC":
        """The model that `save` wrote, its encoder's weights included; needs no network and no weights file.

        Raises `UserError` when the directory holds no such model, or a damaged one.
        """
        values, state = files.load_model(directory)
        config = SMTCConfig.from_dict(values)
        model = cls(dataclasses.replace(config, weights=None, pretrained=False))
        model.config = config
        files.restore(model, state, directory)
        return model


def _draw(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    source = device if generator is None else generator.device
    return torch.randn(shape, device=source, generator=generator).to(device)


def _seeded_noise(semantics: int, instances: int, width: int, seed: int) -> Tensor:
    # Drawn on the CPU and instance by instance, so that neither the device nor P changes the first ones.
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(semantics, width, generator=generator) for _ in range(instances)], dim=1)


def _follow(teacher: nn.Module, student: nn.Module, momentum: float):
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)


def _matrices(module: nn.Module) -> dict[int, nn.Parameter]:
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.GRUCell)
    return {
        id(parameter): parameter
        for layer in module.modules()
        if isinstance(layer, layers)
        for parameter in layer.parameters(recurse=False)
        if parameter.ndim >= 2
    }
