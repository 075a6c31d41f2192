"""Training's guarantees: a NaN skips a step, ranks that disagree stop at once, a killed neighbour is named,
and an error on one rank ends that rank at once.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from data_prep.command import one_line
from rf_train import config, start_checks, train
from rf_train.config import Stage
from rf_train.data import batches
from rf_train.data.damage import SPARED, TooMuchDamage
from rf_train.diffusion.batch import Batch
from rf_train.engine import checkpoint, deepspeed_json
from rf_train.engine.collectives import PeerLost, naming_lost_peers, start_ranks
from rf_train.engine.run_folder import one_writer
from rf_train.planning.costs import Clip
from rf_train.planning.memory import ROOM, fits, memory
from rf_train.run_log import read_rows
from rf_train.saves import TooManySkippedSteps
from tests.conftest import write_dataset
from tests.distributed import PROJECT, free_port, rank_environment, run_distributed
from tests.engine.runs import assert_close, recipe_dict
from tests.planning.cases import tiny_case


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_its_end():
    stage = Stage(steps=10, lr=1.0, lr_end=0.1, warmup=3)
    rates = [train.learning_rate(stage, step) for step in range(10)]
    assert rates[0] == 0.25 and rates[1] == pytest.approx(0.5 * 0.9) and rates[-1] == pytest.approx(0.1)
    assert train.learning_rate(replace(stage, lr_end=0.0), 9) == 1.0


# ---- gradients that are not finite


def train_with_nan_on_this_rank(recipe: dict, rank_with_nan: int, steps: list[int]) -> str | None:
    """Trains; the loss of one rank is NaN at the given 0-based steps. Returns the error."""
    loss, train_step, current = train.training_loss, train.train_step, []

    def broken(*arguments):
        result = loss(*arguments)
        if int(os.environ["RANK"]) == rank_with_nan and current[-1] in steps:
            nan = float("nan")
            return replace(result, loss=result.loss * nan, by_chunk=result.by_chunk * nan)
        return result

    train.training_loss = broken
    train.train_step = lambda engine, step, *rest: (current.append(step), train_step(engine, step, *rest))[1]
    try:
        train.train(config.from_dict(recipe))
    except TooManySkippedSteps as error:
        return str(error)
    return None


ZERO_2 = {"deepspeed": "ds_configs/zero2.json"}


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, ZERO_2, {"precision": "bf16"}, {"precision": "bf16", **ZERO_2}], ids=str)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_training_goes_on(plain_run, tmp_path, run):
    recipe = recipe_dict(plain_run.data, tmp_path, **run)
    recipe["stages"] = recipe["stages"][:1]
    recipe["optimizer"]["max_skipped"] = 2  # in a row: these are not
    broken = {"recipe": recipe, "rank_with_nan": 1, "steps": [2, 4]}
    assert run_distributed(train_with_nan_on_this_rank, 2, **broken) == [None, None]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert rows[2]["clips_not_finite"] == 2 and rows[3]["clips_not_finite"] == 0
    newest = checkpoint.latest(tmp_path)
    manifest = checkpoint.verified(newest)
    assert manifest["optimizer_steps"] == manifest["average_steps"] == 6
    for kind in checkpoint.KINDS:
        assert all(tensor.isfinite().all() for tensor in checkpoint.read_weights(newest, kind).values())
    if not run:
        assert_close([row["loss"] for row in rows[:2]], plain_run.losses[:2], 1e-4)
        assert rows[2]["loss"] is not None and rows[-1]["loss"] < rows[0]["loss"]


def test_ten_in_a_row_stop_the_run_with_the_clips_named_and_nothing_saved(plain_run, tmp_path):
    plain = recipe_dict(plain_run.data, tmp_path, save_every=2)
    steps = list(range(5, 40))
    told = run_distributed(train_with_nan_on_this_rank, 2, recipe=plain, rank_with_nan=1, steps=steps)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert len(rows) == 15 and [row["skipped"] for row in rows] == [0] * 5 + [1] * 10
    recipe = config.from_dict(plain)
    datasets = batches.open_datasets(recipe)
    of_rank_1 = [batch for step in range(5, 15) for batch in batches.step_batches(recipe, datasets, step, 1, 2)]
    for text in told:
        assert text.startswith("step 15: 10 steps in a row") and "step-00000004" in text
        assert all(name in text for batch in of_rank_1 for name in batch.ids)
    # Neither every second step nor the first stage's end: all of them were skipped.
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 4


# ---- damaged samples


def train_and_say(recipe: dict) -> str | None:
    """Trains. Returns the error of a run that stops for damage."""
    try:
        train.train(config.from_dict(recipe))
    except TooMuchDamage as error:
        return str(error)
    return None


def with_a_shard_missing(plain_run, folder) -> Path:
    shutil.copytree(plain_run.data, folder)
    (folder / "short" / "shard-000001-0000.tar").unlink()
    return folder


def test_damaged_samples_are_counted_named_and_replaced_while_ranks_stay_in_step(plain_run, tmp_path):
    """Two ranks and one, with other micro-batches, replace the same samples by the same ones."""
    data, found = with_a_shard_missing(plain_run, tmp_path / "data"), []
    for ranks, micro_batch in ((2, 1), (1, 4)):
        out = tmp_path / f"run{ranks}"
        recipe = recipe_dict(data, out, micro_batch=micro_batch)
        recipe["stages"] = recipe["stages"][:1]
        recipe["data"]["max_damaged"] = 1.0
        assert run_distributed(train_and_say, ranks, recipe=recipe) == [None] * ranks
        rows = read_rows(out / "metrics.jsonl")
        lines = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
        assert sum(row["damaged"] for row in rows) == len(lines) > 10
        assert [row["damaged"] for row in rows] == [sum(line["step"] == row["step"] for line in lines) for row in rows]
        assert {(line["shard"], line["reason"]) for line in lines} == {("shard-000001-0000.tar", "missing")}
        found.append((lines, [row["loss"] for row in rows]))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1], 1e-4)


def test_too_much_damage_stops_the_run_on_all_ranks(plain_run, tmp_path):
    data = with_a_shard_missing(plain_run, tmp_path / "data")
    told = run_distributed(train_and_say, 2, recipe=recipe_dict(data, tmp_path / "run"))
    assert told[0] == told[1] and "damaged samples among" in told[0] and "more than data.max_damaged=0.01" in told[0]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["damaged"] for row in rows[:-1]) <= SPARED < sum(row["damaged"] for row in rows)


# ---- datasets of two sizes


@pytest.mark.slow
def test_steps_of_two_picture_sizes_are_the_same_on_two_ranks_and_on_one(plain_run, tmp_path):
    wide = write_dataset(tmp_path / "wide", 9, height=2, width=12, seed=2)
    parts = [{"data": str(plain_run.data / "short"), "weight": 1}, {"data": str(wide), "weight": 1}]
    losses = []
    for ranks, micro_batch in ((2, 1), (1, 2)):
        recipe = recipe_dict(plain_run.data, tmp_path / f"run{ranks}", micro_batch=micro_batch)
        recipe["stages"] = [{**recipe["stages"][0], "data": "sizes"}]
        recipe["data"]["mixtures"] = [{"name": "sizes", "by": "step", "parts": parts}]
        assert run_distributed(train_and_say, ranks, recipe=recipe) == [None] * ranks
        losses.append([row["loss"] for row in read_rows(tmp_path / f"run{ranks}" / "metrics.jsonl")])
    assert_close(losses[0], losses[1], 1e-4)
    mixed = batches.open_datasets(config.from_dict(recipe))["sizes"]
    assert {mixed.place_of(0, step)[0] for step in range(len(losses[0]))} == {0, 1}


# ---- folders that can't be written


def errors_of_entering(folders: list[str]) -> list[str]:
    """What is said when these folders are to be written."""
    start_ranks()
    said = []
    for folder in folders:
        with pytest.raises(OSError) as caught, one_writer(Path(folder), int(os.environ["RANK"]), lambda: None, str):
            pass
        said.append(one_line(caught.value))
    return said


def test_a_folder_that_cannot_be_made_is_one_line_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("mine")
    folders = ["/proc/none/run", str(tmp_path / "file"), str(tmp_path / "file" / "run")]
    told = run_distributed(errors_of_entering, 2, folders=folders)
    assert told[0] == told[1]
    assert [said.startswith("[Errno") for said in told[0]] == [True] * 3, told


# ---- an error on one rank


@pytest.fixture
def ended(monkeypatch, tmp_path):
    """`ended(error)`: a rank whose training raises `error`, or ends well: its exit code; whether it left its group."""
    left: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: left.append(True))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": [{}], "run": {"out": str(tmp_path / "run")}}))

    def run(error: BaseException | None, rank: int = 0) -> tuple[int, bool]:
        def ending(*_):
            engine = Engine()
            if error is not None:
                raise type(error)(*error.args)  # one that the test itself doesn't hold
            engine.freed = "well"

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(train, "train", ending)
        left.clear()
        return train.main([str(tmp_path / "recipe.yaml"), "optimizer.micro_batch=2"]), bool(left)

    class Engine:
        """Frees nothing after an error: DeepSpeed's engine would wait for the GPU."""

        freed = "after an error"

        def __del__(self):
            freed.append(self.freed)

    freed: list[str] = []
    yield run
    assert "after an error" not in freed


