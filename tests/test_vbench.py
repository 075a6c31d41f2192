"""VBench by segment: names and folders as the package reads them, and a table of exactly the videos that were cut."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.video import frame_rate, read_frames, write_video
from rf_train import vbench
from rf_train.generation.many import open_job
from rf_train.generation.memory import BatchPlan
from rf_train.generation.prompts import read_prompts, seed_of
from tests.distributed import PROJECT

PROMPTS = ["a boat, at dusk.", "two discs - 3"]
SEGMENTS = ["0-0.5s", "0.5-1s"]
FPS, SECONDS = 8, 0.5


def grey(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


@pytest.fixture
def videos(tmp_path):
    """A finished job: two videos of each prompt, 10 frames, the grey of which rises; one frame is past the segments."""
    out = tmp_path / "videos"
    for number, video in enumerate(open_job(out, {"seconds": 1.2}, PROMPTS, 2, 0, BatchPlan(1, True)).videos):
        write_video(out / video["file"], np.stack([grey(20 * frame + 5 * number) for frame in range(10)]), FPS)
    return out


def cut(videos: Path, out: Path, *options: str) -> int:
    return vbench.main(["cut", str(videos), str(out), "--seconds", str(SECONDS), *options])


def scores(out: Path, segment: str, shift: float = 0.0) -> dict:
    """A result as vbench 0.1.5 writes it; the mean of the n-th dimension is n / 10 + `shift`."""
    paths = sorted((out / segment).glob("*.mp4"))
    rows = [{"video_path": str(path), "video_results": 0.5} for path in paths]
    return {name: [n / 10 + shift, rows] for n, name in enumerate(vbench.DIMENSIONS)}


@pytest.fixture
def scored(videos, tmp_path, capsys):
    out = tmp_path / "cut"
    assert cut(videos, out) == 0
    for number, segment in enumerate(SEGMENTS):
        found = scores(out, segment, number / 100)
        for part, names in (("a", vbench.DIMENSIONS[:3]), ("b", vbench.DIMENSIONS[3:])):
            path = out / "scores" / segment / f"results_2026-01-01-00:00:0{part}_eval_results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({name: found[name] for name in names}, indent=4))
        (path.parent / "results_2026-01-01-00:00:00_full_info.json").write_text("[]")
    capsys.readouterr()
    return out


def prompt_of(name: str) -> str:
    """VBench's rule: what stands before the last -NUMBER."""
    return re.sub(r"-\d+$", "", Path(name).stem)


def test_segments_hold_the_videos_frames_under_vbenchs_names(videos, tmp_path, capsys):
    out = tmp_path / "cut"
    assert cut(videos, out) == 0
    for number, segment in enumerate(SEGMENTS):
        paths = sorted((out / segment).iterdir())
        assert [(prompt_of(path.name), path.stem[-1]) for path in paths] == [(p, i) for p in PROMPTS for i in "01"]
        found = list(read_frames(out / segment / f"{PROMPTS[1]}-0.mp4", FPS))
        assert [round(frame.mean()) for frame in found] == pytest.approx(
            [20 * frame + 10 for frame in range(4 * number, 4 * number + 4)], abs=2
        )
        assert frame_rate(paths[0]) == FPS
    printed = capsys.readouterr().out
    for segment in SEGMENTS:
        assert f"--videos_path {out / segment} --output_path {out / 'scores' / segment} --dimension" in printed


def test_what_is_there_is_not_cut_again_and_two_jobs_do_not_mix(videos, tmp_path, capsys):
    out = tmp_path / "cut"
    assert cut(videos, out) == 0
    first, second = (out / SEGMENTS[0] / f"{PROMPTS[0]}-{n}.mp4" for n in range(2))
    before, bytes_before = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    assert cut(videos, out) == 0
    assert first.stat().st_mtime_ns == before and second.read_bytes() == bytes_before
    job = json.loads((videos / "job.json").read_text())
    job["settings"]["seed"] = 1
    (videos / "job.json").write_text(json.dumps(job))
    assert cut(videos, out) == 2 and "holds segments of other videos" in capsys.readouterr().err


def test_videos_made_from_longer_prompts_get_the_short_names(videos, tmp_path):
    (tmp_path / "names.txt").write_text("# VBench's\nshort one\nshort two\n")
    assert cut(videos, tmp_path / "cut", "--names", str(tmp_path / "names.txt")) == 0
    assert sorted(path.name for path in (tmp_path / "cut" / SEGMENTS[1]).iterdir()) == [
        f"short {n}-{i}.mp4" for n in ("one", "two") for i in range(2)
    ]


def lose_a_video(videos: Path) -> None:
    (videos / "00001-0.mp4").unlink()


def shorten_a_video(videos: Path) -> None:
    write_video(videos / "00001-0.mp4", np.stack([grey(9)] * 6), FPS)


