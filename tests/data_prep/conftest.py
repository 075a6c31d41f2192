"""What several tests of data preparation share."""

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
