"""The report: the same page for the same runs, every metric by chunk on it, and nothing hostile in it runs."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.video import read_frames, write_video
from rf_train import config, metrics, report, report_data, report_plots
from rf_train.evaluation.frechet import Gaussian, latent_features
from rf_train.evaluation.long_videos import summary
from rf_train.evaluation.video_metrics import GENERAL_METRICS, Segment, VideoMetric, VideoPair, compare
from rf_train.metrics import METRICS, Metric, Plot, StepMetrics, over_clips
from rf_train.report_headline import verdict
from rf_train.run_log import RunLog, read_rows
from tests.conftest import plain_settings
from tests.distributed import PROJECT
from tests.step_results import one_rank, random_result

SEGMENTS = [[0.75, 1.5], [1.5, 3.0]]  # seconds
PARTS = [(slice(0, 12), slice(0, 3)), (slice(12, 24), slice(3, 6))]  # video and latent frames of each segment
HISTORY = {
    "solver_steps": 1, "fine_solver_steps": 12, "t_shift": 0.6, "solver": [0.1, 0.2], "truth": [0.3, 0.4],
    "truth_fine": [0.2, 0.3],
}  # fmt: skip


def random_video(stream: np.random.Generator) -> np.ndarray:
    return np.repeat(stream.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2), 2, axis=0)


def write_run(folder: Path, seed: int = 0, stage: str = "forcing", caption: str = "a red circle") -> Path:
    """A run of six steps in two stages, with an evaluation of two clips of which one kept its videos.

    As rf_train.train, rf_train.evaluate and rf_train.generate write it, with numbers that depend on `seed`.
    """
    stages = [{"name": stage, "history": "clean", "steps": 4, "batch": 2}]
    stages += [{"name": "resampling", "attention": {"kind": "routed", "top_k": 2}, "steps": 2, "batch": 2}]
    run = {"out": str(folder), "wandb": "disabled"}
    recipe = config.from_dict({"model": plain_settings(), "run": run, "stages": stages})
    (folder / "evaluation").mkdir(parents=True)
    (folder / "videos").mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(recipe)))
    log = RunLog(recipe, 0, rank=0)
    for step in range(recipe.steps):
        measured = StepMetrics()
        measured.add(["a", "b"], random_result(2, 10 * seed + step))
        about = {"skipped": 0, "grad_norm": 1.0, "rollout_share": 0.25, "lr": 1e-3}
        if step % 3 == 2:
            about["evaluation"] = {"clips": 2, "seconds": 0.0, "psnr": [10.0 + step, 9.0], "sharpness": [1.0, None]}
            about["evaluation"] |= {"segments_seconds": [[0.25, 1.0], [1.0, 2.0]], "frechet": [0.1, 0.2], "routing": {}}
        log.log(step, recipe.span_at(step).stage.name, 2, {**measured.reduced(1), **about})
    log.close()
    write_evaluation(folder, caption, np.random.default_rng(seed))
    return folder


def write_evaluation(folder: Path, caption: str, stream: np.random.Generator) -> None:
    rows = []
    for clip in range(2):
        made, true = random_video(stream), random_video(stream)
        latents = stream.standard_normal((2, 4, 6, 2, 2))
        pair = VideoPair(made, true, *latents, given=6, fps=8, caption=caption)
        segments = [compare(Segment(pair, *parts)) for parts in PARTS]
        sides = {"made": latents[0], "true": latents[1]}
        features = {side: Gaussian.of(latent_features(latent)).record() for side, latent in sides.items()}
        row = {"clip": f"00000{clip}_0000", "caption": caption, "seed": clip, "segments": segments}
        row["features"] = [features] * len(PARTS)
        if clip == 0:
            write_video(folder / "evaluation" / "clip-000.mp4", made, 8)
            write_video(folder / "evaluation" / "truth-000.mp4", true, 8)
            row.update(video="clip-000.mp4", truth="truth-000.mp4")
        rows.append(row)
    evaluation = {
        "request": {"clips": 2}, "step": 6, "dataset": "data/long", "clips": 2, "fps": 8, "given_seconds": 0.75,
        "trained_seconds": 1.5, "segments_seconds": SEGMENTS, **summary(rows, 2), "rows": rows,
        "history": HISTORY,
    }  # fmt: skip
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    write_video(folder / "videos" / "prompt.mp4", random_video(stream), 8)


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that were evaluated on the same segments. No test may change them."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / name, seed) for seed, name in enumerate(("first", "second"))]


def page_of(folders: list[Path], out: Path, *options: str) -> str:
    assert report.main([*map(str, folders), "--out", str(out), *options]) == 0
    return out.read_text()


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


# ---- the same page for the same runs


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    assert page_of(runs, tmp_path / "one.html") == page_of(runs, tmp_path / "two.html")


def test_the_page_carries_no_date(runs, tmp_path):
    page = page_of(runs, tmp_path / "page.html")
    page = re.sub(r"base64,[^\"]*", "", page)
    assert page.count("<svg") == 5
    assert not re.search(r"20\d\d-\d\d-\d\d|dc:date|\d\d:\d\d:\d\d", page)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(runs, tmp_path):
    """With another seed for the order of sets and hashes, and started from another folder."""
    here = page_of(runs, tmp_path / "here.html")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "rf_train.report", *map(str, runs), "--out", "there.html"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "there.html").read_text() == here


# ---- what is on it


def test_the_page_has_a_plot_per_metric_and_a_row_per_run(runs, tmp_path):
    page = Page(page_of(runs, tmp_path / "page.html"))
    # A clip: the truth and two continuations, whole and in two segments each. And two prompts.
    assert page.count("svg") == 5 and page.count("video") == 3 + 3 * 2 + 2
    for metric in METRICS:
        assert metric.plot is None or metric.plot.title in page.texts
    for metric in GENERAL_METRICS:
        for run in ("first", "second"):
            assert f"{metric.title} ({metric.better}): {run}" in page.texts
    assert "routed (top_k 2)" in page.texts and "self-resampling" in page.texts
    assert "first: 1 solver step(s) to 12" in page.texts
    assert "2 held-out clips, continued from their first 0.75 s; trained on clips of 1.50 s (dotted)." in "".join(
        page.texts
    )


def test_the_page_loads_nothing_from_outside(runs, tmp_path):
    page = Page(page_of(runs, tmp_path / "page.html"))
    linked = [values[key] for _, values in page.elements for key in ("src", "href", "xlink:href") if key in values]
    assert linked and all(link.startswith(("data:", "#")) for link in linked)


def test_a_run_without_an_evaluation_is_told_by_its_training_alone(runs, tmp_path):
    bare = write_run(tmp_path / "bare")
    (bare / "evaluation" / "evaluation.json").unlink()
    (bare / "videos" / "prompt.mp4").unlink()
    page = Page(page_of([bare], tmp_path / "page.html"))
    assert page.count("svg") == 3 and page.count("video") == 0


def test_a_run_on_other_segments_is_not_compared(runs, tmp_path):
    other = write_run(tmp_path / "other")
    path = other / "evaluation" / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "segments_seconds": [[0.75, 2.0], [2.0, 3.0]]}))
    page = Page(page_of([runs[0], other], tmp_path / "page.html"))
    assert "other was evaluated on other segments and isn't compared here." in page.texts
    assert not any(text.endswith("): other") for text in page.texts)


def test_the_picture_shows_the_truth_and_every_run(runs, tmp_path):
    page_of(runs, tmp_path / "page.html", "--picture", str(tmp_path / "frames.png"))
    with Image.open(tmp_path / "frames.png") as picture:
        assert picture.size == (
            2 * 8 * 18,
            2 * 3 * 18,
        )  # twice the size; eight frames of 16 x 16 in a border; three rows


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: (run / "recipe.yaml").unlink(), "not a run, it has no recipe.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "its metrics.jsonl holds no steps yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                json.dumps(dict.fromkeys(report_data.ROW, 1) | {"stage": "a", "loss": None})
            ),
            "its metrics.jsonl holds no step with a finite loss",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), "rows without stage, loss, seconds"),
        (lambda run: (run / "metrics.jsonl").write_text("5\n{}\n"), "its metrics.jsonl holds no steps yet"),
        (lambda run: (run / "recipe.yaml").write_text("a: [\nb"), "recipe.yaml: not YAML"),
        (lambda run: (run / "recipe.yaml").write_text("5"), "recipe.yaml: a recipe is a mapping"),
        (lambda run: (run / "evaluation/evaluation.json").write_text("{"), "evaluation.json: not JSON"),
        (lambda run: (run / "evaluation/evaluation.json").write_text("[]"), "not an evaluation of this version"),
        (lambda run: (run / "evaluation/evaluation.json").write_text("[" * 100_000), "evaluation.json: not JSON"),
        (lambda run: (run / "evaluation/evaluation.json").write_text('{"metrics": {}}'), "of this version"),
        (lambda run: change_evaluation(run, metrics=[HOSTILE]), "not an evaluation of this version"),
    ],
)
def test_a_folder_that_is_no_run_gets_one_line(tmp_path, capsys, change, message):
    run = write_run(tmp_path / "run")
    change(run)
    capsys.readouterr()
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (run / "report.html").exists()


def change_evaluation(run: Path, **changes) -> None:
    path = run / "evaluation" / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_picture_needs_an_evaluated_run(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "evaluation/evaluation.json").unlink()
    assert report.main([str(run), "--picture", str(tmp_path / "p.png")]) == 2
    assert "no run has been evaluated yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["_under", "\udcff"])
def test_an_odd_name_is_in_the_legends(tmp_path, name):
    run = write_run(tmp_path / name)
    assert report.main([str(run), "--out", str(tmp_path / "r.html")]) == 0
    shown = name if name == "_under" else "\ufffd"
    assert re.search(rf"<text[^>]*>\u200b?{shown}</text>", (tmp_path / "r.html").read_text())


def test_nothing_is_left_of_a_page_that_could_not_be_written(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    assert report.main([str(run), "--out", str(tmp_path / "folder")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]


# ---- the headline


def test_the_page_begins_with_what_came_out(runs, tmp_path):
    page = page_of(runs, tmp_path / "page.html")
    begin, end = page.index('class="headline"'), page.index("<h2>")
    text = "".join(Page(page[begin:end]).texts)
    evaluation = json.loads((runs[0] / "evaluation/evaluation.json").read_text())
    cells = evaluation["metrics"]["sharpness"]
    assert f"sharpness (near 1){cells[0]['mean']:.3f}{cells[1]['mean']:.3f}" in text
    assert "first, up to 2.0 times its trained length: " in text and "second: 6 of 6 steps; loss " in text


@pytest.mark.parametrize(
    "better, means, low, high, says",
    [
        ("higher", (1.0, 0.5), -0.6, -0.4, "worse"), ("higher", (0.5, 1.0), 0.4, 0.6, "better"),
        ("lower", (0.5, 1.0), 0.4, 0.6, "worse"), ("lower", (1.0, 0.5), -0.6, -0.4, "better"),
        ("near 1", (1.0, 1.5), 0.4, 0.6, "worse"), ("near 1", (0.5, 1.0), 0.4, 0.6, "better"),
        ("near 0", (0.1, -0.5), -0.7, -0.5, "worse"), ("higher", (1.0, 0.5), -0.6, 0.1, "no clear change"),
        ("higher", (1.0, None), -0.6, -0.5, ""), ("higher", (1.0, 0.5), None, None, ""),
    ],
)  # fmt: skip
def test_a_change_counts_when_it_is_outside_of_its_interval(better, means, low, high, says):
    metric = VideoMetric("m", better, "", lambda _: None)
    run = SimpleNamespace(
        evaluation={"metrics": {"m": [{"mean": mean} for mean in means]}, "slopes": {"m": {"low": low, "high": high}}}
    )
    assert verdict(run, metric) == says


def test_segments_of_a_clip_stand_side_by_side(runs, tmp_path):
    page = page_of(runs, tmp_path / "page.html")
    for name in ("truth", "first", "second"):
        for begin, end in SEGMENTS:
            assert f"<figcaption>{name}, {begin:.1f}–{end:.1f} s</figcaption>" in page
    found = re.search(r'base64,([^"]*)"></video><figcaption>first, 1.5–3.0 s', page)
    (tmp_path / "part.mp4").write_bytes(base64.b64decode(found[1]))
    part, whole = (list(read_frames(path, 8)) for path in (tmp_path / "part.mp4", runs[0] / "evaluation/clip-000.mp4"))
    assert len(part) == 12 and np.abs(np.stack(part).astype(float) - np.stack(whole[12:24])).mean() < 12


# ---- a new metric


def test_a_new_metric_by_chunk_appears_everywhere_without_another_change(tmp_path, monkeypatch):
    """Only its entry is written. It is summed, logged and drawn."""

    def largest(result):
        return over_clips(result.x.amax(dim=(1, 3, 4))[:, [0, 3, 6]], result.finite)

    new = Metric("largest_by_chunk", largest, Plot("the largest latent", "x"))
    before = page_of([write_run(tmp_path / "before")], tmp_path / "before.html")
    for module in (metrics, report_plots):  # both have the name
        monkeypatch.setattr(module, "METRICS", (*METRICS, new))
    run = write_run(tmp_path / "run")
    for step, row in enumerate(read_rows(run / "metrics.jsonl")):
        expected = random_result(2, step).x.amax(dim=(1, 3, 4))[:, [0, 3, 6]].mean(dim=0)
        assert row["largest_by_chunk"] == pytest.approx(expected.tolist())
    page = page_of([run], tmp_path / "page.html")
    assert "the largest latent" in Page(page).texts and "the largest latent" not in before


# ---- hostile names

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; $x{$ %s"


def test_hostile_captions_and_names_are_text(runs, tmp_path):
    """They are shown as they are, and make no element and no formula."""
    name = HOSTILE.replace("/", "∕")  # a folder's name has no slash
    run = write_run(tmp_path / name, stage=HOSTILE, caption=HOSTILE)
    (run / "videos" / "prompt.mp4").rename(run / "videos" / f"{name}.mp4")
    page, plain = Page(page_of([run], tmp_path / "page.html")), Page(page_of(runs[:1], tmp_path / "plain.html"))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert not any(key.startswith("on") for _, values in page.elements for key in values)
    text = "".join(page.texts)
    assert text.count(HOSTILE) == 3  # the caption, the stage in the table and above the plot
    assert text.count(name) >= 8
    assert page.count("svg") == 5


def spoil(value, path: tuple, new) -> None:
    """Replaces a part of a JSON value."""
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize(
    "path",
    [
        ("clips",), ("fps",), ("given_seconds",), ("trained_seconds",), ("segments_seconds", 0, 0),
        ("metrics", "psnr", 0), ("metrics", "psnr", 0, "mean"), ("slopes", "psnr", "low"), ("frechet", 0),
        ("history", "solver_steps"), ("history", "truth", 0), ("routing", "first_chunk"),
        ("routing", "mean_distance", 0), ("rows",), ("rows", 0),
    ],
    ids=str,
)  # fmt: skip
def test_markup_in_place_of_a_number_is_refused(runs, tmp_path, capsys, path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "evaluation" / "evaluation.json"
    found = json.loads(file.read_text())
    found["routing"] = {"by_distance": [0.5], "first_chunk": 0.1, "entropy": 0.5, "mean_distance": [[1.0]]}
    file.write_text(json.dumps(found))
    assert report.main([str(run)]) == 0
    for odd in (HOSTILE, {"a": HOSTILE}, True, 10**400, float("nan")):
        spoil(found, path, odd)
        file.write_text(json.dumps(found))
        capsys.readouterr()
        assert report.main([str(run)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {file}: not as rf_train.evaluate writes it; ") and error.count("\n") == 1


@pytest.mark.parametrize("key", ["clips", "psnr", "sharpness"])
def test_markup_in_an_evaluation_during_training_is_refused(runs, tmp_path, capsys, key):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rows = read_rows(run / "metrics.jsonl")
    rows[2]["evaluation"][key] = HOSTILE
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main([str(run)]) == 2
    assert f"step 3: evaluation: {key}: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["truth", "video", "link", "absolute", "other folder", "another kind", "videos"])
def test_no_file_from_outside_the_run_gets_into_a_report(runs, tmp_path, capsys, place):
    """Neither by a path, nor by a link, nor as a file of the run that is no video."""
    run, secret = tmp_path / "run", tmp_path / "secret.mp4"
    shutil.copytree(runs[0], run)
    secret.write_text("secret")
    shutil.copy(secret, run / "evaluation" / "secret.txt")
    (run / "evaluation" / "link.mp4").symlink_to(secret)
    names = {
        "truth": "../../secret.mp4", "video": "../../secret.mp4", "link": "link.mp4", "absolute": str(secret),
        "other folder": "../videos/prompt.mp4", "another kind": "secret.txt",
    }  # fmt: skip
    file = run / "evaluation" / "evaluation.json"
    found = json.loads(file.read_text())
    if place == "videos":
        (run / "videos" / "link.mp4").symlink_to(secret)
    else:
        found["rows"][0]["truth" if place == "truth" else "video"] = names[place]
    file.write_text(json.dumps(found))
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("video beside it" in error or "not an mp4 inside the run's folder" in error)
    assert not (run / "report.html").exists()


def test_evaluations_during_training_are_plotted_if_there_are_any(runs, tmp_path):
    page = page_of(runs, tmp_path / "page.html")
    assert "Quality during training" in page and "On 2 held-out clips" in page
    assert "first, last segment" in page and "second, first segment" in page
    shutil.copytree(runs[0], tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    without = [{key: value for key, value in row.items() if key != "evaluation"} for row in rows]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    assert "Quality during training" not in page_of([tmp_path / "run"], tmp_path / "page.html")


def test_the_choices_of_a_routed_run_are_shown(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "routed")
    path = tmp_path / "routed" / "evaluation" / "evaluation.json"
    routing = {"by_distance": [0.5, 0.25], "first_chunk": 0.125, "entropy": 0.5, "mean_distance": [[1.0, 2.0]] * 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), "routing": routing}))
    page = page_of([tmp_path / "routed", runs[1]], tmp_path / "page.html")
    assert "Which chunks routing chooses" in page and "<td>0.125</td><td>0.500 of at most 0.693</td>" in page
    assert "Which chunks routing chooses" not in page_of(runs, tmp_path / "page.html")


def test_a_page_of_prompts_has_the_prompts_and_no_truth(runs, tmp_path):
    folders = [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    assert "rf_train.evaluate RUN --prompts FILE" in page_of(folders, tmp_path / "none.html", "--prompts")
    for folder in folders:
        found = json.loads((folder / "evaluation/evaluation.json").read_text())
        found["history"] = None
        (folder / "evaluation").rename(folder / "evaluation_prompts")
        for row in found["rows"]:
            row.update(prompt=f"a boat, {row.pop('clip')}", sample=0)
            del row["caption"]
            row.pop("truth", None)
        (folder / "evaluation_prompts/evaluation.json").write_text(json.dumps(found))
    page = Page(page_of(folders, tmp_path / "page.html", "--prompts"))
    text = " ".join(page.texts)
    assert "2 videos made from prompts alone" in text and "a boat, 000000_0000" in text and "true clips" not in text
    assert page.count("video") == 2 * 2 + 2 + 2  # by segment, whole, and those of rf_train.generate
    assert "those of their first segment" in text