def test_only_a_rank_that_ends_well_waits_for_its_peers(ended, capsys):
    """With NCCL, leaving a group waits for kernels that peers never join."""
    assert ended(None) == (0, True)
    assert ended(KeyboardInterrupt()) == (130, False)
    assert capsys.readouterr().err == "interrupted\n"
    assert ended(ValueError("no\nluck")) == (2, False)
    assert capsys.readouterr().err == "error: no luck\n"
    assert ended(SystemExit(0)) == (1, False)  # raised by a library
    assert ended(PeerLost("rank 3 is gone")) == (1, False)  # nothing is wrong with the input


def test_an_unforeseen_error_has_its_traceback_and_its_rank(ended, capsys):
    assert ended(RuntimeError("no luck"), rank=3) == (1, False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "error on rank 3: RuntimeError: no luck"


def test_out_of_memory_says_what_to_change(ended, capsys, tmp_path):
    torch_says = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 12.00 MiB "
        "is free. Including non-PyTorch memory, this process has 79.1 GiB memory in use. See documentation"
    )
    assert ended(torch.cuda.OutOfMemoryError(torch_says), rank=1) == (2, False)
    said = capsys.readouterr().err
    assert said.startswith("error on rank 1: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ")
    assert f"python -m rf_train.plan {tmp_path}/recipe.yaml optimizer.micro_batch=2 --gpus 8." in said
    for setting in ("optimizer.micro_batch", "model.checkpointing=block", "run.sequence_parallel_size"):
        assert setting in said.split("--gpus")[1]
    assert said.count("\n") == 1 and "documentation" not in said


