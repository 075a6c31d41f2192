"""Codecs: Wan's geometry, causal both ways, good enough for the demo's world, and gentle with noise."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import default_codec
from data_prep.codecs import open_codec
from data_prep.default_codec import DefaultCodec
from data_prep.draw import DrawSettings, draw
from data_prep.geometry import LatentGeometry
from data_prep.video import read_frames


def drawn_clips(folder, videos, seed):
    """Clips of the demo's world, uint8 [81, 64, 64, 3], through H.264 as a user's own videos are."""
    draw(folder, DrawSettings(videos, 81, (64, 64), seed=seed))
    return [np.stack(list(read_frames(path, 16))) for path in sorted(folder.glob("*.mp4"))]


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return DefaultCodec.fit(drawn_clips(tmp_path_factory.mktemp("fit"), 48, seed=0), seed=0)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return drawn_clips(tmp_path_factory.mktemp("unseen"), 8, seed=1)


def quick(monkeypatch, seed=0, size=(16, 24), frames=9):
    """A codec after next to no fitting: its geometry is whole, its pictures are not good."""
    monkeypatch.setattr(default_codec, "STEPS", 5)
    rng = np.random.default_rng(seed)
    return DefaultCodec.fit([rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8) for _ in range(3)], seed)


@pytest.mark.slow
def test_decodes_unseen_clips_at_30_db(fitted, unseen):
    """After storage as float16, on clips of another seed; and a latent a little off is a picture a little off."""
    clean, noisy, deviations = [], [], []
    rng = np.random.default_rng(0)
    for clip in unseen:
        latent = fitted.encode(clip).astype(np.float16).astype(np.float32)
        assert latent.shape == (16, 21, 8, 8)
        decoded = fitted.decode(latent)
        assert decoded.shape == clip.shape and decoded.dtype == np.uint8
        clean.append(psnr(decoded, clip))
        noisy.append(psnr(fitted.decode(latent + 0.05 * rng.standard_normal(latent.shape)), clip))
        deviations.append(latent.std(axis=(1, 2, 3)))
    assert np.mean(clean) >= 30 and np.min(clean) >= 28
    assert np.mean(noisy) >= np.mean(clean) - 1
    assert np.mean(np.square(deviations)) == pytest.approx(1, abs=0.25)
    assert np.mean(deviations, axis=0)[0] > 1.3 > 0.9 > np.mean(deviations, axis=0)[-1] > 0.1


@pytest.mark.slow
def test_a_still_picture_has_the_same_latent_in_every_frame(fitted, unseen):
    latent = fitted.encode(np.repeat(unseen[0][:1], 13, axis=0))
    assert np.allclose(latent, latent[:, :1], atol=1e-5)
    decoded = fitted.decode(latent)
    assert psnr(decoded, np.repeat(unseen[0][:1], 13, axis=0)) > 28


@pytest.mark.parametrize("frames, t", [(1, 1), (5, 2), (9, 3)])
def test_geometry_and_causality(monkeypatch, frames, t):
    codec = quick(monkeypatch)
    clip = np.random.default_rng(5).integers(0, 256, (13, 16, 24, 3), dtype=np.uint8)
    latent, part = codec.encode(clip), codec.encode(clip[:frames])
    assert latent.shape == (16, 4, 2, 3) and latent.dtype == np.float32 and part.shape == (16, t, 2, 3)
    assert np.allclose(part, latent[:, :t], atol=1e-5)
    decoded = codec.decode(part)
    assert decoded.shape == (frames, 16, 24, 3)
    whole = codec.decode(latent).astype(int)
    assert np.abs(decoded - whole[:frames]).max() <= 1
    latent[:, t - 1] += 1  # and the last latent frame does matter
    changed = codec.decode(latent).astype(int)
    assert np.abs(changed[:frames] - decoded)[-1].max() > 1
    assert np.array_equal(changed[frames:], whole[frames:])  # to its own frames alone


def test_normalisation_is_what_mean_and_std_say(monkeypatch):
    codec = quick(monkeypatch)
    clip = np.random.default_rng(3).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    raw = codec.encode(clip) * np.array(codec.std)[:, None, None, None] + np.array(codec.mean)[:, None, None, None]
    block = clip[1:5, 8:16, 16:24].astype(np.float32) / 127.5 - 1
    expected = codec._tensors["basis"][:, :16].T.numpy() @ block.reshape(-1)
    assert np.allclose(raw[:, 1, 1, 2], expected, atol=1e-3)


def test_fitting_is_reproducible_and_saving_keeps_everything(monkeypatch, tmp_path):
    codec = quick(monkeypatch)
    assert quick(monkeypatch).hash == codec.hash != quick(monkeypatch, seed=1).hash
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    clip = np.random.default_rng(2).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    for loaded in (DefaultCodec.load(path), open_codec(f"default:{path}"), open_codec(f"default:{tmp_path}")):
        assert (loaded.hash, loaded.settings, loaded.mean) == (codec.hash, codec.settings, codec.mean)
        assert np.array_equal(loaded.encode(clip), codec.encode(clip))
        assert np.array_equal(loaded.decode(codec.encode(clip)), codec.decode(codec.encode(clip)))


def test_flat_video_is_fitted_and_comes_back(monkeypatch):
    """One colour has no principal components at all: nothing may divide by their zero deviation."""
    monkeypatch.setattr(default_codec, "STEPS", 5)
    clip = np.full((5, 16, 16, 3), 120, np.uint8)
    codec = DefaultCodec.fit([clip])
    latent = codec.encode(clip)
    assert np.isfinite(latent).all() and np.abs(latent).max() < 10
    assert np.abs(codec.decode(latent).astype(int) - 120).max() <= 3


def test_large_clips_are_looked_at_in_part(monkeypatch):
    sizes = []
    original = default_codec._to_blocks
    monkeypatch.setattr(default_codec, "_to_blocks", lambda frames: sizes.append(frames.shape) or original(frames))
    monkeypatch.setattr(default_codec, "STEPS", 2)
    DefaultCodec.fit(np.random.default_rng(0).integers(0, 256, (81, 240, 416, 3), dtype=np.uint8) for _ in range(2))
    assert len(sizes) == 2
    for t, h, w, _ in sizes:
        assert t % 4 == 0 and (t - 3) * h * w <= default_codec.FIT_PIXELS and h <= 96 and w <= 96


def test_bad_input_is_refused_with_the_numbers(monkeypatch, tmp_path):
    codec = quick(monkeypatch)
    for shape, says in (
        ((4, 16, 16, 3), "4 frames: .* such as 1 or 5"),
        ((82, 16, 16, 3), "such as 81 or 85"),
        ((5, 12, 16, 3), "12x16"),
        ((5, 16, 16), "uint8"),
    ):
        with pytest.raises(ValueError, match=says):
            codec.encode(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float32"):
        codec.encode(np.zeros((5, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="latent must be"):
        codec.decode(np.zeros((4, 2, 2, 2)))
    with pytest.raises(ValueError, match="no clips"):
        DefaultCodec.fit([])
    for spec in ("default", "wan", "vae:x", "default:"):
        with pytest.raises(ValueError, match="unknown codec"):
            open_codec(spec)
    (tmp_path / "codec.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a default codec"):
        open_codec(f"default:{tmp_path}")
    save_file({"a": torch.zeros(1)}, tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match="not a default codec"):
        open_codec(f"default:{tmp_path}")
    with pytest.raises(ValueError, match="no such file"):
        open_codec(f"default:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="no Wan VAE here"):
        open_codec(f"wan:{tmp_path}")


def test_wan_in_pieces_is_diffusers_whole(wan_folder):
    codec = open_codec(f"wan:{wan_folder}")
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    latent = codec.encode(clip)
    channels, side = (48, 16) if codec.vae.config.is_residual else (16, 8)
    assert codec.geometry == LatentGeometry(channels, (4, side, side)) and len(codec.mean) == len(codec.std) == channels
    assert latent.shape == (channels, 3, 32 // side, 48 // side) and latent.dtype == np.float32
    with torch.no_grad():
        x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        mode = codec.vae.encode(x).latent_dist.mode()
        pixels = codec.vae.decode(mode).sample[0].permute(1, 2, 3, 0)
    expected = (mode[0].numpy() - np.array(codec.mean)[:, None, None, None]) / np.array(codec.std)[:, None, None, None]
    assert np.allclose(latent, expected, atol=1e-5)
    decoded = codec.decode(latent)
    assert decoded.shape == clip.shape
    assert np.abs(decoded - ((pixels + 1) * 127.5).clamp(0, 255).numpy()).max() <= 0.51
    assert np.allclose(codec.encode(clip[:5]), latent[:, :2], atol=1e-5)
    assert np.array_equal(codec.decode(latent[:, :2]), decoded[:5])


@pytest.mark.parametrize("name", ["default", "wan"])
def test_a_batch_is_its_clips(monkeypatch, wan_folder, name):
    """No clip sees another. Wan's bits may differ; the built-in codec's don't."""
    codec = open_codec(f"wan:{wan_folder}") if name == "wan" else quick(monkeypatch)
    clips = np.random.default_rng(0).integers(0, 256, (3, 9, 32, 48, 3), dtype=np.uint8)
    found, alone = codec.encode_batch(clips), np.stack([codec.encode(clip) for clip in clips])
    assert found.dtype == np.float32 and found.shape == alone.shape
    assert np.allclose(found, alone, atol=1e-5) and (name == "wan" or np.array_equal(found, alone))
    with pytest.raises(ValueError, match="multiple"):
        codec.encode_batch(clips[:, :, :31])


