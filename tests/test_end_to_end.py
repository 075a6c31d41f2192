"""The README's path, as a user walks it: videos -> shards -> two ZeRO-3 ranks -> generation, evaluation, report; and what bad input gets."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from rf_train.metrics import read_metrics
from tests.distributed import PROJECT

TINY = [
    "model.dim=32", "model.ffn_dim=64", "model.heads=2", "model.layers=2", "optimizer.micro_batch=1", "flow.sampling_steps=2",
    "stages.0.steps=4", "stages.1.steps=3", "stages.2.steps=2", "stages.2.k=1", "stages.0.batch=2", "stages.1.batch=2", "stages.2.batch=2",
]  # fmt: skip


def command(*arguments, folder, launcher=False) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with socket.socket() as probe:  # the launcher's own port may be another run's
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    begin = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", port, "--module"] if launcher else [sys.executable, "-m"]
    return subprocess.run([*begin, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def succeed(*arguments, **keywords) -> str:
    done = command(*arguments, **keywords)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder far from the project with videos, datasets, a finished run `runs/r`, and what the commands printed."""
    here = tmp_path_factory.mktemp("far away")  # a space in the name, too
    printed = {}
    for name, count, frames, seed in (("train", 6, 33, 0), ("long", 2, 65, 1)):
        succeed("data_prep.draw", f"videos/{name}", "--videos", count, "--frames", frames, "--size", "32x48", "--seed", seed, folder=here)
        codec = "default" if name == "train" else "default:data/train"
        arguments = ["--fps", 16, "--size", "32x48", "--frames", frames, "--codec", codec, "--text", "default", "--samples-per-shard", 4]
        succeed("data_prep.encode", f"videos/{name}", f"data/{name}", *arguments, folder=here)
    recipe = ["demo", "data.train=data/train", "data.evaluation=data/long", "run.out=runs/r", *TINY]
    printed["train"] = succeed("rf_train.train", *recipe, folder=here, launcher=True)
    printed["again"] = succeed("rf_train.train", *recipe, folder=here, launcher=True)
    return here, printed


def test_training_runs_on_two_zero3_ranks_through_all_stages(walked):
    here, printed = walked
    assert "ZeRO stage 3, 2 ranks on cpu (gloo)" in printed["train"]
    rows = read_metrics(here / "runs/r/metrics.jsonl")
    assert [row["stage"] for row in rows] == ["teacher_forcing"] * 4 + ["self_resampling"] * 3 + ["routed"] * 2
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert max(rows[0]["history_error_by_chunk"]) == 0 < min(rows[5]["history_error_by_chunk"])
    assert list((here / "runs/r").glob("wandb/offline-run-*/*.wandb"))
    assert "all 9 steps are done already" in printed["again"] and len(read_metrics(here / "runs/r/metrics.jsonl")) == 9


def frames_of(path: Path) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and (stream.height, stream.width) == (32, 48)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_generation_from_text_and_from_a_videos_first_frames_longer_than_the_training_clips(walked):
    here, _ = walked
    succeed("rf_train.generate", "runs/r", "text.mp4", "--prompt", "a red circle moving left", "--seconds", "4", folder=here)
    assert len(frames_of(here / "text.mp4")) == 64 > 33
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        succeed("rf_train.generate", "runs/r", f"{name}.mp4", "--video", "videos/long/video-00000.mp4", "--seconds", "3", "--seed", seed, folder=here)
    a, b, c = (frames_of(here / f"{name}.mp4").astype(float) for name in "abc")
    assert a.shape == (48, 32, 48, 3)
    same, other = np.abs(a - b).mean(), np.abs(a - c).mean()
    assert same < 0.5 < 2 < other, (same, other)  # x264 is not bit-exact between processes
    truth = frames_of(here / "videos/long/video-00000.mp4").astype(float)
    distance = np.abs(a - truth[:48])
    assert distance[:20].mean() < 8 < distance[21:].mean()  # two chunks are given: 21 frames


