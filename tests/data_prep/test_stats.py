"""Statistics of a dataset: each number is that of plain numpy, and nothing of the dataset becomes part of the page."""

import io
import json
import os
import re
import tarfile

import numpy as np
import pytest

from data_prep import stats
from data_prep.shards import SampleError
from data_prep.stream import stream_samples
from tests.conftest import change_card
from tests.data_prep.made import write_samples

CAPTIONS = ["a <script>alert(1)</script>", "", "two words", "two words", "", "one two three"]


def latents(count=6):
    """[N, 3, 4, 2, 2]: channel 1 is far from mean 0, channel 2 from std 1; clip 3 stands still; clip 4 has a spike."""
    rng = np.random.default_rng(0)
    made = rng.standard_normal((count, 3, 4, 2, 2))
    made[:, 1] += 40
    made[:, 2] *= 0.01
    made[3] = made[3][:, 1:2]
    made[3][:, 0] += 1  # a codec's first frame is another one
    made[4, 0, 1, 1, 0] = -1000
    return made.astype(np.float16)


@pytest.fixture
def dataset(tmp_path):
    """Six clips of five videos: the last two are of one."""
    made = latents()
    text = [np.ones((1 + n % 3, 5)) for n in range(6)]
    meta = [{"caption": CAPTIONS[n], "source": f"<b>{n}.mp4", "start": 0, "end": 1} for n in range(6)]
    samples = [(min(n, 4), n - min(n, 4), made[n], text[n], meta[n]) for n in range(6)]
    write_samples(tmp_path / "data", samples, skipped={"truncated": 2})
    return tmp_path / "data"


def test_the_numbers_are_numpys(dataset):
    found, made = stats.Stats(dataset).read(), latents().astype(np.float64)
    assert np.allclose(found.moments.mean, made.mean((0, 2, 3, 4)), rtol=1e-12)
    assert np.allclose(found.moments.std, made.std((0, 2, 3, 4)), rtol=1e-12)
    assert found.far_off.tolist() == [True] * 4  # channel 0 by its spike
    assert found.largest.tolist() == [float(np.abs(clip).max()) for clip in made]
    expected = np.sqrt(np.square(np.diff(made[:, :, 1:], axis=2)).mean((1, 2, 3, 4)))
    assert np.allclose(found.change, expected, rtol=1e-6) and found.change.argmin() == 3 and found.change[3] == 0
    ordered = np.sort(np.abs(made).ravel())
    for share in (0.1, 0.5, 0.99, 1.0):
        assert found.quantile(share) == ordered[int(np.ceil(share * ordered.size)) - 1]
    assert found.tokens == {1: 2, 2: 2, 3: 2} and found.words == {0: 2, 2: 3, 3: 1}
    assert [(videos, found.key(place)) for videos, place in found.repeated()] == [(2, "000002_0000")]


def test_only_the_built_in_codecs_channels_are_judged_together(tmp_path):
    rng, spreads = np.random.default_rng(1), np.array([1.7, 0.1, 0.3])
    samples = [
        (n, 0, rng.standard_normal((3, 2, 8, 8)) * spreads[:, None, None, None], np.ones((1, 5)), {}) for n in range(4)
    ]
    far = {}
    for codec in ("wan", "default"):
        write_samples(tmp_path / codec, samples, codec=codec)
        far[codec] = stats.Stats(tmp_path / codec).read().far_off.tolist()
    assert far == {"wan": [False, True, True, False], "default": [False] * 4}


def test_some_samples_are_spread_evenly(dataset):
    found = stats.Stats(dataset, samples=3).read()
    assert [found.key(place) for place in range(3)] == ["000000_0000", "000002_0000", "000004_0000"]
    assert found.largest.tolist() == [float(np.abs(clip).max()) for clip in latents()[::2].astype(np.float64)]
    with pytest.raises(ValueError, match="--samples 0: must be at least 1"):
        stats.Stats(dataset, samples=0)


