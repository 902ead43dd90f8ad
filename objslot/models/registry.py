"""Encoders by name: those of timm, and those that were registered."""

from collections.abc import Callable

import timm
from torch import nn

from objslot.errors import UserError
from objslot.models.encoder import Encoder
from objslot.models.weights import create_pretrained, load_weights

_registered: dict[str, Callable[[bool], nn.Module]] = {}


def register_encoder(name: str, factory: Callable[[bool], nn.Module]):
    """Make an encoder of your own available as `SMTCConfig(encoder=name)`.

    `factory(pretrained)` returns a timm-style VisionTransformer (built with `dynamic_img_size=True` to take
    any frame size) or ResNet, with its own weights when `pretrained` is true. Registering a name again
    replaces it.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"name: got {name!r}, expected a non-empty string")
    _registered[name] = factory


def build_encoder(
    name: str,
    *,
    weights: str | None = None,
    pretrained: bool = True,
    image_size: tuple[int, int] = (256, 256),
    key_center: str = "bias",
    train: bool = False,
) -> Encoder:
    """An encoder by its registered or timm name, with weights from a file, published ones, or random ones.

    `image_size` (height, width) in pixels matters only to models that cannot change their frame size later.
    Raises `UserError` for an unknown name, a model of another kind, wrong weights, or weights that are only
    on the hub when there is no network.
    """
    if name in _registered:
        model = _registered[name](pretrained and weights is None)
        if not isinstance(model, nn.Module):
            raise UserError(
                f"encoder {name}: its factory returned {type(model).__name__}, expected an nn.Module"
            )
    else:
        model = _create_timm(name, pretrained and weights is None, image_size)
    encoder = Encoder(model, name=name, key_center=key_center, train=train)
    if weights is not None:
        load_weights(encoder.model, weights, name)
    return encoder


def _create_timm(name: str, pretrained: bool, image_size: tuple[int, int]) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        known = f"; registered: {', '.join(sorted(_registered))}" if _registered else ""
        raise UserError(f"encoder: {name!r} is neither a model of timm nor registered{known}")

    def create(**arguments):
        if pretrained:
            return create_pretrained(name, {"num_classes": 0, **arguments})
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments)

    # Families differ in what they take, and say so only by refusing the argument.
    attempts = ({"dynamic_img_size": True}, {"output_stride": 8}, {"img_size": image_size}, {})
    for arguments in attempts:
        try:
            return create(**arguments)
        except TypeError as error:
            failure = error
        except RuntimeError as error:
            raise UserError(f"encoder {name}: {error}") from error
    raise UserError(f"encoder {name}: timm cannot build it: {failure}") from failure