def test_evaluation_and_the_report(walked):
    here, _ = walked
    printed = succeed("rf_train.evaluate", "runs/r", "--clips", "2", "--given-chunks", "1", "--batch", "1", folder=here)
    assert "solver step(s)" in printed
    assert "colour_distance" in printed
    result = json.loads((here / "runs/r/evaluation/evaluation.json").read_text())
    assert result["clips"] == 2 and len(result["figures"]["psnr"]) == 2
    assert "stands already" in succeed("rf_train.evaluate", "runs/r", "--clips", "2", "--given-chunks", "1", "--batch", "1", folder=here)
    succeed("rf_train.report", "runs/r", "runs/r", folder=here)
    page = (here / "runs/r/report.html").read_text()
    assert page.count("<video") == 6 and page.count("data:video/mp4;base64,") == 6 and page.count("<svg") == 3
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", page)


def test_from_wan_weights_through_wans_codec_and_umt5_and_back_to_diffusers(wan_folder, umt5_folder, tmp_path):
    """Tiny random models in the real formats: encode, train from Wan weights, generate from a prompt, export, open with diffusers."""
    import diffusers

    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    wan.save_pretrained(tmp_path / "transformer")
    succeed("data_prep.draw", "videos", "--videos", 4, "--frames", 33, "--size", "32x48", folder=tmp_path)
    succeed("data_prep.encode", "videos", "data", "--size", "32x48", "--frames", 33, "--codec", f"wan:{wan_folder}", "--text", f"umt5:{umt5_folder}", "--samples-per-shard", 4, folder=tmp_path)
    recipe = ["wan_1.3b", "data.train=data", "run.out=runs/w", "start.weights=transformer", "model.text_dim=16", "model.freq_dim=32", *TINY[:4], "optimizer.micro_batch=1", "flow.sampling_steps=2"]
    stages = [f"stages.{i}.{key}" for i in range(4) for key in ("steps=1", "batch=2", "data=data", "frames=0")]
    succeed("rf_train.train", *recipe, *stages, "stages.3.k=1", folder=tmp_path, launcher=True)
    succeed("rf_train.generate", "runs/w", "w.mp4", "--prompt", "a red circle", "--seconds", "3", folder=tmp_path)
    assert len(frames_of(tmp_path / "w.mp4")) == 48
    succeed("rf_train.weights", "runs/w", "out", "--weights", "master", folder=tmp_path)
    before, after = wan.state_dict(), diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 1e-3  # four steps of at most 5e-5 an element


def test_bad_input_gets_one_line_and_a_nonzero_exit(walked):
    here, _ = walked
    (here / "empty").mkdir(exist_ok=True)
    cases = [
        (["rf_train.train", "demo", "data.train=data/train", "run.out=runs/x", "model.dmi=3"], "model.dmi: unknown setting; did you mean model.dim?"),
        (["rf_train.train", "demo", "data.train=data/none", "run.out=runs/x"], "data/none: no such folder"),
        (["rf_train.train", "demo", "data.train=empty", "run.out=runs/x"], "empty: not a dataset"),
        (["rf_train.train", "demo", "data.train=data/train", "run.out=runs/x", "model.text_dim=63"], "model.text_dim is 63"),
        (["rf_train.train", "demo", "data.train=data/train", "run.out=runs/x", "stages.0.batch=7"], "batch=7 is not a multiple"),
        (["rf_train.train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["rf_train.generate", "runs/none", "o.mp4", "--prompt", "x"], "runs/none: not a run"),
        (["rf_train.generate", "runs/r", "o.mp4"], "give --prompt TEXT, --video FILE or both"),
        (["rf_train.generate", "runs/r", "o.gif", "--prompt", "x"], "an .mp4 file"),
        (["rf_train.generate", "runs/r", "o.mp4", "--video", "none.mp4"], "none.mp4"),
        (["rf_train.generate", "runs/r", "o.mp4", "--video", "videos/long/video-00000.txt"], "video-00000.txt"),
        (["rf_train.evaluate", "runs/r", "--data", "empty"], "empty: not a dataset"),
        (["rf_train.evaluate", "runs/r", "flow.guidence=2"], "did you mean flow.guidance?"),
        (["rf_train.report", "empty"], "empty: not a run"),
    ]
    for arguments, message in cases:
        done = command(*arguments, folder=here)
        complaints = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(complaints) == 1 and message in complaints[0] and "Traceback" not in done.stderr, f"{arguments}: {done.returncode} {done.stderr}"
    assert not (here / "runs/x").exists()
