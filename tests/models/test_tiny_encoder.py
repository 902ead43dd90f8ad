from importlib import resources

import pytest
import torch
from torch.nn import functional as F

from objslot.data import MEAN, STD
from objslot.data.synthetic import SyntheticVideo
from objslot.models import SMTC, SMTCConfig, build_encoder
from objslot.models.tiny_encoder import create_tiny_encoder


def normalised(frames):
    frames = frames.permute(0, 3, 1, 2).float() / 255
    return ((frames - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


@pytest.fixture(scope="module")
def encoder():
    return build_encoder("objslot_tiny").eval()


@pytest.fixture(scope="module")
def video():
    return SyntheticVideo(7, 2, 96)


def test_the_weights_are_small_and_are_used(encoder):
    assert resources.files("objslot.models").joinpath("tiny_encoder.safetensors").stat().st_size < 6 * 2**20
    torch.manual_seed(0)
    random = create_tiny_encoder(pretrained=False).state_dict()
    shipped = create_tiny_encoder().state_dict()
    assert not torch.equal(random["blocks.0.attn.qkv.weight"], shipped["blocks.0.attn.qkv.weight"])
    assert all(value.dtype in (torch.float32, torch.int64) for value in shipped.values())


def test_features_of_any_frame_size(encoder):
    for height, width in ((64, 96), (192, 192)):
        features = encoder(torch.randn(1, 2, 3, height, width))
        assert features.grid == (height // 8, width // 8)
        assert features.keys.shape == (1, 2, height * width // 64, 128)
        torch.testing.assert_close(features.cls_attention.sum(-1), torch.ones(1, 2), atol=0.2, rtol=0)


def test_a_quarter_turn_moves_the_keys_and_little_else(encoder, video):
    frames = normalised(video.read([0]))
    keys = encoder(frames).keys.unflatten(2, (12, 12))
    turned = encoder(frames.rot90(1, (3, 4))).keys.unflatten(2, (12, 12))
    back = turned.rot90(-1, (2, 3))
    assert F.cosine_similarity(keys, back, dim=-1).mean() > 0.85
    assert F.cosine_similarity(keys, turned, dim=-1).mean() < 0.6


def test_colour_of_equal_luminance_is_not_seen(encoder, video):
    frames = normalised(video.read([0]))
    shift = torch.zeros(1, 1, 3, 96, 96)
    # Red up, blue down, by what leaves 0.299 R + 0.587 G + 0.114 B as it is.
    shift[:, :, 0], shift[:, :, 2] = 0.2 / (0.299 * 0.229), -0.2 / (0.114 * 0.225)
    torch.testing.assert_close(encoder(frames + shift).keys, encoder(frames).keys, atol=1e-2, rtol=1e-3)


def test_keys_tell_objects_from_background(encoder):
    # Frames of the size the encoder was made for; nothing is fitted to the annotation.
    video = SyntheticVideo(11, 1, 192)
    keys = F.normalize(encoder(normalised(video.read([0]))).keys[0, 0], dim=-1)
    mask = torch.from_numpy(video.annotation(0)).float()[None, None]
    index = F.interpolate(mask, (24, 24), mode="nearest-exact").flatten().long()
    similarity = keys @ keys.T
    for k in (1, 2, 3):
        inside = similarity[index == k][:, index == k].mean()
        assert inside > similarity[index == k][:, index == 0].mean() + 0.2


def test_a_model_on_it_survives_saving(tmp_path, video):
    model = SMTC(SMTCConfig(encoder="objslot_tiny", image_size=96, slots=3, instances=1)).eval()
    model.save(tmp_path)
    again = SMTC.load(tmp_path).eval()
    frames = normalised(video.read([0, 1]))
    torch.testing.assert_close(again.encode(frames).keys, model.encode(frames).keys)


def test_it_can_be_trained_and_takes_the_smallest_frame(video):
    encoder = build_encoder("objslot_tiny", train=True).train()
    encoder(normalised(video.read([0]))).keys.square().mean().backward()
    assert encoder.model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert encoder.eval()(torch.randn(1, 1, 3, 8, 8)).keys.shape == (1, 1, 1, 128)


def test_half_precision(video):
    frames = normalised(video.read([0]))
    exact = build_encoder("objslot_tiny").eval()(frames).keys
    rough = build_encoder("objslot_tiny").eval().bfloat16()(frames.bfloat16()).keys
    assert F.cosine_similarity(exact, rough.float(), dim=-1).mean() > 0.95
