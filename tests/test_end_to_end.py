"""The README's path as a user walks it: videos, datasets, training on two ranks, generation, evaluation, report.

Every command is run at least once through its real command line, in a folder outside the project. Where a process of
its own is not the point, a command's `main` is called here.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from rf_train import config, train
from rf_train.evaluation.video_metrics import GENERAL_METRICS
from rf_train.run_log import read_rows
from rf_train.settings import set_by_path
from tests.distributed import PROJECT, free_port, run_distributed

pytestmark = pytest.mark.slow

TINY = [
    "model.dim=32", "model.ffn_dim=64", "model.heads=2", "model.layers=2", "model.chunk=3", "model.first_chunk=3",
    "model.patch=2", "optimizer.micro_batch=1", "flow.sampling_steps=2", "run.deepspeed=ds_configs/zero3.json",
]  # fmt: skip
TINY_STAGES = [
    "stages=[{name: teacher_forcing, history: clean, steps: 4, batch: 2}, "
    "{name: self_resampling, steps: 3, batch: 2}, "
    "{name: routed, attention: {kind: routed, top_k: 1}, steps: 2, batch: 2}]"
]
RECIPE = ["demo", "data.train=data/train", "data.evaluation=data/long", "run.out=runs/r", *TINY, *TINY_STAGES]
EVALUATION = ["--clips", 2, "--given-chunks", 1, "--batch", 1]


# ---- running commands


def run_command(*arguments, folder: Path, launcher: bool = False) -> subprocess.CompletedProcess:
    """Runs a module in `folder` as a process; with `launcher` as two ranks, started by DeepSpeed's launcher."""
    programs = Path(sys.executable).parent
    path = f"{programs}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PATH": path}
    begin = [sys.executable, "-m"]
    if launcher:  # its usual port may be another run's
        begin = [str(programs / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    command = [*begin, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def succeed(*arguments, folder: Path, launcher: bool = False) -> str:
    """What a command prints as a process, in both streams."""
    done = run_command(*arguments, folder=folder, launcher=launcher)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def call(module: str, *arguments, folder: Path) -> tuple[int, str, str]:
    """Calls a command's `main` in this process, in `folder`: (exit code, output, errors)."""
    out, errors = io.StringIO(), io.StringIO()
    main, before = importlib.import_module(module).main, Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    return code, out.getvalue(), errors.getvalue()


def succeed_here(*arguments, folder: Path) -> str:
    """What a command prints when it is called in this process."""
    code, out, errors = call(*arguments, folder=folder)
    assert code == 0, f"{arguments}:\n{out}\n{errors}"
    return out + errors


def train_on_this_rank(folder: str, arguments: list[str]) -> dict:
    """Calls training's `main` as a launcher's rank."""
    code, _, errors = call("rf_train.train", *arguments, folder=Path(folder))
    return {"code": code, "errors": errors}


# ---- the path


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder with videos, datasets and a finished run `runs/r`; and what training printed."""
    here = tmp_path_factory.mktemp("far away")  # a space in the name, too
    for name, run, count, frames, seed in (("train", succeed, 6, 33, 0), ("long", succeed_here, 2, 65, 1)):
        about = ["--frames", frames, "--size", "32x48"]
        run("data_prep.draw", f"videos/{name}", "--videos", count, "--seed", seed, *about, folder=here)
        codec = "default" if name == "train" else "default:data/train"
        about += ["--fps", 16, "--codec", codec, "--text", "default", "--samples-per-shard", 4]
        run("data_prep.encode", f"videos/{name}", f"data/{name}", *about, folder=here)
    return here, succeed("rf_train.train", *RECIPE, folder=here, launcher=True)


def test_training_runs_on_two_zero3_ranks_through_all_stages(walked):
    here, printed = walked
    assert "ZeRO stage 3, 2 ranks on cpu (gloo)" in printed
    rows = read_rows(here / "runs/r/metrics.jsonl")
    assert [row["stage"] for row in rows] == ["teacher_forcing"] * 4 + ["self_resampling"] * 3 + ["routed"] * 2
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert max(rows[0]["history_error_by_chunk"]) == 0 < min(rows[5]["history_error_by_chunk"])
    assert list((here / "runs/r").glob("wandb/offline-run-*/*.wandb"))


def test_a_finished_run_is_left_as_it_is(walked):
    here, _ = walked
    before = (here / "runs/r/metrics.jsonl").read_bytes()
    told = succeed_here("rf_train.train", *RECIPE, "optimizer.beta2=0.9", folder=here)
    assert "all 9 steps are done already" in told
    assert "not used, since this run is finished: optimizer.beta2: 0.95 -> 0.9" in told
    assert (here / "runs/r/metrics.jsonl").read_bytes() == before


def frames_of(path: Path, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]. The video has this (height, width)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and (stream.height, stream.width) == size
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_generation_from_text_is_longer_than_the_training_clips(walked):
    here, _ = walked
    about = ["--prompt", "a red circle moving left", "--seconds", 4]
    succeed_here("rf_train.generate", "runs/r", "text.mp4", *about, folder=here)
    assert len(frames_of(here / "text.mp4")) == 64 > 33


def test_generation_continues_the_first_frames_of_a_video(walked):
    """The same seed gives the same video in another process, another seed another one."""
    here, _ = walked
    about = ["--video", "videos/long/video-00000.mp4", "--seconds", 3]
    for run, seed, name in ((succeed, 1, "a"), (succeed_here, 1, "b"), (succeed_here, 2, "c")):
        run("rf_train.generate", "runs/r", f"{name}.mp4", *about, "--seed", seed, folder=here)
    a, b, c = (frames_of(here / f"{name}.mp4").astype(float) for name in "abc")
    assert a.shape == (48, 32, 48, 3)
    same, other = np.abs(a - b).mean(), np.abs(a - c).mean()
    assert same < 0.5 < 2 < other, (same, other)  # x264 is not bit-exact between processes
    truth = frames_of(here / "videos/long/video-00000.mp4").astype(float)
    distance = np.abs(a - truth[:48])
    assert distance[:20].mean() < 8 < distance[21:].mean()  # two chunks are given: 21 frames


def test_many_prompts_on_two_ranks_and_what_is_missing_on_one(walked):
    """The same bytes. Nothing is made twice, and nothing remains but videos and the list of them."""
    here, _ = walked
    (here / "prompts.txt").write_text("\n".join(f"a {colour} circle" for colour in ("red", "green", "blue")))
    many = ["rf_train.generate", "runs/r", "many", "--prompts", "prompts.txt", "--seconds", 2, "--batch", 2]
    assert "6 of 6 are there" in succeed(*many, "--samples", 2, folder=here, launcher=True)
    files = {path.name: path.read_bytes() for path in (here / "many").glob("*.mp4")}
    assert sorted(files) == [f"{index:05d}-{sample}.mp4" for index in range(3) for sample in range(2)]
    (here / "many/00001-1.mp4").unlink()
    assert "rank 0 made 1 videos; 6 of 6 are there" in succeed(*many, "--samples", 2, folder=here)
    assert {path.name: path.read_bytes() for path in (here / "many").glob("*.mp4")} == files
    assert "rank 0 made 0 videos" in succeed_here(*many, "--samples", 2, folder=here)
    assert {path.name for path in (here / "many").iterdir()} == {*files, "job.json", ".locks"}
    code, _, errors = call(*many, folder=here)
    assert code == 2 and "many: made with samples 2, now 1; choose another folder" in errors


def test_evaluation_and_the_report(walked):
    here, _ = walked
    printed = succeed("rf_train.evaluate", "runs/r", *EVALUATION, folder=here, launcher=True)
    assert "solver step(s)" in printed and "colour_distance" in printed and "rank 1: " in printed
    result = json.loads((here / "runs/r/evaluation/evaluation.json").read_text())
    assert result["clips"] == 2 and set(result["metrics"]) >= {metric.name for metric in GENERAL_METRICS}
    assert len(result["metrics"]["psnr"]) == 2
    assert "objects_kept" in result["metrics"] and len(result["frechet"]) == len(result["segments_seconds"])
    calibrated = succeed_here("rf_train.evaluate", "runs/r", *EVALUATION, "--calibrate", folder=here)
    assert {"emptied", "noised"} < set(calibrated.splitlines()[0].split())
    assert "exists already" in succeed_here("rf_train.evaluate", "runs/r", *EVALUATION, folder=here)
    found = (here / "runs/r/evaluation/evaluation.json").read_bytes()
    (here / "runs/r/evaluation/evaluation.json").unlink()
    succeed("rf_train.evaluate", "runs/r", *EVALUATION, folder=here)  # on one rank
    assert (here / "runs/r/evaluation/evaluation.json").read_bytes() == found
    (here / "two.txt").write_text("a red circle\n0: a red circle | 2: a blue circle\n")
    about = ["--prompts", "two.txt", "--seconds", 3, "--samples", 2]
    assert "frechet" in succeed_here("rf_train.evaluate", "runs/r", *about, folder=here)
    result = json.loads((here / "runs/r/evaluation_prompts/evaluation.json").read_text())
    assert result["clips"] == 2 and len(result["rows"]) == 4 and result["rows"][1]["video"] == "prompt-001.mp4"
    assert "exists already" in succeed_here("rf_train.evaluate", "runs/r", *about, folder=here)
    succeed_here("rf_train.report", "runs/r", "--prompts", folder=here)
    page = (here / "runs/r/prompts.html").read_text()
    assert page.count("<video") == 3 and "4 videos made from prompts alone" in page
    succeed("rf_train.report", "runs/r", "runs/r", folder=here)
    page = (here / "runs/r/report.html").read_text()
    assert page.count("<video") == page.count("data:video/mp4;base64,") == 12 and page.count("<svg") == 5
    assert "Which chunks routing chooses" in page  # its last stage is routed, and so is its generation
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page)


def test_the_evidence_of_an_experiment_and_the_same_seed_gives_the_same_row(walked):
    """Two arms that share a first stage, each with one seed, on two ranks."""
    here, _ = walked
    recipe = {**config.read_plain(config.recipe_path("demo")), "stages": yaml.safe_load(TINY_STAGES[0][7:])[:2]}
    for override in TINY:
        key, _, value = override.partition("=")
        set_by_path(recipe, key, yaml.safe_load(value))
    recipe["data"] = {"train": "data/train"}
    (here / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arms = [
        {"name": "ours", "title": "ours", "recipe": "tiny.yaml"},
        {
            "name": "base",
            "title": "base",
            "recipe": "tiny.yaml",
            "start": "ours",
            "settings": ["stages.1.history=clean"],
        },
    ]
    experiments = [{"name": "histories", "question": "Which?", "arms": ["base", "ours"], "seeds": 1}]
    plain = {"clips": {"data": "data/long", "count": 2}, "arms": arms, "experiments": experiments}
    (here / "experiments.yaml").write_text(yaml.safe_dump(plain))
    found = []
    for out in ("one", "two"):
        succeed_here(
            "rf_train.evidence.__main__", "--file", "experiments.yaml", "--out", out, "--ranks", 2, folder=here
        )
        results = json.loads((here / out / "results.json").read_text())
        assert "ours against base" in (here / out / "results.md").read_text()
        found.append({arm: results[arm]["0"]["metrics"] for arm in ("ours", "base")})
    assert found[0] == found[1] and found[0]["ours"] != found[0]["base"]
    rows = read_rows(here / "one/runs/base/seed0/metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 6, 7]  # the first stage is that of the other arm


def test_the_plan_of_a_recipe(walked):
    here, _ = walked
    printed = succeed("rf_train.plan", *RECIPE, "--gpus", 2, "--json", folder=here)
    figures = json.loads(printed.splitlines()[-1])
    assert [stage["stage"] for stage in figures["stages"]] == ["teacher_forcing", "self_resampling", "routed"]
    assert all(stage["clip"] == {"frames": 9, "height": 4, "width": 6} and stage["fits"] for stage in figures["stages"])


def test_from_wan_weights_through_wans_codec_and_umt5_and_back_to_diffusers(wan_folder, umt5_folder, tmp_path):
    """Tiny random models in the real formats.

    Encode, train from Wan weights, generate from a prompt, export, open with diffusers.
    """
    import diffusers

    vae = json.loads((wan_folder / "vae" / "config.json").read_text())
    channels, side = vae["z_dim"], vae["scale_factor_spatial"]
    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=channels, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    wan.save_pretrained(tmp_path / "transformer")
    about = ["--frames", 33, "--size", f"{4 * side}x{6 * side}"]
    succeed_here("data_prep.draw", "videos", "--videos", 4, *about, folder=tmp_path)
    about += ["--codec", f"wan:{wan_folder}", "--text", f"umt5:{umt5_folder}", "--samples-per-shard", 4]
    succeed_here("data_prep.encode", "videos", "data", *about, folder=tmp_path)
    latent = json.loads((tmp_path / "data" / "dataset.json").read_text())["latent"]
    assert (latent["channels"], latent["strides"]) == (channels, [4, side, side])
    assert (latent["frames"], latent["height"], latent["width"]) == (9, 4, 6)
    assert (latent["mean"], latent["std"]) == (vae["latents_mean"], vae["latents_std"])
    succeed_here("data_prep.preview", "data", "--clips", 1, "--source", "videos", folder=tmp_path)
    assert "dB on average" in (tmp_path / "data-preview" / "index.html").read_text()
    weights = [f"model.channels={channels}"] if channels != 16 else []
    weights += ["start.weights=transformer", "model.text_dim=16", "model.freq_dim=32", "run.wandb=disabled"]
    stages = [f"stages.{i}.{key}" for i in range(4) for key in ("steps=1", "batch=2", "data=data", "frames=0")]
    recipe = ["wan_1.3b", "data.train=data", "run.out=runs/w", *weights, *TINY, *stages, "stages.3.attention.top_k=1"]
    for rank in run_distributed(train_on_this_rank, 2, folder=str(tmp_path), arguments=recipe):
        assert rank["code"] == 0, rank["errors"]
    about = ["--prompt", "a red circle", "--seconds", 3]
    succeed_here("rf_train.generate", "runs/w", "w.mp4", *about, folder=tmp_path)
    assert len(frames_of(tmp_path / "w.mp4", (4 * side, 6 * side))) == 48
    succeed("rf_train.weights", "runs/w", "out", "--weights", "master", folder=tmp_path)
    before, after = wan.state_dict(), diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 1e-3  # four steps of at most 5e-5 per element


# ---- bad input

TRAIN = ["rf_train.train", "demo", "run.out=runs/x"]
BAD_INPUT = [
    ([*TRAIN, "data.train=data/train", "model.dmi=3"], "model.dmi: unknown setting; did you mean model.dim?"),
    ([*TRAIN, "data.train=data/none"], "data/none: no such folder"),
    ([*TRAIN, "data.train=empty"], "empty: not a dataset"),
    ([*TRAIN, "data.train=data/train", "model.text_dim=63"], "model.text_dim is 63"),
    ([*TRAIN, "data.train=data/train", "stages.0.batch=7"], "batch=7 is not a multiple"),
    ([*TRAIN, "data.train=data/train", "evaluation.every=5"], "data.evaluation: data/demo/long: no such folder"),
    (["rf_train.train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    (["rf_train.generate", "runs/none", "o.mp4", "--prompt", "x"], "runs/none: not a run"),
    (["rf_train.generate", "runs/r", "o.mp4"], "give --prompt TEXT, --image FILE or --video FILE"),
    (["rf_train.generate", "runs/r", "o.gif", "--prompt", "x"], "an .mp4 file"),
    (["rf_train.generate", "runs/r", "--prompt", "x"], "say where to write"),
    (["rf_train.generate", "runs/r", "o.mp4", "--prompts", "videos/long/video-00000.txt"], "with --prompts a folder"),
    (["rf_train.generate", "runs/r", "many2", "--prompts", "none.txt"], "none.txt"),
    (["rf_train.generate", "runs/r", "o.mp4", "--prompt", "0: x", "--prompt", "y"], "one of several prompts"),
    (["rf_train.generate", "runs/r", "o.mp4", "--image", "videos/long/video-00000.txt"], "not an image"),
    (["rf_train.generate", "runs/r", "o.mp4", "--prompt", "x", "--given-chunks", 3], "--given-chunks 3 is for --video"),
    (["rf_train.generate", "runs/r", "o.mp4", "--prompt", "x", "--port", 80], "--port 80 is for --play"),
    (["rf_train.generate", "runs/r", "o.mp4", "--prompt", "x", "flow.solver=rk4"], "choose euler or heun"),
    (["rf_train.generate", "runs/r", "o.mp4", "--video", "none.mp4"], "none.mp4"),
    (["rf_train.generate", "runs/r", "o.mp4", "--video", "videos/long/video-00000.txt"], "video-00000.txt"),
    (
        ["rf_train.generate", "runs/r", "o.mp4", "--prompt", "x", "--step", 3],
        "no checkpoint of step 3; it has [4, 7, 9]",
    ),
    (["rf_train.evaluate", "runs/r", "--data", "empty"], "empty: not a dataset"),
    (["rf_train.evaluate", "runs/r", "flow.guidence=2"], "did you mean flow.guidance?"),
    (["rf_train.evaluate", "runs/r", "--given-chunks", 6], "no longer than the 18 given ones"),
    (["rf_train.evaluate", "runs/r", "--seconds", 6], "--seconds is for --prompts"),
    (["rf_train.evaluate", "runs/r", "--prompts", "none.txt"], "none.txt"),
    (["rf_train.evaluate", "runs/r", "--text-agreement", "empty"], "empty: no CLIP here"),
    (["rf_train.report", "empty"], "empty: not a run"),
    (["rf_train.plan", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
    (["rf_train.weights", "empty", "out"], "empty: not a run"),
    (["rf_train.weights", "runs/r", "data"], "data: exists already"),
]


def check_refused(arguments: list, code: int, errors: str, message: str) -> None:
    complaints = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(complaints) == 1 and message in complaints[0], f"{arguments}: {code} {errors}"
    assert "Traceback" not in errors, errors


def test_bad_input_gets_one_line_and_a_nonzero_exit(walked):
    """Training joins the ranks first, so it is called in a process of its own."""
    here, _ = walked
    (here / "empty").mkdir(exist_ok=True)
    for (module, *arguments), message in BAD_INPUT:
        if module == train.__name__:
            [rank] = run_distributed(train_on_this_rank, 1, folder=str(here), arguments=arguments)
            check_refused(arguments, rank["code"], rank["errors"], message)
        else:
            code, _, errors = call(module, *arguments, folder=here)
            check_refused([module, *arguments], code, errors, message)
    assert not (here / "runs/x").exists() and not (here / "o.mp4").exists()


def test_the_exit_code_of_every_command_is_that_of_its_main(walked):
    """The first bad input of each command, through its real command line."""
    here, _ = walked
    (here / "empty").mkdir(exist_ok=True)
    first = {}
    for (module, *arguments), message in BAD_INPUT:
        first.setdefault(module, (arguments, message))
    with ThreadPoolExecutor(2) as pool:
        runs = {m: pool.submit(run_command, m, *arguments, folder=here) for m, (arguments, _) in first.items()}
    for module, (arguments, message) in first.items():
        done = runs[module].result()
        check_refused([module, *arguments], done.returncode, done.stderr, message)
