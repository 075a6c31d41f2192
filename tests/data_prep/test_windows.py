"""Windows out of real videos: no second is in both parts, and no window goes over a cut."""

import numpy as np
import pytest

from data_prep.rows import Row
from data_prep.video import read_frames, write_video
from data_prep.windows import Film, WindowSettings, held_out_from, main, read_film, windows, write_windows

SMALL = WindowSettings((16, 16), 0.5, 10, frames=5, clips=40, held_out_frames=9, held_out_clips=4, held_out=0.4)


def ramp(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [T, H, W, 3]: red is the time, green the row, blue the column."""
    time, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([time, row, column], axis=-1).astype(np.uint8)


def film(frames: int, cuts: tuple[int, ...] = ()) -> Film:
    scenes = sum((np.arange(frames) >= cut for cut in cuts), np.zeros(frames, int))
    return Film(Row(0, "v.mp4", "v.mp4", ""), ramp(frames), scenes)


def times(part: str, films: list[Film], settings: WindowSettings = SMALL) -> np.ndarray:
    """The times of all frames of each window, [windows, frames]."""
    length = settings.frames if part == "train" else settings.held_out_frames
    return np.stack([window.cut(length, settings.size)[:, 0, 0, 0] for window in windows(films, part, settings)])


def test_no_time_is_in_both_parts_and_a_gap_is_between():
    train, held_out = (times(part, [film(100)]) for part in ("train", "held_out"))
    assert held_out_from(film(100), SMALL) == 60
    assert train.max() < 60 - SMALL.frames and held_out.min() == 60 and held_out.max() == 99
    assert train.min() < 5 and len(set(train[:, 0])) > 20  # all over the rest
    assert (np.diff(train.astype(int)) == 1).all() and (np.diff(held_out.astype(int)) == 1).all()


def test_no_window_goes_over_a_cut():
    for part in ("train", "held_out"):
        found = times(part, [film(100, cuts=(20, 80))])
        assert not ((found < 20).any(1) & (found >= 20).any(1)).any()
        assert not ((found < 80).any(1) & (found >= 80).any(1)).any()
    short = [film(100, cuts=(20, 66, 72, 80, 88, 94))]  # no held-out window fits: all is for training
    assert held_out_from(short[0], SMALL) == 100 and times("train", short).max() > 90


def test_windows_are_at_all_places_and_half_of_the_training_ones_are_mirrored():
    for part, mirrored in (("train", (8, 32)), ("held_out", (0, 0))):
        found = list(windows([film(100)], part, SMALL))
        assert mirrored[0] <= sum(window.mirrored for window in found) <= mirrored[1]
        for window in found:
            picture = window.cut(1, SMALL.size)[0].astype(int)
            assert picture.shape == (16, 16, 3) and (np.diff(picture[..., 1], axis=0) == 1).all()
            assert (np.diff(picture[..., 2], axis=1) == (-1 if window.mirrored else 1)).all()
            assert 0 <= picture[0, 0, 1] <= 16 and picture[..., 2].max() <= 47
        assert len({(window.top, window.left) for window in found}) > len(found) / 2


@pytest.fixture
def video(tmp_path):
    """A video of 6 s at 10 fps: grey, brighter with time, with a caption."""
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[:, None, None, None], (60, 32, 48, 3))
    write_video(folder / "a.mp4", frames, 10, crf=1)
    (folder / "a.txt").write_text("a grey wall\n")
    return folder


def test_the_command_writes_both_parts_once_and_goes_on(video, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(video), str(out), "--size", "16x16", "--share", "0.5", "--fps", "10", "--frames", "5"]
    arguments += ["--clips", "6", "--held-out-frames", "9", "--held-out-clips", "2", "--held-out", "0.4"]
    assert main(arguments) == 0 and "6 windows and 2 held out (8 cut now)" in capsys.readouterr().out
    train, held_out = (sorted((out / part).glob("*.mp4")) for part in ("train", "held_out"))
    assert len(train) == 6 and len(held_out) == 2 and (out / "train/window-00000.txt").read_text() == "a grey wall\n"
    pictures = [np.stack(list(read_frames(path, 10))) for path in (*train, *held_out)]
    assert {p.shape for p in pictures[:6]} == {(5, 16, 16, 3)} and {p.shape for p in pictures[6:]} == {(9, 16, 16, 3)}
    assert max(p.mean((1, 2, 3)).max() for p in pictures[:6]) < min(p.mean((1, 2, 3)).min() for p in pictures[6:]) - 12
    before = {path: path.read_bytes() for path in (*train, *held_out)}
    train[3].unlink()
    assert main(arguments) == 0 and "1 cut now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert main(arguments) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--seed", "1"]) == 2 and "other settings" in capsys.readouterr().err
    (video / "b.mp4").write_bytes((video / "a.mp4").read_bytes())  # another source
    assert main(arguments) == 2 and "choose another folder" in capsys.readouterr().err


def test_a_single_file_is_a_source_and_pixels_are_reduced(video):
    found = read_film(Row(0, video / "a.mp4", "a.mp4", ""), SMALL)
    assert found.frames.shape == (60, 32, 48, 3)  # a window of 16 is half of the height
    assert read_film(found.row, WindowSettings((16, 16), 1.0, 5)).frames.shape == (30, 16, 24, 3)


def test_what_can_not_be_used_is_one_line(video, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([str(video), out]) == 2
    words = capsys.readouterr().err
    assert "no held-out window of 173 frames fits: the longest video has 96 frames at 16 fps" in words
    assert not (tmp_path / "out").exists()  # a better video may follow
    (video / "b.mp4").write_text("no video")
    assert write_windows(video, tmp_path / "some", SMALL) == 44 and "b.mp4: not a video" in capsys.readouterr().err
    assert main([str(tmp_path / "none.mp4"), out]) == 2 and "no such folder" in capsys.readouterr().err
    for option, words in (("--size", "17x16"), ("--share", "2"), ("--clips", "0"), ("--held-out", "1")):
        assert main([str(video), out, option, words]) == 2
        assert words in capsys.readouterr().err
