"""Encoders: keys and class attention against the definition, freezing, frame sizes, weights files."""

import copy
from unittest.mock import patch

import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.models import Encoder, SMTCConfig, build_encoder, register_encoder
from objslot.models import weights as weights_module


def tiny_vit(**changes):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**(settings | {"num_classes": 0, "dynamic_img_size": True} | changes))


def biased(model):
    """Random biases, which timm would leave at zero where nothing that they do can be seen."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def by_hand(model, frames):
    """Queries and keys (frames, heads, tokens, d) of the last block, from its input."""
    x = model.patch_embed(frames)
    x = model.norm_pre(model._pos_embed(x))
    for block in model.blocks[:-1]:
        x = block(x)
    last = model.blocks[-1]
    qkv = last.attn.qkv(last.norm1(x))
    query, key, _ = qkv.unflatten(-1, (3, last.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_and_class_attention_equal_those_by_hand(registers, qk_norm):
    model = biased(tiny_vit(reg_tokens=registers, qk_norm=qk_norm, norm_layer=nn.LayerNorm)).eval()
    frames = torch.randn(2, 3, 3, 32, 48)
    found = {
        center: Encoder(copy.deepcopy(model), key_center=center)(frames)
        for center in ("none", "bias", "mean")
    }
    with torch.no_grad():
        query, key = by_hand(model, frames.flatten(0, 1))
        whole = key.transpose(1, 2).flatten(2)[:, 1 + registers :].unflatten(0, (2, 3))
        attention = model.blocks[-1].attn
        logits = attention.q_norm(query) @ attention.k_norm(key).transpose(-1, -2) * attention.scale
        class_attention = logits.softmax(-1)[:, :, 0].mean(1)[:, 1 + registers :].unflatten(0, (2, 3))
        tokens = model.forward_features(frames.flatten(0, 1))[:, 1 + registers :].unflatten(0, (2, 3))
    bias = attention.qkv.bias[24:48]
    torch.testing.assert_close(found["none"].keys, whole)
    torch.testing.assert_close(found["bias"].keys, whole - bias)
    torch.testing.assert_close(found["mean"].keys, whole - whole.mean(2, keepdim=True))
    for features in found.values():
        assert features.grid == (4, 6)
        torch.testing.assert_close(features.cls_attention, class_attention)
        torch.testing.assert_close(features.tokens, tokens)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"depth": 1}])
def test_without_tokens_the_keys_are_the_same_and_less_is_computed(changes):
    encoder = Encoder(biased(tiny_vit(**changes)))
    frames = torch.randn(2, 3, 3, 32, 48)
    calls = []
    encoder.model.blocks[-1].mlp.register_forward_hook(lambda *_: calls.append(1))
    lean = encoder(frames, tokens=False)
    assert len(calls) == (1 if "class_token" in changes or "depth" in changes else 0)
    whole = encoder(frames)
    assert torch.equal(lean.keys, whole.keys)
    assert whole.tokens is not None
    if whole.cls_attention is not None:
        assert torch.equal(lean.cls_attention, whole.cls_attention)


@pytest.mark.parametrize("tokens", [True, False])
def test_activations_computed_again_give_the_same_gradient_from_less_memory(tokens):
    model = biased(tiny_vit(depth=6))
    frames = torch.randn(1, 4, 3, 32, 32)
    gradients, kept = [], []
    for recompute in (False, True):
        encoder = Encoder(copy.deepcopy(model), train=True)
        encoder.recompute_activations(recompute)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.nbytes) or t, lambda t: t):
            keys = encoder(frames, tokens=tokens).keys
        keys.square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
        kept.append(sum(held))
        assert encoder._block_input is None
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert kept[1] < kept[0] / 4


def test_attention_by_products_gives_the_same_keys_and_gradients():
    model = biased(tiny_vit())
    frames = torch.randn(1, 2, 3, 32, 32)
    found = []
    for products in (False, True):
        encoder = Encoder(copy.deepcopy(model), train=True)
        if products:
            encoder.attend_by_products()
        with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused:
            keys = encoder(frames).keys
        assert bool(fused.call_count) is not products
        keys.square().sum().backward()
        found.append((keys, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0])


def test_key_bias_is_what_was_taken_off():
    model = biased(tiny_vit())
    assert Encoder(model, key_center="none").key_bias is None
    frames = torch.randn(1, 1, 3, 32, 32)
    centred = Encoder(model, key_center="bias")
    restored = centred(frames).keys + centred.key_bias
    torch.testing.assert_close(restored, Encoder(model, key_center="none")(frames).keys)
    assert not centred.key_bias.requires_grad


def test_frozen_encoder_leaves_no_graph_and_stays_in_eval_mode():
    encoder = Encoder(tiny_vit(drop_path_rate=0.9, proj_drop_rate=0.5))
    encoder.train()
    frames = torch.randn(1, 2, 3, 32, 32, requires_grad=True)
    first, second = encoder(frames), encoder(frames)
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(value.grad_fn is None for value in first[:3])
    assert torch.equal(first.keys, second.keys)


def test_training_encoder_has_a_graph_until_it_is_frozen():
    encoder = Encoder(tiny_vit(), train=True)
    encoder.train()
    frames = torch.randn(1, 1, 3, 32, 32)
    encoder(frames).keys.sum().backward()
    assert encoder.model.training
    assert encoder.model.patch_embed.proj.weight.grad.abs().sum() > 0
    encoder.set_training(False)
    assert encoder(frames).keys.grad_fn is None
    assert not encoder.model.training
    encoder.set_training(True)
    encoder.train()
    assert encoder(frames).keys.grad_fn is not None


def test_a_copy_records_its_own_features():
    encoder = Encoder(tiny_vit())
    other = copy.deepcopy(encoder)
    nn.init.zeros_(other.model.blocks[-1].attn.qkv.weight)
    frames = torch.randn(1, 1, 3, 32, 32)
    assert other(frames).keys.abs().sum() == 0
    assert encoder(frames).keys.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "patch", "width", "has_attention"),
    [
        ("vit_tiny_patch16_224", 16, 192, True),
        ("vit_small_patch14_dinov2", 14, 384, True),
        ("vit_small_patch8_224", 8, 384, True),
        ("eva02_tiny_patch14_224", 14, 192, False),
        ("resnet18", 8, 256, False),
        ("resnet50", 8, 1024, False),
    ],
)
def test_timm_encoders(name, patch, width, has_attention):
    encoder = build_encoder(name, pretrained=False)
    features = encoder(torch.randn(1, 1, 3, 3 * patch, 2 * patch))
    assert (encoder.patch_size, encoder.width, encoder.has_cls_attention) == (patch, width, has_attention)
    assert features.grid == (3, 2)
    assert features.keys.shape == (1, 1, 6, width)
    assert features.tokens.shape[:3] == (1, 1, 6)
    assert (features.cls_attention is not None) == has_attention
    assert features.keys.std() > 0


def tiny_eva(**changes):
    settings = {"embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
    return timm.create_model("eva02_tiny_patch14_224", pretrained=False, **(settings | changes))


def test_separate_projections_of_query_and_key():
    model = biased(tiny_eva(qkv_fused=False))
    seen = []
    model.blocks[-1].attn.k_proj.register_forward_hook(
        lambda module, arguments, output: seen.append(output[:, 1:])
    )
    features = Encoder(model, key_center="none")(torch.randn(1, 2, 3, 28, 28))
    torch.testing.assert_close(features.keys[0], seen[0])


def test_model_that_never_calls_its_qkv_layer():
    model = tiny_eva()
    last, seen = model.blocks[-1], []
    last.norm1.register_forward_hook(lambda module, arguments, output: seen.append(output[:, 1:]))
    last.attn.qkv.register_forward_hook(
        lambda *called: pytest.fail("the layer is called: choose another model")
    )
    features = Encoder(model, key_center="none")(torch.randn(1, 2, 3, 28, 28))
    torch.testing.assert_close(features.keys[0], seen[0] @ last.attn.qkv.weight[48:96].T)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mixer_s32_224", "resnetv2_50"])
def test_other_architectures_are_refused(name):
    with pytest.raises(UserError, match=f"encoder {name}.*no ViT.*no ResNet"):
        build_encoder(name, pretrained=False)


def test_attention_without_linear_projections_is_refused():
    model = tiny_vit()
    model.blocks[-1].attn.qkv = nn.Conv1d(24, 72, 1)
    with pytest.raises(UserError, match="neither a linear qkv nor a linear k_proj"):
        Encoder(model)


def test_class_token_outside_the_blocks_is_refused():
    encoder = build_encoder("cait_xxs24_224", pretrained=False, image_size=(32, 32))
    with pytest.raises(UserError, match="expected 5 tokens a frame"):
        encoder(torch.randn(1, 1, 3, 32, 32))


def test_frame_sizes():
    encoder = Encoder(tiny_vit(), name="mine")
    assert encoder.snap((47, 16)) == (40, 16)
    with pytest.raises(UserError, match="at least 8"):
        encoder.snap((7, 64))
    with pytest.raises(UserError, match="got 36 x 32 pixels, expected multiples of 8 for encoder mine"):
        encoder(torch.randn(1, 1, 3, 36, 32))
    with pytest.raises(UserError, match=r"\(clips, frames, 3, height, width\)"):
        encoder(torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match=r"torch.uint8"):
        encoder(torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8))
    fixed = Encoder(tiny_vit(dynamic_img_size=False))
    fixed(torch.randn(1, 1, 3, 32, 32))
    with pytest.raises(UserError, match="got 32 x 48 pixels, expected 32 x 32, the only size"):
        fixed(torch.randn(1, 1, 3, 32, 48))


def test_registered_encoder():
    asked = []

    def factory(pretrained):
        asked.append(pretrained)
        return tiny_vit()

    register_encoder("test_registered", factory)
    assert build_encoder("test_registered").width == 24
    build_encoder("test_registered", pretrained=False)
    assert asked == [True, False]
    register_encoder("test_registered", lambda pretrained: None)
    with pytest.raises(UserError, match="its factory returned NoneType"):
        build_encoder("test_registered")
    with pytest.raises(UserError, match="expected a non-empty string"):
        register_encoder("", factory)


def test_unknown_names():
    with pytest.raises(UserError, match="neither a model of timm nor registered"):
        build_encoder("no_such_model", pretrained=False)
    with pytest.raises(UserError, match=r"Invalid pretrained tag"):
        build_encoder("vit_tiny_patch16_224.no_such_tag", pretrained=False)


def test_without_network_pretrained_fails_at_once_and_says_what_to_do():
    with pytest.raises(UserError, match="--weights FILE.*weights=FILE.*pretrained off") as caught:
        build_encoder(SMTCConfig().encoder)
    assert "\n" not in str(caught.value)


def test_cached_weights_need_no_network(tmp_path, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(weights_module, "_cached_file", lambda config: str(tmp_path / "model.safetensors"))
    encoder = build_encoder("vit_tiny_patch16_224")
    assert torch.equal(encoder.model.patch_embed.proj.weight, model.patch_embed.proj.weight)


class TestWeightsFiles:
    @pytest.fixture(autouse=True)
    def _register(self):
        register_encoder("test_weights", lambda pretrained: tiny_vit())

    @pytest.fixture
    def state(self):
        return tiny_vit().state_dict()

    def load(self, path):
        return build_encoder("test_weights", weights=str(path)).model

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {
                "student": {"module.backbone.x": torch.zeros(1)},
                "teacher": {"backbone." + name: value for name, value in state.items()}
                | {"head.mlp.0": torch.ones(1)},
            },
            lambda state: {"model": {"module." + name: value for name, value in state.items()}},
            lambda state: state | {"head.weight": torch.ones(5, 24), "fc.bias": torch.ones(5)},
        ],
        ids=["plain", "state_dict", "dino", "module", "head"],
    )
    def test_torch_files(self, tmp_path, state, wrap):
        torch.save(wrap(state), tmp_path / "weights.pth")
        loaded = self.load(tmp_path / "weights.pth").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_safetensors_whatever_the_name(self, tmp_path, state):
        safetensors.torch.save_file(state, tmp_path / "weights.bin")
        loaded = self.load(tmp_path / "weights.bin").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_position_embeddings_of_another_grid_are_resampled(self, tmp_path):
        torch.save(tiny_vit(img_size=64).state_dict(), tmp_path / "weights.pth")
        assert self.load(tmp_path / "weights.pth").pos_embed.shape == (1, 17, 24)

    def test_incomplete_file(self, tmp_path, state):
        del state["blocks.1.attn.qkv.weight"], state["norm.bias"]
        state["blocks.7.extra"] = torch.zeros(1)
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(
            UserError, match=r"2 missing \(such as blocks\.1\.attn.*1 unexpected \(such as blocks\.7"
        ):
            self.load(tmp_path / "weights.pth")

    def test_another_width(self, tmp_path):
        torch.save(tiny_vit(embed_dim=48).state_dict(), tmp_path / "weights.pth")
        with pytest.raises(UserError, match="of another shape"):
            self.load(tmp_path / "weights.pth")

    def test_another_patch_is_not_resampled(self, tmp_path):
        torch.save(tiny_vit(patch_size=16, img_size=64).state_dict(), tmp_path / "weights.pth")
        with pytest.raises(
            UserError, match=r"patch_embed\.proj\.weight: \(24, 3, 16, 16\), expected \(24, 3, 8, 8\)"
        ):
            self.load(tmp_path / "weights.pth")

    @pytest.mark.parametrize(
        "content",
        [b"", b"not weights at all", b"\x10\0\0\0\0\0\0\0{broken json}"],
        ids=["empty", "text", "broken"],
    )
    def test_damaged_file(self, tmp_path, content):
        (tmp_path / "weights").write_bytes(content)
        with pytest.raises(UserError, match="cannot read") as caught:
            self.load(tmp_path / "weights")
        assert "\n" not in str(caught.value)

    def test_file_that_would_run_code(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"state_dict": Hostile()}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="cannot read"):
            self.load(tmp_path / "weights.pth")
        assert not (tmp_path / "ran").exists()

    def test_file_without_tensors(self, tmp_path):
        torch.save({"epoch": 3}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="expected named tensors"):
            self.load(tmp_path / "weights.pth")

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            self.load(tmp_path / "nothing.pth")
