"""A model on disk: config.json and model.safetensors, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from objslot.errors import UserError
from objslot.models.config import SMTCConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_model(directory: str | Path, config: dict[str, Any], state: dict[str, Tensor]):
    """Write the configuration under "model" of config.json, and the tensors.

    What else an existing config.json holds stays. Raises `UserError` when it describes another model,
    `OSError` when writing fails; the files that were there are then unchanged.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = _read_config(directory) if (directory / CONFIG).exists() else {}
    plain = json.loads(json.dumps(config))
    if "model" in values and values["model"] != plain:
        raise UserError(f"{directory} already holds another model; choose another directory")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(directory / WEIGHTS, lambda path: save_file(tensors, path))
    if "model" not in values:
        text = json.dumps({**values, "model": plain}, indent=2) + "\n"
        write_whole(directory / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], Any]):
    """Let `write` fill a temporary file beside `path`, which then takes its place in one step."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(temporary)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        make_readable(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_readable(path: Path | str):
    """Give a temporary file, which only its owner can read, the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def load_model(directory: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors of a saved model; `UserError` when they are missing or damaged."""
    from safetensors.torch import load_file

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no model: {name} is missing")
    values = _read_config(directory)
    if "model" not in values:
        raise UserError(f'{directory / CONFIG} has no "model" entry, so it describes no model')
    try:
        state = load_file(directory / WEIGHTS)
    except Exception as error:
        raise UserError(f"cannot read {directory / WEIGHTS} as safetensors: {error}") from error
    return values["model"], state


def check_sizes(config: SMTCConfig, state: dict[str, Tensor], directory: str | Path):
    """Raise `UserError` where the tensors do not bear out the sizes that the configuration claims.

    Done before anything of these sizes is made: a file from a stranger may claim any.
    """
    slots, embed = state.get("student.slots.mu"), state.get("student.fusion.embed.weight")
    largest_patch = 64
    pixels = config.frame_size[0] * config.frame_size[1]
    fits = (
        slots is not None
        and embed is not None
        and slots.ndim == embed.ndim == 2
        and tuple(slots.shape) == (config.slots, config.width or slots.shape[1])
        and pixels <= embed.shape[1] * 4 * largest_patch**2
    )
    if not fits:
        raise UserError(
            f"{Path(directory) / WEIGHTS} does not fit its {CONFIG}: {config.slots} slots on frames of "
            f"{config.frame_size[0]} x {config.frame_size[1]} pixels are claimed there"
        )


def restore(model: nn.Module, state: dict[str, Tensor], directory: str | Path):
    """Put the tensors into `model`; raises `UserError` when they are not exactly its own."""
    expected = model.state_dict()
    wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise UserError(
            f"{Path(directory) / WEIGHTS} does not fit its {CONFIG}: {len(wrong)} of {len(expected)} tensors "
            f"are missing, unexpected or of another shape (such as {wrong[0]})"
        )
    model.load_state_dict(state)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, expected named entries")
    return values
