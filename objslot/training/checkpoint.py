"""Checkpoints: one safetensors file each, tensors and a JSON header, written whole or not at all.

Loading one runs no code. What a frozen encoder holds is not in it: that is written once, with the model.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from objslot.errors import UserError
from objslot.models import SMTC
from objslot.models.files import write_whole

_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, after ``step`` steps."""

    path: Path
    step: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Those in ``folder``, the oldest first; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted((Checkpoint(path, int(match[1])) for path, match in matches if match), key=lambda c: c.step)


def save_checkpoint(
    folder: Path,
    step: int,
    model: SMTC,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write the checkpoint of ``step``, then remove all but the ``keep`` newest.

    ``state`` is JSON. Raises `UserError` when it cannot be written, for a full disk say; those there are stay
    whole.
    """
    tensors = {f"model/{name}": tensor for name, tensor in _own_state(model).items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        tensors |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in values.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"state": json.dumps({**state, "step": step})}
    try:
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step-{step:08d}.safetensors", lambda path: save_file(tensors, path, header))
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise unwritable(f"{folder}: the checkpoint of step {step}", folder, error) from error
    drop_old(folder, keep)


def unwritable(what: str, folder: Path, error: Exception) -> UserError:
    """``what`` cannot be written: the error that says so and names the checkpoint in ``folder`` to go on from."""
    older = [checkpoint.step for checkpoint in list_checkpoints(folder)]
    whole = f"; the checkpoint of step {older[-1]} is whole, make room and resume" if older else ""
    return UserError(f"{what} cannot be written ({reason(error)}){whole}")


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints."""
    for checkpoint in list_checkpoints(folder)[:-keep]:
        checkpoint.path.unlink(missing_ok=True)


def load_checkpoint(checkpoint: Checkpoint, model: SMTC, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back weights and optimiser state; returns the ``state`` that was saved.

    Raises `UserError` for a file that is damaged or of another model; nothing is then changed.
    """
    try:
        with safe_open(checkpoint.path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if state["step"] != checkpoint.step:
            raise ValueError(f"it says it is of step {state['step']}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint.path}: not a checkpoint that can be read ({reason(error)})") from error
    expected = {f"model/{name}": tensor for name, tensor in _own_state(model).items()}
    found = {name for name in tensors if name.startswith("model/")}
    wrong = sorted(found ^ expected.keys()) or [
        name for name in expected if tensors[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(f"{checkpoint.path}: of another model, {len(wrong)} tensors do not fit (such as {wrong[0]})")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    _restore_optimizer(optimizer, dict(model.named_parameters()), tensors)
    return state


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            parameter, key = name.removeprefix("optimizer/").rsplit("/", 1)
            target = parameters[parameter]
            optimizer.state[target][key] = tensor.to(target.device)


def _own_state(model: SMTC) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.train_encoder:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """One short line of what went wrong."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]