@pytest.mark.parametrize("name", ["default", "wan"])
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (1, 3, 1), (3, 2)], ids=str)
def test_a_video_decoded_piece_by_piece_is_the_video_decoded_whole(monkeypatch, wan_folder, name, pieces):
    """Bit for bit, also when another video is decoded in between. The pieces' frames follow the geometry."""
    codec = open_codec(f"wan:{wan_folder}") if name == "wan" else quick(monkeypatch)
    latent = np.random.default_rng(0).standard_normal((codec.geometry.channels, 5, 4, 6)).astype(np.float32)
    decode, other, begin, parts = codec.decoder(), codec.decoder(), 0, []
    for size in pieces:
        parts.append(decode(latent[:, begin : begin + size]))
        other(-latent[:, begin : begin + size])
        begin += size
        assert sum(map(len, parts)) == codec.geometry.video_frames(begin)
    assert np.array_equal(np.concatenate(parts), codec.decode(latent))
    with pytest.raises(ValueError, match="latent must be"):
        decode(latent[0])


@pytest.mark.parametrize("name", ["default", "wan"])
def test_what_a_decoder_takes_grows_with_the_picture(monkeypatch, wan_folder, name):
    codec = open_codec(f"wan:{wan_folder}") if name == "wan" else quick(monkeypatch)
    assert codec.decoder_bytes(8, 12) == 16 * codec.decoder_bytes(2, 3) > 16 * 2 * 3 * 2**8


def test_wan_is_known_by_its_weights(wan_folder, tmp_path):
    codec = open_codec(f"wan:{wan_folder}")
    assert open_codec(f"wan:{wan_folder / 'vae'}").hash == codec.hash
    weights = load_file(wan_folder / "vae" / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"] += 1
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((wan_folder / "vae" / "config.json").read_text())
    assert open_codec(f"wan:{tmp_path}").hash != codec.hash
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(ValueError, match="expected 'AutoencoderKLWan'"):
        open_codec(f"wan:{tmp_path}")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"scale_factor_spatial": 4}, r"config.json: scale factors \(4, 4\), but its network has 4 and (8|16)"),
        ({"scale_factor_temporal": 8}, r"config.json: scale factors \(8, (8|16)\), but its network has 4"),
        ({"latents_mean": [0.0] * 4}, r"config.json: 4 latents_mean and (16|48) latents_std for (16|48) channels"),
    ],
)
def test_a_wan_config_that_contradicts_itself_is_refused(wan_folder, tmp_path, change, says):
    shutil.copytree(wan_folder / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=says):
        open_codec(f"wan:{tmp_path}")
