"""One optimiser step: losses and gradients of its parts, then the update of student and teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from objslot.models import SMTC
from objslot.training.config import TrainingConfig
from objslot.training.distributed import World
from objslot.training.views import View

# Up to here products take half the time of fused attention, forward and backward; at 1600 positions they take more.
MOST_POSITIONS = 640


class TrainingStep:
    """Makes optimiser steps of ``model``: `add` each part of a batch, then `finish`.

    The teacher is in no wrapper and the losses are inside forward, so one process and many run the same code. Nothing
    waits for the device before `finish`, which reads all figures of a step at once.

    Attributes: ``optimizer``, fused AdamW.
    """

    def __init__(self, model: SMTC, config: TrainingConfig, world: World | None = None):
        self._model, self._config = model, config
        self._world = world or World(0, 1, torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(
            model.parameter_groups(config.lr, config.weight_decay, config.encoder_lr_scale), fused=True
        )
        if config.recompute_encoder:
            model.encoder.recompute_activations()
        if self._fused_attention_is_slow():
            model.encoder.attend_by_products()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._wrapped: nn.Module | None = None
        self._totals: dict[str, Tensor] = {}

    def _fused_attention_is_slow(self) -> bool:
        config = self._config
        learns = config.model.train_encoder and config.precision == "bf16" and self._world.device.type == "cpu"
        positions = math.prod(self._model.encoder.grid(self._model.frame_size))
        # Matrix products in bfloat16 are slow where there are no tiles for them. No public name asks for these.
        has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return learns and positions <= MOST_POSITIONS and has_tiles()

    def let_encoder_learn(self, learns: bool) -> None:
        """Freeze the encoder or let it learn, where the configuration trains it."""
        self._model.set_encoder_training(learns)
        self._wrapped = None

    def set_rate(self, factor: float) -> float:
        """Set the learning rates to `factor` times those at the start; returns that of the slots."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self.optimizer.param_groups[0]["lr"]

    def add(
        self, student: View, teacher: View, generators: Sequence[torch.Generator], *, last: bool = True
    ) -> None:
        """Losses and gradients of one of ``accumulate`` parts; the ``last`` one brings the processes together."""
        if self._wrapped is None:
            self._wrapped = self._wrap()
        device, parts = self._world.device, self._config.accumulate
        wrapped = self._wrapped
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
                terms = wrapped(student, teacher, generators)
            (terms["loss"] / parts).backward()
        for name, value in terms.items():
            share = value.detach() / parts
            self._totals[name] = self._totals[name] + share if name in self._totals else share

    def finish(self, stop: bool = False) -> tuple[dict[str, float], bool, bool]:
        """Update student and teacher, unless a loss or the gradient is not finite in any process.

        Returns the terms' means over parts and processes, with the gradient's norm; whether the update was left out;
        and whether ``stop`` is true in any process.
        """
        self._totals["grad_norm"] = _gradient_norm(self._model)
        sums = torch.stack([value.double() for value in self._totals.values()])
        # A value that is not finite in one process is not finite in the mean of all.
        *values, stops = self._world.mean([*sums.tolist(), float(stop)])
        terms = dict(zip(self._totals, values, strict=True))
        failed = not all(map(math.isfinite, values))
        if not failed:
            self.optimizer.step()
            self._model.update_teacher()
        self.optimizer.zero_grad(set_to_none=True)
        self._totals = {}
        return terms, failed, stops > 0

    def _wrap(self) -> nn.Module:
        module: nn.Module = self._model
        if self._config.compile:
            # A module's own `compile` would have DDP wrap, and name, what is not compiled.
            module = cast(nn.Module, torch.compile(self._model))
        if self._world.size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self._world.device.index] if self._world.device.type == "cuda" else None,
            # The last block of an encoder ends behind its keys.
            find_unused_parameters=self._config.model.train_encoder,
        )


def _gradient_norm(model: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
