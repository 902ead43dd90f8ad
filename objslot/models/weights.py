"""Weights of an encoder: from a local file, strictly, or from the hub where there is a network."""

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from objslot.errors import UserError

# A training checkpoint keeps the weights under one of these; the teacher is what DINO's authors evaluate.
_WRAPPERS = ("teacher", "state_dict", "model", "student")
_PREFIXES = ("module.", "backbone.", "encoder.")
# Parts that published checkpoints carry and no encoder here uses.
_HEADS = ("head", "head_dist", "fc", "mask_token", "layer4")
_PROBE_SECONDS = 5


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch file, without running any code of the file.

    Wrappers of training checkpoints ("state_dict", "teacher", "backbone.", "module.") are taken off.
    Raises `UserError` when the file is missing, of another kind, damaged or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: {path} is not a file")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            values = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(
            f"weights: cannot read {path} as safetensors or as a PyTorch state dict: {reason}"
        ) from error
    return _unwrap(values, path)


def _unwrap(values, path: Path) -> dict[str, Tensor]:
    while isinstance(values, dict):
        inner = next((values[name] for name in _WRAPPERS if isinstance(values.get(name), dict)), None)
        if inner is None:
            break
        values = inner
    if (
        not isinstance(values, dict)
        or not values
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items())
    ):
        raise UserError(
            f"weights: {path} holds {type(values).__name__}, expected named tensors (a state dict)"
        )
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in values):
            values = {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}
    return values


def load_weights(model: nn.Module, path: str | Path, name: str):
    """Load a local weights file into `model`, every parameter of it and nothing else.

    Position embeddings of another grid are resampled. Raises `UserError` when anything is missing,
    unexpected or of another shape, with how many and an example; `model` is then unchanged.
    """
    state = read_state_dict(path)
    expected = model.state_dict()
    problems = []
    patch = "patch_embed.proj.weight"
    same_patch = (
        patch not in state or patch not in expected or state[patch].shape[2:] == expected[patch].shape[2:]
    )
    # timm's own filter knows the names of the original releases; it would also resample patches, silently.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None and same_patch:
        try:
            state = adapt(state, model)
        except Exception as error:
            raise UserError(
                f"weights: {path} does not fit encoder {name}: {type(error).__name__}: {error}"
            ) from error
    state = {key: value for key, value in state.items() if key in expected or key.split(".")[0] not in _HEADS}
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    if missing:
        problems.append(f"{len(missing)} missing (such as {missing[0]})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected (such as {unexpected[0]})")
    if reshaped:
        key = reshaped[0]
        problems.append(
            f"{len(reshaped)} of another shape (such as {key}: "
            f"{tuple(state[key].shape)}, expected {tuple(expected[key].shape)})"
        )
    if problems:
        raise UserError(
            f"weights: {path} does not fit encoder {name}: of {len(expected)} tensors, " + ", ".join(problems)
        )
    model.load_state_dict(state)


def create_pretrained(name: str, arguments: dict) -> nn.Module:
    """A timm model with its published weights, from the local cache or from the hub.

    Raises `UserError` within seconds when neither is there.
    """
    advice = "bring a weights file (--weights FILE; in Python weights=FILE, or pretrained off for random weights)"
    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"encoder {name}: timm publishes no weights for it; {advice}")
    try:
        overlay = {}
        if config.hf_hub_id:
            cached = _cached_file(config)
            if cached is not None:
                overlay = {"file": cached}
            else:
                _probe_hub()
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except TypeError:
        raise
    except Exception as error:
        raise UserError(
            f"encoder {name}: its published weights cannot be downloaded ({type(error).__name__}); {advice}"
        ) from error


def _cached_file(config) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = config.hf_hub_id.partition("@")
    for filename in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
        if filename:
            cached = try_to_load_from_cache(repository, filename, revision=revision or None)
            if isinstance(cached, str):
                return cached
    return None


def _probe_hub():
    """Raise at once where the hub's own retries would take most of a minute."""
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
