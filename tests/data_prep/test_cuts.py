"""Scene cuts: hard ones are found at their frame, motion, flashes and fades are none, and no clip goes over one."""

import json

import numpy as np
import pytest

from data_prep import default_codec, encode
from data_prep.card import read_card
from data_prep.codecs import dataset_codec
from data_prep.cuts import THRESHOLD, frames_of_cuts, mark_cuts
from data_prep.decoder import Decoders
from data_prep.decoder_worker import Span
from data_prep.draw import DrawSettings, draw
from data_prep.video import read_frames, write_video
from tests.data_prep.encoded import content, samples

SIZE = (64, 96)


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    monkeypatch.setattr(default_codec, "STEPS", 5)


def scene(seed, frames, speed=1.0):
    """A camera that moves over a landscape of soft colours, `speed` pixels per frame: uint8 [frames, *SIZE, 3]."""
    rng = np.random.default_rng(seed)
    base, width = rng.uniform(30, 225, 3), SIZE[1] + int(speed * frames) + 8
    coarse = np.clip(base + rng.normal(0, 40, (5, width // 12 + 2, 3)), 0, 255)
    rows = np.linspace(0, 3.99, SIZE[0])
    columns = np.linspace(0, len(coarse[0]) - 1.01, width)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    i, j, u, v = y.astype(int), x.astype(int), (y % 1)[..., None], (x % 1)[..., None]
    land = (coarse[i, j] * (1 - u) + coarse[i + 1, j] * u) * (1 - v) + (
        coarse[i, j + 1] * (1 - u) + coarse[i + 1, j + 1] * u
    ) * v
    land += rng.normal(0, 12, land.shape)  # texture
    begins = [int(speed * n) for n in range(frames)]
    return np.stack([np.clip(land[:, at : at + SIZE[1]], 0, 255).astype(np.uint8) for at in begins])


def cuts(frames, threshold=THRESHOLD):
    marked = list(mark_cuts(frames, threshold))
    assert all(one is other for (one, _), other in zip(marked, frames)) and len(marked) == len(frames)
    return [n for n, (_, cut) in enumerate(marked) if cut]


@pytest.mark.parametrize("seed", range(8))
def test_hard_cuts_are_found_at_their_frame(seed):
    lengths = [9, 4, 17, 12, 30]
    parts = [scene(10 * seed + n, length, speed=1 + 1.5 * n) for n, length in enumerate(lengths)]
    assert cuts(list(np.concatenate(parts))) == np.cumsum(lengths[:-1]).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speed", [0, 2, 7, 20, 48])
def test_a_moving_camera_is_no_cut(seed, speed):
    """Up to half of the picture's width per frame."""
    assert cuts(list(scene(seed, 40, speed))) == []


def test_things_that_move_fast_are_no_cut(tmp_path):
    """The demo's world at two frames per second: shapes jump by half of the picture."""
    draw(tmp_path, DrawSettings(4, 160, (64, 64), seed=3))
    for path in sorted(tmp_path.glob("*.mp4")):
        for rate in (16, 4, 2):
            assert cuts(list(read_frames(path, rate))) == []


def test_flashes_fades_and_animation_on_twos_are_no_cut():
    still, other = scene(1, 40, 0.3), scene(2, 40, 0.3)
    flash = still.copy()
    flash[20] = 255
    assert cuts(list(flash)) == []
    mix = np.clip((np.arange(40) - 10) / 16, 0, 1)[:, None, None, None]
    assert cuts(list((still * (1 - mix) + other * mix).astype(np.uint8))) == []
    assert cuts([frame.copy() for frame in scene(1, 20, 30) for _ in range(2)]) == []


def test_repeated_frames_do_not_hide_motion_nor_cuts():
    """A video of 4 frames per second, read at 16: three of four frames are the same object again."""
    moving = [frame for frame in scene(1, 20, 30) for _ in range(4)]
    assert cuts(moving) == []
    both = [*scene(1, 10, 5), *scene(2, 10, 5)]
    assert cuts([frame for frame in both for _ in range(4)]) == [40]


def test_the_threshold_decides_and_what_goes_wrong_comes_last():
    both = [*scene(1, 10), *scene(2, 10)]
    assert cuts(both) == [10] and cuts(both, 200.0) == []
    assert cuts(both[:1]) == cuts([]) == []

    def broken():
        yield from both
        raise OSError("gone")

    found = []
    with pytest.raises(OSError, match="gone"):
        for _, cut in mark_cuts(broken(), THRESHOLD):
            found.append(cut)
    assert len(found) == 20 and found.index(True) == 10


def test_given_cuts_are_the_first_frames_of_their_scenes():
    assert frames_of_cuts([0.0, 0.5, 1.01, 2.0], 0.0, 10) == {5, 11, 20}
    assert frames_of_cuts([0.5, 1.0, 1.01], 1.0, 10) == {1}  # frame 0 begins a clip anyway
    assert frames_of_cuts([1 / 3], 0.0, 30) == {10}  # times are rounded


@pytest.fixture
def film(tmp_path):
    """Scenes of 12, 4, 7 and 11 frames at 16 frames per second."""
    frames = np.concatenate([scene(n, length) for n, length in enumerate((12, 4, 7, 11))])
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "film.mp4", frames, 16)
    return tmp_path / "videos" / "film.mp4"


def run(src, out, *more):
    size = ["--size", f"{SIZE[0]}x{SIZE[1]}", "--frames", "5", "--samples-per-shard", "2"]
    return encode.main([str(src), str(out), *size, *more])


def test_no_clip_goes_over_a_cut(film, tmp_path):
    out = tmp_path / "data"
    assert run(film.parent, out, "--cuts") == 0
    begins = [0, 5, 16, 23, 28]  # 2 + 4 + 2 + 1 frames are in none
    found, card = samples(out), read_card(out)
    assert [sample.meta["start"] for sample in found.values()] == [begin / 16 for begin in begins]
    assert card["counts"]["dropped_seconds"] == 9 / 16 and card["source"]["settings"]["cuts"] == THRESHOLD
    frames, codec = np.stack(list(read_frames(film, 16, SIZE))), dataset_codec(out)
    for begin, sample in zip(begins, found.values()):
        assert np.array_equal(sample.latent, codec.encode(frames[begin : begin + 5]).astype(np.float16))
    # Stopped behind the first shard, it goes on within the video.
    before = content(out)
    for name in ("dataset.json", "samples.npy", "shard-000000-0001.json", "shard-000000-0002.json"):
        (out / name).unlink()
    assert run(film.parent, out, "--cuts") == 0 and content(out) == before
    assert run(film.parent, out) == 2  # without cuts it is another dataset


@pytest.mark.parametrize("stride, begins", [(2, [0, 2, 4, 6, 16, 18, 23, 25, 27, 29]), (9, [0, 16, 23])])
def test_with_a_stride_each_scene_begins_anew(film, stride, begins):
    span = Span(film, 16, SIZE, 5, stride=stride, cut_threshold=THRESHOLD)
    found = []
    with Decoders() as decoders:
        for video in decoders.videos([span]):
            found += [video.begin for clip in video if clip.shape == (5, *SIZE, 3)]
    assert found == begins


def test_cuts_of_the_manifest(film, tmp_path, capsys):
    out, manifest = tmp_path / "data", tmp_path / "list.jsonl"
    manifest.write_text(json.dumps({"video": "videos/film.mp4", "cuts": [23 / 16, 0.75]}))
    assert run(manifest, out) == 0
    assert [sample.meta["start"] * 16 for sample in samples(out).values()] == [0, 5, 12, 17, 23, 28]
    manifest.write_text(json.dumps({"video": "videos/film.mp4", "cuts": [1.0]}))
    assert run(manifest, out) == 2
    assert "differs in source" in capsys.readouterr().err
    for wrong in (1.5, ["a"], [True], [-1], [float("nan")]):
        manifest.write_text(json.dumps({"video": "videos/film.mp4", "cuts": wrong}))
        assert run(manifest, tmp_path / "other") == 2
        assert "is not a list of seconds" in capsys.readouterr().err


def test_too_short_scenes_are_said_so(film, tmp_path, capsys):
    assert run(film.parent, tmp_path / "codec") == 0
    codec = ["--codec", f"default:{tmp_path / 'codec'}"]
    assert run(film.parent, tmp_path / "data", "--frames", "13", "--cuts", *codec) == 2
    assert "too short (12 of 13 frames between cuts)" in capsys.readouterr().err
    assert run(film.parent, tmp_path / "data", "--cuts", "0.01") == 2
    assert "cuts 0.01: a threshold from 0.1 to 255, such as 12" in capsys.readouterr().err
