"""Many prompts: the same bytes however the work was shared and interrupted, and nothing twice."""

import json

import pytest

from rf_train.engine.shared_work import held
from rf_train.generation import many
from rf_train.generation.many import make_batches, open_job
from rf_train.generation.memory import BatchPlan
from rf_train.generation.prompts import seed_of
from rf_train.generation.stream import Videos

PROMPTS = [f"a {colour} {kind}" for colour in ("red", "green") for kind in ("cross", "disc")] + ["a boat"]
PLAN = BatchPlan(2, True)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def test_the_work_may_be_shared_and_interrupted_in_any_way(tiny_generator, tmp_path, monkeypatch):
    like = Videos(tiny_generator(), [], [], 1.0)
    job = open_job(tmp_path / "whole", {"seconds": 1.0}, PROMPTS, 1, 0, PLAN)
    assert make_batches(job, like, 0, 1) == 5
    passes = []
    hook = like.generator.model.register_forward_hook(lambda *_: passes.append(1))
    assert make_batches(job, like, 0, 1) == 0 and not passes
    hook.remove()
    whole = contents(tmp_path / "whole")
    assert list(whole) == [*(f"{index:05d}-0.mp4" for index in range(5)), "job.json"]

    parts = open_job(tmp_path / "parts", {"seconds": 1.0}, PROMPTS, 1, 0, PLAN)
    with held(parts.locks / "batch-00000"):  # another process makes this one
        assert make_batches(parts, like, 0, 2) == 3
        assert make_batches(parts, like, 1, 2) == 0

    written = []
    original = many.VideoWriter.write

    def killed(self, frames):
        written.append(self.path.name)
        if len(written) > 3:
            raise KeyboardInterrupt
        original(self, frames)

    monkeypatch.setattr(many.VideoWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_batches(parts, like, 0, 1)
    monkeypatch.undo()
    assert set(contents(parts.out)) == {"00002-0.mp4", "00003-0.mp4", "00004-0.mp4", "job.json"}
    # A process that comes back has other memory, and keeps to the plan that was made.
    again = open_job(tmp_path / "parts", {"seconds": 1.0}, PROMPTS, 1, 0, BatchPlan(1, False))
    assert again.plan == PLAN
    (parts.out / "00003-0.mp4").unlink()  # half a batch is there: its other half is made again as it was
    kept = (parts.out / "00002-0.mp4").stat().st_mtime_ns
    assert make_batches(again, like, 0, 1) == 3
    assert contents(parts.out) == whole and (parts.out / "00002-0.mp4").stat().st_mtime_ns == kept


def test_every_video_of_a_prompt_has_a_seed_of_its_own(tmp_path):
    job = open_job(tmp_path / "out", {}, ["a", "b"], 2, 7, PLAN)
    assert [(video["file"], video["seed"]) for video in job.videos] == [
        (f"{index:05d}-{sample}.mp4", seed_of(7, prompt, sample))
        for index, prompt in enumerate("ab")
        for sample in range(2)
    ]
    assert json.loads((job.out / "job.json").read_text())["videos"] == job.videos


def test_a_folder_with_other_settings_or_other_files_is_left_alone(tmp_path):
    out = tmp_path / "out"
    open_job(out, {"seconds": 1.0}, ["a"], 1, 0, PLAN)
    for settings, prompts, says in (
        ({"seconds": 2.0}, ["a"], "made with seconds 1.0, now 2.0"),
        ({"seconds": 1.0}, ["b"], "made with prompts.0 'a', now 'b'"),
    ):
        with pytest.raises(ValueError, match=says):
            open_job(out, settings, prompts, 1, 0, PLAN)
    (out / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="not a job of this version"):
        open_job(out, {"seconds": 1.0}, ["a"], 1, 0, PLAN)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(ValueError, match=r"not empty, and has no job\.json"):
        open_job(tmp_path / "other", {}, ["a"], 1, 0, PLAN)
    assert not (tmp_path / "other/.locks").exists()
    with pytest.raises(ValueError, match="not a folder"):
        open_job(tmp_path / "other/notes.txt", {}, ["a"], 1, 0, PLAN)