# ---- ranks that disagree


def cut(batch: Batch, frames: int) -> Batch:
    draws = {
        name: draw[:, :, :frames] if draw.dim() == 5 else draw[:, : frames // 3] if draw.dim() == 2 else draw
        for name, draw in batch.draws.items()
    }
    return replace(batch, x=batch.x[:, :, :frames], draws=draws, chunk_sizes=[3] * (frames // 3))


def disagree_on_this_rank(recipe: dict, changed: dict, frames: int) -> str:
    """Trains with other settings on rank 1, and with clips cut to `frames` there. Returns the error."""
    if os.environ["RANK"] == "1":
        recipe = {**recipe, **{section: {**recipe[section], **values} for section, values in changed.items()}}
        steps = train.steps
        train.steps = lambda *arguments: (
            (step, [cut(batch, frames) for batch in micro_batches]) for step, micro_batches in steps(*arguments)
        )
    return error_of_training(recipe)


def error_of_training(recipe: dict) -> str:
    try:
        train.train(config.from_dict(recipe))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
def test_ranks_that_disagree_stop_at_once(plain_run, tmp_path, gather):
    recipe, begin = recipe_dict(plain_run.data, tmp_path, gather_for_rollout=gather), time.perf_counter()
    told = run_distributed(disagree_on_this_rank, 2, timeout=90, recipe=recipe, changed={}, frames=6)
    chunks = "step 1: ranks disagree on chunks: 3 on rank 0, 2 on rank 1; all must read the same recipe and data"
    assert told == [chunks] * 2
    changed = {"model": {"chunk": 2}, "run": {"seed": 5}}
    told = run_distributed(disagree_on_this_rank, 2, timeout=90, recipe=recipe, changed=changed, frames=9)
    settings = "recipe.model.chunk is 3 on rank 0, 2 on rank 1; recipe.run.seed is 4 on rank 0, 5 on rank 1"
    assert told == [f"ranks disagree: {settings}"] * 2
    assert time.perf_counter() - begin < 90


def train_on_a_node_of_its_own(recipe: dict, files: dict) -> str:
    """Trains, while rank 1 finds other files under the same names. Returns the error."""
    if os.environ["RANK"] == "1":
        find, dataset = deepspeed_json.find_file, batches.LatentDataset
        deepspeed_json.find_file = lambda path: find(files.get(path, path))
        batches.LatentDataset = lambda folder, *rest: dataset(files.get(str(folder), folder), *rest)
    return error_of_training(recipe)


@pytest.mark.slow
def test_ranks_with_other_files_under_the_same_names_stop_at_once(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path)
    files = {"ds_configs/zero3.json": "ds_configs/zero2.json"}
    for said in run_distributed(train_on_a_node_of_its_own, 2, timeout=90, recipe=recipe, files=files):
        stage = "deepspeed.zero_optimization.stage is 3 on rank 0, 2 on rank 1"
        assert said.startswith("ranks disagree: ") and stage in said
    write_dataset(tmp_path / "other", count=16)
    short = str(plain_run.data / "short")
    files = {short: str(tmp_path / "other")}
    for said in run_distributed(train_on_a_node_of_its_own, 2, timeout=90, recipe=recipe, files=files):
        samples = f"data.{short}.samples is 12 on rank 0, 16 on rank 1; data.{short}.card is "
        assert said.startswith(f"ranks disagree: {samples}")


# ---- a rank that is killed


@pytest.mark.parametrize(
    "kind, words",
    [
        (RuntimeError, "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3421"),
        (RuntimeError, "Read error [127.0.0.1]:3421: Connection reset by peer"),
        (
            dist.DistBackendError,
            "NCCL error in: ProcessGroupNCCL.cpp:3763, remote process exited or there was a network error, NCCL "
            "version 2.28.8\nncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.\nLast error:\n socketProgressOpt: Call to recv from 10.0.0.1<3> failed : Broken pipe",
        ),
        (
            dist.DistBackendError,
            "NCCL error in: NCCLUtils.cpp:94, internal error, NCCL version 2.14.3\nncclInternalError: Internal check "
            "failed.\nLast error:\nNet : Connection closed by remote peer host<4>",
        ),
        (dist.DistBackendError, "NCCL error in: NCCLUtils.cpp:94, unhandled system error, NCCL version 2.28.8"),
        (dist.DistBackendError, "NCCL communicator was aborted on rank 2. Original reason for failure was: watchdog"),
        (RuntimeError, "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 1800 s"),
        (dist.DistNetworkError, "failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?"),
    ],
)
def test_a_lost_peer_is_known_by_the_words_of_gloo_and_nccl(kind, words):
    with pytest.raises(PeerLost, match=r"^another rank has stopped") as caught, naming_lost_peers():
        raise kind(f"{words}\nException raised from create at a.cpp:7 (most recent call first):\nframe #0: c10")
    said = str(caught.value)
    assert said.endswith(f"({' '.join(words.split())})") and "frame #0" not in said


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: a.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected : rank 1"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("shapes differ"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, naming_lost_peers():
        raise error
    assert caught.value is error


@pytest.mark.slow
def test_when_a_rank_is_killed_the_other_says_so_in_one_line_and_leaves(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path / "run")
    recipe["stages"][0]["steps"] = 10_000
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    port, command = free_port(), [sys.executable, "-m", "rf_train.train", tmp_path / "recipe.yaml"]
    ranks = [
        subprocess.Popen(
            command, cwd=PROJECT, env={**os.environ, **rank_environment(rank, 2, port)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    rows, begin = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    try:
        while len(read_rows(rows)) < 3 and time.monotonic() - begin < 120 and ranks[0].poll() is None:
            time.sleep(0.2)
        ranks[1].kill()
        said = ranks[0].communicate(timeout=60)[1]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 1
    by_collective, by_watch = "another rank has stopped", "was killed, or ended without a word"  # who sees it first
    last = said.splitlines()[-1]
    assert last.startswith("error") and (by_collective in last or by_watch in last) and "Traceback" not in said


# ---- memory


def test_a_stage_that_does_not_fit_is_refused_with_settings_that_do():
    """Rank 0 says which. The others say the same need, without the search."""
    case = tiny_case(device="cuda", gpus=2, micro_batch=4, checkpointing="none")
    case = replace(case, clip=Clip(12, 256, 256))  # activations count, not DeepSpeed's buckets
    enough = memory(case).peak / (1 - ROOM)
    start_checks.check_memory([replace(case, cluster=replace(case.cluster, memory=1.01 * enough))], rank=0)
    tight = replace(case, cluster=replace(case.cluster, memory=0.8 * enough))
    with pytest.raises(ValueError, match=r"stage stage needs .* GiB on each GPU; .*; these settings fit") as told:
        start_checks.check_memory([tight], rank=0)
    changed = dict(setting.split("=") for setting in str(told.value).split(": ")[-1].split())
    assert changed["model.checkpointing"] != "none" or changed["optimizer.micro_batch"] != "4"
    with pytest.raises(ValueError, match=r"kept free$"):
        start_checks.check_memory([tight], rank=1)


def test_on_a_cpu_nothing_is_refused():
    case = tiny_case()
    start_checks.check_memory([replace(case, cluster=replace(case.cluster, memory=1.0))], rank=0)
    assert case.cluster.device == "cpu" and not fits(replace(case, cluster=replace(case.cluster, memory=1.0)))
