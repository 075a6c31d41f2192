"""Clips encoded several at once: the same dataset whatever stops it, and no clip spoils its neighbours."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import batching, default_codec
from data_prep.batching import BatchEncoder, Clip, batch_that_fits, encode_each
from data_prep.bench import random_vae
from data_prep.card import read_card
from data_prep.codecs import open_codec
from data_prep.default_codec import DefaultCodec
from data_prep.encode_settings import EncodeSettings
from data_prep.files import write_json
from data_prep.verify import verify
from data_prep.video import Problem
from tests.data_prep.encoded import content, failures, run, samples
from tests.data_prep.test_video import write


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    monkeypatch.setattr(default_codec, "STEPS", 5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 4, 2, 1 and 6 clips of 5 frames, and one that can't be read; names in this order."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 20), ("b", 12), ("c", 7), ("e", 30)):
        write(folder / f"{name}.mp4", frames=frames, fps=16)
    (folder / "d.mp4").write_bytes(b"no")
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A small VAE of Wan's architecture, as an option of the command."""
    return ["--codec", f"wan:{random_vae(tmp_path_factory.mktemp('wan'))}"]


@pytest.fixture
def batches(monkeypatch):
    """How many clips are encoded at once, for every batch."""
    sizes: list[int] = []

    def spy(codec, clips):
        sizes.extend([len(clips)] if clips else [])
        return encode_each(codec, clips)

    monkeypatch.setattr(batching, "encode_each", spy)
    return sizes


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_batch_ends_with_its_shard_and_goes_over_videos(videos, tmp_path, batches, batch):
    """13 clips in shards of 3; the last shard has one."""
    assert run(videos, tmp_path / "data", "--batch", str(batch)) == 0
    whole = {1: [1, 1, 1], 2: [2, 1], 3: [3], 5: [3]}[batch]
    assert batches == whole * 4 + [1]
    assert verify(tmp_path / "data") == 13 and [one["source"] for one in failures(tmp_path / "data")] == ["d.mp4"]
    assert read_card(tmp_path / "data")["source"]["settings"].get("batch", 1) == batch


def test_the_built_in_codec_gives_the_same_samples_in_any_batch(videos, tmp_path):
    for batch in ("1", "3"):
        assert run(videos, tmp_path / batch, "--batch", batch) == 0
    one, three = content(tmp_path / "1"), content(tmp_path / "3")
    differ = {name for name in one if one[name] != three[name]}
    assert differ == {"work.json", "dataset.json"}  # only they name the size of the batches


def test_wan_in_batches_is_wan_alone_up_to_rounding(videos, tmp_path, wan):
    """Not bit for bit, even on a CPU: PyTorch's kernels add in another order for another shape."""
    for batch in ("1", "3"):
        assert run(videos, tmp_path / batch, "--batch", batch, *wan) == 0
    one, three = samples(tmp_path / "1"), samples(tmp_path / "3")
    assert list(one) == list(three) and len(one) == 13
    for key, sample in one.items():
        assert np.allclose(sample.latent, three[key].latent, atol=2e-3, rtol=2e-3)
        assert sample.meta == three[key].meta


