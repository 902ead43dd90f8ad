"""SMTC: semantic slots shared by all videos, instance slots inside each, learned from unlabelled clips.

Qian, Ding, Liu, Lin: Semantics Meets Temporal Correspondence: Self-supervised Object-centric Learning in
Videos, ICCV 2023.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from objslot import objectives
from objslot.errors import UserError
from objslot.models import files
from objslot.models.branch import IterationMaps, SlotBranch, SlotMaps, random_noise, seeded_noise
from objslot.models.config import SMTCConfig
from objslot.models.correspondence import draw_other_frames, gather_frames, previous_frames
from objslot.models.encoder import FrameFeatures
from objslot.models.registry import build_encoder
from objslot.nn import SemanticSlots


class SMTC(nn.Module):
    """The model: an encoder, a student that learns, and a teacher that follows it as a moving average.

    `grid` and `frame_size` are the positions and the pixels, (height, width), of training frames; `width` is that of
    the slots. Call it to get the losses, `segment` to get masks. Raises `UserError` for an encoder that cannot be had,
    or that gives no class-token attention where the configuration needs it.
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
        self.register_buffer("teacher_updates", torch.zeros((), dtype=torch.int64))
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
        """Features of frames (B, T, 3, H, W), floating point, normalised, H and W multiples of the patch.

        Output tokens, which the model has no use for, may be left out.
        """
        if use_teacher and self.teacher_encoder is not None:
            return self.teacher_encoder(frames, tokens=False)
        return self.encoder(frames, tokens=False)

    def forward(
        self,
        student: Tensor | FrameFeatures,
        teacher: Tensor | FrameFeatures,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Losses on B clips of T frames, each seen by the student and, augmented otherwise, by the teacher.

        Frames are (B, T, 3, H, W), normalised; features come from `encode`. `generator`, or one for
        each clip, draws the frames that correspond and the noise of the instances.

        Returns scalars: loss (weighted sum), semantic, instance, diversity; without gradient valid_share
        (valid student instances) and fusion_ratio (|E| / |F|). Raises `UserError` for clips that do not fit
        each other, or are too short.
        """
        same = student is teacher and isinstance(student, FrameFeatures)
        if not isinstance(student, FrameFeatures):
            student = self.encode(student)
        with torch.no_grad():
            if not isinstance(teacher, FrameFeatures):
                teacher = self.encode(teacher, use_teacher=True)
        student, teacher = self._checked("student", student), self._checked("teacher", teacher)
        if student.keys.shape != teacher.keys.shape or student.grid != teacher.grid:
            raise UserError(
                f"teacher: got features {tuple(teacher.keys.shape)} on grid {teacher.grid}, expected those "
                f"of the student, {tuple(student.keys.shape)} on grid {student.grid}"
            )
        config, device = self.config, student.keys.device
        clips, frames = student.keys.shape[:2]
        index = draw_other_frames(
            clips, frames, config.n_other, sampling=config.sampling, generator=generator
        ).to(device)
        shape = (clips, frames, config.slots, config.instances, self.width)

        correspondence = _correspond(self.student, student, index)
        found, ratio = self.student(student.keys, correspondence, noise=random_noise(shape, device, generator))
        objects = self.student.head(found.instance_slots)
        with torch.no_grad():
            if not same:
                correspondence = _correspond(self.teacher, teacher, index)
            target, _ = self.teacher(teacher.keys, correspondence, noise=random_noise(shape, device, generator))
            target_objects = self.teacher.head(target.instance_slots)
        # The losses are sums over thousands of terms, too fine for half precision.
        with torch.autocast(device.type, enabled=False):
            losses = self._losses(found, objects, target, target_objects, teacher)
        return {**losses, "fusion_ratio": ratio}

    def _checked(self, name: str, features: FrameFeatures) -> FrameFeatures:
        """The features, keys as precise as the parameters; `UserError` when they are of another model."""
        keys, grid = features.keys, tuple(features.grid)
        if keys.ndim != 4 or keys.shape[2] != grid[0] * grid[1] or keys.shape[3] != self.encoder.width:
            raise UserError(
                f"{name}: got keys {tuple(keys.shape)} on grid {grid}, expected "
                f"(clips, frames, positions of the grid, {self.encoder.width})"
            )
        return features._replace(keys=keys.to(self.student.slots.mu.dtype), grid=grid)

    def _losses(
        self,
        found: SemanticSlots,
        objects: Tensor,
        target: SemanticSlots,
        target_objects: Tensor,
        teacher: FrameFeatures,
    ) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            mass = self._mass(teacher)
            valid, target_valid = self._valid(found), self._valid(target)
        semantic = objectives.semantic_alignment_loss(
            found.semantic_logits,
            (target.semantic_logits.float() / config.teacher_temperature).softmax(dim=-2),
            teacher.keys,
            mass,
            eps=config.eps,
            n_iters=config.sinkhorn_iterations,
        )
        instance = objectives.instance_alignment_loss(objects, target_objects, valid, target_valid)
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
        }

    def _mass(self, teacher: FrameFeatures) -> Tensor | None:
        keys = teacher.keys
        bias = (self.teacher_encoder or self.encoder).key_bias
        # The activation map is that of the keys as the layer makes them: taking their bias off blurs it.
        if self.config.marginal == "caam" and bias is not None:
            keys = keys + bias
        return objectives.marginals(self.config.marginal, keys, teacher.cls_attention)

    def _valid(self, slots: SemanticSlots) -> Tensor:
        return objectives.valid_instances(
            slots.semantic,
            slots.semantic_slots,
            slots.instance_slots,
            similarity=self.config.valid_similarity,
            threshold=self.config.valid_threshold,
            area=self.config.valid_area,
        )

    @torch.no_grad()
    def update_teacher(self):
        """Move the teacher towards the student; call it after every optimiser step.

        The momentum of update t is the configured one, or max(0.99, (1 + t) / (10 + t)) while that is less: a
        teacher that remembers its random start for a thousand steps would be of no use to a run of a thousand
        steps, and one that hardly remembers lets all positions fall to one semantics.
        """
        count = int(self.teacher_updates)
        momentum = min(self.config.teacher_momentum, max(0.99, (1 + count) / (10 + count)))
        self.teacher_updates += 1
        _follow(self.teacher, self.student, momentum)
        if self.teacher_encoder is not None and self.encoder.trains:
            _follow(self.teacher_encoder, self.encoder, momentum)

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
                raise UserError(f"{name}: got {value!r}, expected an integer of at least 1")
        features = self._checked("features", features)
        keys = features.keys
        if previous_keys is not None and previous_keys.shape != keys[:, 0].shape:
            raise UserError(
                f"previous_keys: got {tuple(previous_keys.shape)}, expected {tuple(keys[:, 0].shape)}"
            )
        branch = self.teacher if use_teacher else self.student
        prepared = branch.fusion.prepare(keys, features.grid)
        other = prepared[:, previous_frames(keys.shape[1], sampling=self.config.sampling).to(keys.device)]
        if previous_keys is not None and self.config.sampling != "self":
            other[:, 0] = branch.fusion.prepare(previous_keys.to(keys.dtype), features.grid)
        slots, _ = branch(
            keys,
            branch.fusion.correspond(keys, other),
            noise=seeded_noise(self.config.slots, instances, self.width, seed).to(keys.device),
            instances=instances,
            iterations=iterations,
            return_iterations=return_iterations,
        )
        maps = None
        if slots.iterations is not None:
            maps = [IterationMaps(*pair) for pair in zip(*slots.iterations, strict=True)]
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
        files.check_sizes(config, state, directory)
        model = cls(dataclasses.replace(config, weights=None, pretrained=False))
        model.config = config
        files.restore(model, state, directory)
        return model


def _correspond(branch: SlotBranch, features: FrameFeatures, index: Tensor) -> Tensor:
    others = gather_frames(branch.fusion.prepare(features.keys, features.grid), index)
    others = others.squeeze(2) if others.shape[2] == 1 else others.mean(dim=2)
    return branch.fusion.correspond(features.keys, others)


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
