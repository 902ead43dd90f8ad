"""Encoders: a ViT or ResNet of timm as a source of dense features of video frames."""

from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from objslot.errors import UserError


class FrameFeatures(NamedTuple):
    """Dense features of the frames of B clips of T frames, on an h x w grid of HW positions."""

    keys: Tensor
    """(B, T, HW, D): keys of the last block, centred; of a ResNet its feature map."""
    tokens: Tensor | None
    """(B, T, HW, D): output tokens of the encoder, for label propagation only; None where left out."""
    cls_attention: Tensor | None
    """(B, T, HW): attention of the last block's class token, mean over heads; None where there is none."""
    grid: tuple[int, int]
    """(h, w), with h * w == HW."""


class Encoder(nn.Module):
    """Features of a timm-style ViT (last block's keys, without the class token) or ResNet (res4 at stride 8).

    A frozen encoder stays in eval mode, carries no gradient and has no stochastic depth.
    `patch_size` is the side in pixels of what one position stands for, `width` the number of channels D.

    Raises `UserError` when `model` is no such ViT or ResNet.
    """

    def __init__(
        self, model: nn.Module, *, name: str = "encoder", key_center: str = "bias", train: bool = False
    ):
        super().__init__()
        self.name = name
        self.key_center = key_center
        self.model = model
        self._block_input: Tensor | None = None
        self._keeps_input = False
        if isinstance(model, ResNet):
            self._shorten_resnet(model)
        else:
            self._check_transformer(model)
            attention = model.blocks[-1].attn
            attention.register_forward_pre_hook(self._keep_block_input, with_kwargs=True)
        self.set_training(train)

    def _shorten_resnet(self, model: ResNet):
        # res5 is not used, and its weights would be most of what is kept and saved.
        for unused in ("layer4", "global_pool", "fc"):
            setattr(model, unused, nn.Identity())
        self.patch_size = 8
        self.width: int = model.feature_info[3]["num_chs"]
        self.has_cls_attention = False

    def _check_transformer(self, model: nn.Module):
        blocks = getattr(model, "blocks", None)
        attention = getattr(blocks[-1], "attn", None) if blocks is not None and len(blocks) else None
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if attention is None or patch is None or not hasattr(model, "forward_features"):
            raise UserError(
                f"encoder {self.name}: {type(model).__name__} is no ViT with blocks[-1].attn and "
                "patch_embed, and no ResNet; choose a vit_*, deit*, eva* or resnet* model of timm"
            )
        projection = getattr(attention, "qkv", None) or getattr(attention, "k_proj", None)
        if not isinstance(projection, nn.Linear):
            raise UserError(
                f"encoder {self.name}: the attention of its last block, {type(attention).__name__}, has "
                "neither a linear qkv nor a linear k_proj, so its keys cannot be read"
            )
        height, width = patch if isinstance(patch, tuple) else (patch, patch)
        if height != width:
            raise UserError(
                f"encoder {self.name}: got patches of {height} x {width} pixels, expected square ones"
            )
        self.patch_size = int(height)
        fused = getattr(attention, "qkv", None) is not None
        self.width = projection.out_features // 3 if fused else projection.out_features
        # Other attentions add position terms to the logits: their weights do not follow from q and k alone.
        self.has_cls_attention = (
            type(attention) is Attention and getattr(model, "cls_token", None) is not None
        )

    @property
    def key_bias(self) -> Tensor | None:
        """(D,) what `key_center="bias"` takes off the keys, without gradient; None where nothing is."""
        if self.key_center != "bias" or isinstance(self.model, ResNet):
            return None
        bias = _query_key_parameters(self.model.blocks[-1].attn)[3]
        return None if bias is None else bias.detach()

    def set_training(self, train: bool):
        """Let the encoder learn, or freeze it: eval mode, no gradient."""
        self.trains = train
        self.model.requires_grad_(train)
        if train:
            self._freeze_unused()
        self.train(self.training)

    def _freeze_unused(self):
        """Let only that learn which the keys depend on: distributed training waits for every gradient."""
        size = self._fixed_size() or (self.patch_size, self.patch_size)
        parameters = list(self.model.parameters())
        self.model.eval()
        with torch.enable_grad():
            keys = self(parameters[0].new_zeros(1, 1, 3, *size)).keys
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(keys.sum(), parameters, allow_unused=True), strict=True
        ):
            parameter.requires_grad_(gradient is not None)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(mode and self.trains)

    def snap(self, size: tuple[int, int]) -> tuple[int, int]:
        """The largest (height, width) in pixels, up to `size`, that makes whole positions."""
        height, width = (side // self.patch_size * self.patch_size for side in size)
        snapped = height, width
        if min(snapped) == 0:
            raise UserError(
                f"frame size: got {size[0]} x {size[1]} pixels, expected at least {self.patch_size} each way"
            )
        return snapped

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) positions of frames of `size` (height, width) in pixels; `UserError` unless whole."""
        height, width = size
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise UserError(
                f"frame size: got {height} x {width} pixels, expected multiples of {self.patch_size} "
                f"for encoder {self.name}"
            )
        fixed = self._fixed_size()
        if fixed is not None and fixed != (height, width):
            raise UserError(
                f"frame size: got {height} x {width} pixels, expected {fixed[0]} x {fixed[1]}, the only size "
                f"of encoder {self.name} (a VisionTransformer takes any with dynamic_img_size=True)"
            )
        return height // self.patch_size, width // self.patch_size

    def _fixed_size(self) -> tuple[int, int] | None:
        """The only frame size that the model takes, or None when it takes any."""
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        return None if size is None or getattr(self.model, "dynamic_img_size", False) else tuple(size)

    def recompute_activations(self, recompute: bool = True):
        """While the encoder learns, keep only what enters its blocks and compute the rest again when going back.

        Raises `UserError` for a model that cannot.
        """
        if not hasattr(self.model, "set_grad_checkpointing"):
            raise UserError(f"encoder {self.name}: {type(self.model).__name__} cannot compute its activations again")
        self.model.set_grad_checkpointing(recompute)

    def attend_by_products(self):
        """Make attention of plain matrix products, where timm's own would be called, and keep its weights.

        PyTorch's fused attention goes back slowly on CPUs in bfloat16: twice the time of the products and softmax,
        which need (heads, n, n) of memory a frame and block for n tokens.
        """
        for module in self.model.modules():
            if type(module) is Attention:
                module.fused_attn = False

    def forward(self, frames: Tensor, *, tokens: bool = True) -> FrameFeatures:
        """Features of frames (B, T, 3, H, W), floating point, normalised with ImageNet's mean and deviation.

        H and W are multiples of `patch_size`. Without `tokens` these may be left out, and what only they need is not
        computed. Raises `UserError` otherwise.
        """
        if frames.ndim != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise UserError(
                f"frames: got {frames.dtype} of shape {tuple(frames.shape)}, expected floating point "
                "(clips, frames, 3, height, width)"
            )
        grid = self.grid(tuple(frames.shape[-2:]))
        leading = frames.shape[:2]
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            if isinstance(self.model, ResNet):
                keys, found, cls_attention = self._resnet_features(frames.flatten(0, 1), grid)
            else:
                keys, found, cls_attention = self._transformer_features(frames.flatten(0, 1), grid, tokens)
            if self.key_center == "mean":
                keys = keys - keys.mean(dim=1, keepdim=True)
        return FrameFeatures(
            keys.unflatten(0, leading),
            None if found is None else found.unflatten(0, leading),
            None if cls_attention is None else cls_attention.unflatten(0, leading),
            grid,
        )

    def _keep_block_input(self, module, arguments, keywords):
        # Activations that are computed again pass here once more, when nobody waits for them.
        if self._keeps_input:
            self._block_input = arguments[0] if arguments else keywords["x"]

    def _last_input(self, frames: Tensor, tokens: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the attention of the last block sees, and the output tokens where they are wanted or come anyway."""
        blocks, prefixed = self.model.blocks, getattr(self.model, "num_prefix_tokens", 0) > 0
        plain = type(self.model) is VisionTransformer and type(blocks[-1]) is Block
        if not tokens and plain and prefixed and len(blocks) > 1:
            # The keys need the last block's norm alone: its attention and its MLP are left out.
            ((patches, prefix),) = self.model.forward_intermediates(
                frames,
                indices=[len(blocks) - 2],
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            return blocks[-1].norm1(torch.cat([prefix, patches], dim=1)), None
        self._keeps_input = True
        try:
            output = self.model.forward_features(frames)
        finally:
            self._keeps_input = False
        # The input of the attention, not the output of its qkv: some models use its weight without its call.
        x, self._block_input = self._block_input, None
        return x, output

    def _resnet_features(self, frames: Tensor, grid: tuple[int, int]):
        features = self.model.forward_features(frames)
        if tuple(features.shape[-2:]) != grid:
            raise UserError(
                f"encoder {self.name}: its res4 has {features.shape[-2]} x {features.shape[-1]} positions, "
                f"expected {grid[0]} x {grid[1]}; build it with output_stride=8"
            )
        tokens = features.flatten(2).transpose(1, 2)
        return tokens, tokens, None

    def _transformer_features(self, frames: Tensor, grid: tuple[int, int], tokens: bool):
        x, output = self._last_input(frames, tokens)
        prefix = int(getattr(self.model, "num_prefix_tokens", 1))
        expected = prefix + grid[0] * grid[1]
        output_fits = output is None or (x is not None and output.shape[:2] == x.shape[:2])
        if x is None or x.ndim != 3 or x.shape[1] != expected or not output_fits:
            raise UserError(
                f"encoder {self.name}: its last block sees {None if x is None else tuple(x.shape)}, expected "
                f"{expected} tokens a frame ({prefix} prefix and {grid[0]} x {grid[1]})"
            )
        attention = self.model.blocks[-1].attn
        query_weight, query_bias, key_weight, key_bias = _query_key_parameters(attention)
        keys = F.linear(x, key_weight)
        biased_keys = keys if key_bias is None else keys + key_bias
        cls_attention = None
        if self.has_cls_attention:
            query = F.linear(x[:, :1], query_weight, query_bias)
            cls_attention = _class_attention(attention, query, biased_keys)[:, prefix:]
        # The key bias adds the same to every logit of a query, so the model itself never sees its effect.
        if self.key_center == "none":
            keys = biased_keys
        return keys[:, prefix:], None if output is None else output[:, prefix:], cls_attention


def _query_key_parameters(attention: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Weight and bias (or None) of the query and of the key projection."""
    if getattr(attention, "qkv", None) is None:
        return attention.q_proj.weight, attention.q_proj.bias, attention.k_proj.weight, attention.k_proj.bias
    query_weight, key_weight, _ = attention.qkv.weight.chunk(3)
    if attention.qkv.bias is not None:
        query_bias, key_bias, _ = attention.qkv.bias.chunk(3)
        return query_weight, query_bias, key_weight, key_bias
    return query_weight, getattr(attention, "q_bias", None), key_weight, getattr(attention, "k_bias", None)


def _class_attention(attention: Attention, query: Tensor, keys: Tensor) -> Tensor:
    """(B, 1, D) query and (B, n, D) keys of all tokens -> (B, n) attention weights, mean over the heads."""
    query = attention.q_norm(query.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    keys = attention.k_norm(keys.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    logits = (query * attention.scale) @ keys.transpose(-2, -1)
    return logits.float().softmax(dim=-1).mean(dim=1).squeeze(1)