@pytest.mark.slow
def test_jobs_that_are_killed_make_the_same_bytes_in_batches(videos, tmp_path, wan):
    whole, out = tmp_path / "whole", tmp_path / "data"
    settings = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "3", "--videos-per-part", "2", *wan]

    def start(folder, *more):
        """A process of its own: with another number of threads PyTorch may add in another order."""
        command = [sys.executable, "-m", "data_prep.encode", str(videos), str(folder), "--batch", "2", *settings, *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(whole).wait() == 0
    for _ in range(3):  # each is killed when it has made a shard more than the one before
        before = len(list(out.glob("shard-*.json")))
        job = start(out)
        while job.poll() is None and len(list(out.glob("shard-*.json"))) == before:
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert [start(out, "--job", number).wait() for number in ("1/2", "0/2")] == [0, 0]
    assert content(out) == content(whole)


def test_a_clip_that_fails_ends_its_own_video_only(videos, tmp_path, monkeypatch, batches):
    """The second clip of a.mp4 has values beyond float16; the first of c.mp4 is refused by the codec."""
    encode = DefaultCodec.encode
    codec = tmp_path / "codec"
    assert run(videos, codec) == 0
    wanted = samples(codec)
    places: dict[bytes, tuple[str, int]] = {}  # which clip of which video some frames are
    take = BatchEncoder._put

    def note(self, one):
        if isinstance(one, Clip):
            places[one.frames.tobytes()] = (one.video.row.source, one.number)
        take(self, one)

    monkeypatch.setattr(BatchEncoder, "_put", note)

    def faulty(self, frames):
        place = places[frames.tobytes()]
        if place == ("c.mp4", 0):
            raise ValueError("no such picture")
        latent = encode(self, frames)
        return latent * 1e9 if place == ("a.mp4", 1) else latent

    monkeypatch.setattr(DefaultCodec, "encode", faulty)
    for batch in ("1", "4"):
        out = tmp_path / batch
        assert run(videos, out, "--codec", f"default:{codec}", "--batch", batch, "--samples-per-shard", "8") == 0
        assert [(one["source"], one["reason"], one["samples"]) for one in failures(out)] == [
            ("a.mp4", "not finite", 1),
            ("c.mp4", "not encodable", 0),
            ("d.mp4", "not a video", 0),
        ]
        found = samples(out)
        assert len(found) == 1 + 2 + 6
        for key, sample in found.items():
            assert np.array_equal(sample.latent, wanted[key].latent)
        assert read_card(out)["counts"]["dropped_seconds"] == 2 / 16  # of b.mp4; what failed does not count
    assert 4 in batches


def test_one_clip_that_is_not_encodable_is_named_and_the_others_are_encoded(wan):
    codec = open_codec(wan[1])
    clips = list(np.random.default_rng(0).integers(0, 256, (3, 5, 32, 48, 3), dtype=np.uint8))
    expected = [codec.encode(clip) for clip in clips]
    clips[1] = clips[1].astype(np.float32)
    found = encode_each(codec, clips)
    assert isinstance(found[1], Problem) and found[1].reason == "not encodable"
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[2], expected[2])


def test_the_first_job_chooses_the_batch_and_the_others_keep_to_it(videos, tmp_path, monkeypatch, capsys):
    settings, out, whole = ["--videos-per-part", "2"], tmp_path / "data", tmp_path / "whole"
    monkeypatch.setattr("data_prep.encode.batch_that_fits", lambda codec, settings: 3)
    assert run(videos, out, *settings, "--job", "0/2") == 0
    assert json.loads((out / "work.json").read_text())["batch"] == 3
    monkeypatch.setattr("data_prep.encode.batch_that_fits", lambda codec, settings: 7)
    capsys.readouterr()
    assert run(videos, out, *settings, "--batch", "2", "--job", "1/2") == 2
    assert "differs in batch (3, now 2)" in capsys.readouterr().err
    assert run(videos, out, *settings, "--job", "1/2") == 0
    assert run(videos, whole, *settings, "--batch", "3") == 0
    assert content(out) == content(whole)
    # Lost shards of a finished dataset are made again as before, also without the file of the work.
    (out / "work.json").unlink()
    (out / "shard-000000-0001.tar").unlink()
    assert run(videos, out, *settings) == 0
    assert content(out) == content(whole)
    write_json(out / "work.json", {})
    assert run(videos, out, *settings) == 0  # the card says enough
    assert run(videos, out, "--batch", "0") == 2


def test_on_a_cpu_there_is_one_clip_at_a_time(wan):
    settings = EncodeSettings(16, (32, 48), 5)
    assert batch_that_fits(None, settings) == batch_that_fits(open_codec(wan[1]), settings) == 1
    assert Path(wan[1][4:]).is_dir()