def change_job(**changes):
    def change(videos: Path) -> None:
        job = json.loads((videos / "job.json").read_text())
        job["settings"].update(changes)
        (videos / "job.json").write_text(json.dumps(job))

    return change


@pytest.mark.parametrize(
    "damage, says",
    [
        (lose_a_video, "1 of 4 videos are missing, such as 00001-0.mp4"),
        (shorten_a_video, "has 1 whole segment of 0.5 s, the first video has 2"),
        (lambda videos: (videos / "job.json").unlink(), "has no job.json"),
        (lambda videos: (videos / "job.json").write_text("[" * 100_000), "job.json: not JSON"),
        (lambda videos: (videos / "job.json").write_text("[1]"), "not as rf_train.generate writes it"),
        (change_job(samples=3), "not as rf_train.generate writes it"),
        (change_job(prompts=["../../a boat", "b"]), "prompt 1, '../../a boat': VBench takes the prompt from the file"),
        (change_job(prompts=["a", "b" * 300]), "prompt 2"),
        (change_job(prompts=["a", 7]), "prompt 2, '7'"),
    ],
)
def test_folders_that_can_not_be_cut_are_refused_in_one_line(videos, tmp_path, capsys, damage, says):
    damage(videos)
    assert cut(videos, tmp_path / "cut") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error and len(error) < 400


def test_a_path_that_vbenchs_shell_would_read_is_refused(videos, tmp_path, capsys):
    assert cut(videos, tmp_path / "a;b") == 2
    assert "gives its paths to a shell" in capsys.readouterr().err


def test_the_table_has_the_means_of_each_column_by_segment(scored, capsys):
    assert vbench.main(["table", str(scored)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| temporal / visual / text | 0–0.5 s | 0.5–1 s |"
    # Dimensions 0-4, 5-6 and 7 have n / 10: means 0.2, 0.55 and 0.7.
    assert lines[2] == "| cut | 20.00 / 55.00 / 70.00 | 21.00 / 56.00 / 71.00 |"
    assert "| imaging_quality | 60.00 | 61.00 |" in lines and len(lines) == 6 + len(vbench.DIMENSIONS)


def change_score(name: str, value):
    def change(out: Path) -> None:
        path = next((out / "scores" / SEGMENTS[1]).glob("*b_eval_results.json"))
        found = json.loads(path.read_text())
        found[name] = value(found.get(name)) if callable(value) else value
        path.write_text(json.dumps(found))

    return change


@pytest.mark.parametrize(
    "damage, says",
    [
        (change_score("imaging_quality", lambda old: [float("nan"), old[1]]), "its mean nan is not a score in [-1, 1]"),
        (change_score("imaging_quality", lambda old: [61.0, old[1]]), "its mean 61.0 is not a score"),
        (change_score("imaging_quality", lambda old: [True, old[1]]), "its mean True is not a score"),
        (change_score("imaging_quality", lambda old: [0.6, old[1][1:]]), "3 videos scored, of 4 videos that were cut"),
        (change_score("imaging_quality", lambda old: [0.6, [*old[1], old[1][0]]]), "5 videos scored, of 4 videos"),
        (
            change_score("imaging_quality", lambda old: [0.6, [{"video_path": 3}]]),
            "expected a mean and a list of videos",
        ),
        (change_score("imaging_quality", 0.6), "expected a mean and a list of videos"),
        (change_score("subject_consistency", [0.5, []]), "subject_consistency is in another file beside it"),
        (lambda out: next((out / "scores" / SEGMENTS[1]).glob("*b_eval*")).unlink(), "have no motion_smoothness"),
        (lambda out: next((out / "scores" / SEGMENTS[1]).glob("*b_eval*")).write_text("{"), "not JSON"),
        (lambda out: next((out / "scores" / SEGMENTS[1]).glob("*b_eval*")).write_text("[]"), "expected a mapping"),
        (lambda out: (out / "cut.json").unlink(), "has no cut.json"),
        (lambda out: (out / "cut.json").write_text('{"segments": ["../x"], "names": ["a"]}'), "cut writes it"),
        (lambda out: (out / "cut.json").write_text('{"segments": [3], "names": ["a"]}'), "cut writes it"),
    ],
)
def test_results_that_are_not_vbenchs_are_refused_in_one_line(scored, capsys, damage, says):
    damage(scored)
    assert vbench.main(["table", str(scored)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0] and len(lines[0]) < 400


def test_the_prompts_and_the_seeds_are_pinned():
    """Whoever changes one of these changes what all earlier tables mean."""
    prompts = read_prompts(PROJECT / "rf_train/recipes/vbench.txt")
    assert len(vbench.vbench_names(prompts, 5)) == 465
    assert (
        hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        == "98989092f921763a33517fd11105702a7fe63dacee6a260bb260d9759da4e29f"
    )
    assert [seed_of(0, prompts[0], sample) for sample in range(2)] == [793518546, 1655782722]
