"""What several tests of data preparation share."""

import os

import pytest

from data_prep import default_codec
from tests.data_prep.test_video import write


@pytest.fixture
def quick_fit(monkeypatch):
    """The built-in codec is fitted in five steps: bad, but soon."""
    monkeypatch.setattr(default_codec, "STEPS", 5)


@pytest.fixture
def videos(tmp_path):
    """Three valid videos of 12, 20 and 7 frames at 16 frames per second, two of them with captions."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    write(folder / "b.mp4", frames=12, fps=16)
    write(folder / "a.mkv", frames=20, fps=16)
    write(folder / "more" / "c.mp4", frames=7, fps=16)
    (folder / "b.txt").write_text("a red\n thing\n", encoding="utf-8")
    (folder / "a.txt").write_text("grün", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def coded_videos(tmp_path_factory):
    """Videos of 40, 4, 12 and 33 frames."""
    folder = tmp_path_factory.mktemp("videos")
    lengths = {"a.mp4": 40, "b.mkv": 4, "c.mp4": 12, "d.mkv": 33}
    return [write(folder / name, frames=n, options={"g": "8", "bf": "2"}) for name, n in lengths.items()]


@pytest.fixture
def in_worker(tmp_path, monkeypatch):
    """Has workers run Python code when they look for the file of a name: {name: code}."""

    def install(codes):
        folder = tmp_path / "hook"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"""
import os, signal, time
def isfile(path, original=os.path.isfile):
    exec({codes!r}.get(os.path.basename(path), ""))
    return original(path)
os.path.isfile = isfile
""")
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return install