def test_the_command_writes_a_table_and_a_page_and_leaves_the_dataset_alone(dataset, tmp_path, monkeypatch, capsys):
    (dataset / "failures.jsonl").write_text('{"reason": "truncated"}\nnonsense\n{"reason": "\\u001b[2J"}\n')
    before = {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()}
    monkeypatch.chdir(tmp_path)
    os.chmod(dataset, 0o555)
    assert stats.main([str(dataset)]) == 0
    os.chmod(dataset, 0o755)
    assert {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()} == before
    printed, page = capsys.readouterr().out, (tmp_path / "data-stats.html").read_text()
    for line in ("truncated 2 in the card, 1 in failures.jsonl", "clips with an empty caption 2", "\\x1b[2J"):
        assert line in " ".join(printed.split()), line
    assert "\x1b" not in printed
    assert "<script" not in page and "<b>" not in page and "&lt;b&gt;4.mp4" in page
    assert "a &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count('class="marked"') == 4 and not re.search(r"(src|href)=.http", page)
    assert "mathdefault" not in page
    assert stats.main([str(dataset), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page


def rewrite(path, change):
    """Replaces a shard by one whose members are changed: {name: bytes} in, the same out. Gives the card its size."""
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    with tarfile.open(path, "w") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pickled(members):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return {**members, "000001_0000.latent.npy": buffer.getvalue()}


def not_finite(members):
    buffer = io.BytesIO()
    np.save(buffer, np.full((3, 4, 2, 2), np.nan, np.float16))
    return {**members, "000001_0000.latent.npy": buffer.getvalue()}


@pytest.mark.parametrize(
    "change, says",
    [
        (pickled, "000001_0000: malformed (latent: not a plain npy array"),
        (not_finite, "000001_0000: not finite (48 values of its latent)"),
        (lambda members: {**members, "000001_0000.json": b"[1]"}, "000001_0000: malformed (its JSON is not an object)"),
        (lambda m: {k: v for k, v in m.items() if k != "000001_0000.text.npy"}, "no member 'text.npy'"),
        (lambda m: {k: v for k, v in m.items() if not k.startswith("000003")}, "3 samples, the card says 4"),
        (lambda m: {}, "malformed"),
    ],
)
def test_what_is_broken_is_one_line(dataset, change, says, capsys):
    rewrite(dataset / "shard-000000-0000.tar", change)
    assert stats.main([str(dataset)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert error.endswith(f"; this names all damage: python -m data_prep.verify {dataset}")


def test_a_stream_never_unpickles_what_it_does_not_look_at(dataset):
    path = dataset / "shard-000000-0000.tar"
    rewrite(path, lambda members: {**members, "000003_0000.pickle": b"cos\nabort\n(tR."})  # ends the process if loaded
    assert len(list(stream_samples(dataset, stats.read_card(dataset)))) == 6


def test_a_stream_says_what_is_missing_or_cut(dataset):
    path = dataset / "shard-000001-0000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SampleError, match="malformed"):
        list(stream_samples(dataset, stats.read_card(dataset)))
    path.unlink()
    with pytest.raises(SampleError, match=r"shard-000001-0000.tar: missing"):
        list(stream_samples(dataset, stats.read_card(dataset)))


def test_a_folder_may_have_any_name_and_the_environment_does_not_matter(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    other = dataset.rename(tmp_path / "pipe:{0..3} %20::y")
    monkeypatch.chdir(tmp_path)
    assert len(list(stream_samples(other.name, stats.read_card(other)))) == 6
    other = other.rename(tmp_path / "a#b")
    assert len(list(stream_samples(other, stats.read_card(other)))) == 6


def test_clips_of_one_latent_frame_have_no_change(tmp_path):
    write_samples(tmp_path / "one", [(0, 0, np.ones((3, 1, 2, 2)), np.ones((1, 5)), {})])
    assert stats.main([str(tmp_path / "one"), "--out", str(tmp_path / "x.html")]) == 0
    assert "clips of one frame" in (tmp_path / "x.html").read_text()


def test_an_edited_dataset_is_refused(dataset, capsys):
    change_card(dataset, lambda card: card["index"].update(bytes=1))
    assert stats.main([str(dataset)]) == 2 and "not the index that the card names" in capsys.readouterr().err
    (dataset / "dataset.json").write_text(json.dumps({}))
    assert stats.main([str(dataset)]) == 2
