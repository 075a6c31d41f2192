"""The benchmarks run at small sizes, and end with their figures as JSON."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from rf_train import bench, config
from rf_train.bench_gpu import relative
from rf_train.bench_self_forcing import build_their_model, import_their_model, masked_attention
from rf_train.model.chunks import Dense
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan
from rf_train.weights import export_generator, load_weights
from tests.distributed import PROJECT, run_distributed


def bench_on_this_rank(arguments: list[str]) -> str:
    """What a benchmark prints on this rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert bench.main(arguments) == 0
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, figure",
    [
        (["attention", "--chunks", "8", "--tokens", "128", "--heads", "2"], "speedup_over_dense_mask"),
        (["routing", "--chunks", "4", "--tokens", "32", "--heads", "2", "--top-k", "1"], "speedup_over_dense_16"),
        (["model", "--chunks", "3", "--side", "2"], "flop_rate_over_diffusers"),
        (["step", "--side", "2"], "rollout_share_7"),
        (["generate", "--video-frames", "100"], "share_of_forward"),
        (["data", "--samples", "4", "--steps", "2", "--index-samples", "1000"], "rate_over_webdataset"),
    ],
)
def test_a_benchmark_prints_its_figures(arguments, figure, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # of the process that measures memory
    *lines, figures = bench_on_this_rank([*arguments, "--rounds", "1"]).splitlines()
    assert lines and json.loads(figures)["bench"] == arguments[0] and json.loads(figures)[figure] > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["routing", "--chunks", "1"], "--chunks 1: routing needs at least 2"),
        (["routing", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["gpu", "--out", __file__], "test_bench.py: a file is there; give a folder"),
        (["attention", "--top-k", "3"], "--top-k: attention does not read it"),
        (["gpu", "--chunks", "3"], "--chunks: gpu does not read it"),
    ],
)
def test_sizes_that_cannot_be_measured_are_named_as_they_were_given(capsys, arguments, said):
    assert bench.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.slow
def test_the_checkpoint_s_benchmark_leaves_nothing(tmp_path):
    arguments = ["checkpoint", "--layers", "1", "--rounds", "1", "--out", str(tmp_path)]
    [out] = run_distributed(bench_on_this_rank, 1, arguments=arguments)
    figures = json.loads(out.splitlines()[-1])
    assert figures["bench"] == "checkpoint" and figures["mib"] > 60
    assert all(figures[name] > 0 for name in ("stall_share", "write_rate_over_dd", "verify_rate_over_sha256sum"))
    assert [path.name for path in tmp_path.rglob("*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["10", "0"])
def test_the_gpus_benchmark_runs_at_toy_sizes_and_says_what_it_left_out(tmp_path, minutes):
    parts = [word for part in ("values", "step 5 s, eager") for word in ("--part", part)]
    arguments, earlier = ["gpu", "--out", str(tmp_path), "--minutes", minutes, *parts], tmp_path / "results.json"
    earlier.write_text("{}")
    [out] = run_distributed(bench_on_this_rank, 1, arguments=arguments)
    figures = json.loads(out.splitlines()[-1])
    assert figures.pop("bench") == "gpu" and figures == json.loads((tmp_path / "results-2.json").read_text())
    assert earlier.read_text() == "{}"
    if minutes == "0":
        assert set(map(str, figures.values())) == {"{'skipped': 'no time left'}"}
        return
    assert figures["values routed"]["dk"] < 0.01 and figures["step 5 s, eager"]["seconds"] > 0
    assert figures["step 5 s, eager"]["graphs_compiled"] == 0


@pytest.mark.slow
def test_gathering_once_or_in_every_pass_gives_the_same_losses():
    """On one rank that a launcher started."""
    [out] = run_distributed(bench_on_this_rank, 1, arguments=["rollout", "--chunks", "2", "--rounds", "1"])
    figures = json.loads(out.splitlines()[-1])
    assert figures["ranks"] == 1 and figures["rollout_gathered_per_pass_over_once"] > 0
    assert figures["largest_difference_of_loss"] < 1e-6


needs_self_forcing = pytest.mark.skipif(
    "RF_SELF_FORCING" not in os.environ, reason="RF_SELF_FORCING is no folder with a copy of Self-Forcing's repository"
)


@needs_self_forcing
def test_self_forcings_model_with_our_weights_gives_our_velocities_and_gradients(monkeypatch):
    """In fp32, with random biases and norms. Their last clean chunk is read by nobody."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "ffn_dim": 128, "heads": 2, "layers": 3, "text_dim": 16, "text_len": 8, "freq_dim": 32}
    ours = CausalWan(ModelSettings(**sizes, checkpointing="none"))
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1 or name == "proj_out.weight":
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    module = import_their_model(Path(os.environ["RF_SELF_FORCING"]))
    monkeypatch.setattr(module, "flex_attention", masked_attention)
    theirs = build_their_model(module, ours)
    noisy, clean, grad = (torch.randn(2, 16, 9, 4, 4) for _ in range(3))
    t, text = torch.rand(2, 9), torch.randn(2, 8, 16)
    one = ours(noisy=noisy, t=t, history=clean[:, :, :6], text=text, attention=Dense())
    other = theirs(noisy, t=1000 * t.double(), context=text, seq_len=36, clean_x=clean)
    assert relative(one, other) < 1e-5
    one.backward(grad)
    other.backward(grad)
    pairs = [(ours.blocks[0].attn1.to_k.weight, theirs.blocks[0].self_attn.k.weight)]
    pairs += [(ours.patch_embedding.weight, theirs.patch_embedding.weight)]
    pairs += [(ours.blocks[1].scale_shift_table, theirs.blocks[1].modulation)]
    assert all(relative(a.grad, b.grad) < 1e-4 for a, b in pairs)


@needs_self_forcing
@pytest.mark.slow
def test_self_forcings_own_code_opens_an_exported_run(two_rank_run, tmp_path, monkeypatch):
    """As their trainer does, strictly; and it gives the velocities of the run's model."""
    run, _ = two_rank_run
    stored = torch.load(export_generator(run, tmp_path / "run.pt"), weights_only=True)
    settings = config.load(run / "recipe.yaml").model
    ours = CausalWan(settings)
    load_weights(ours, tmp_path / "run.pt")
    module = import_their_model(Path(os.environ["RF_SELF_FORCING"]))
    monkeypatch.setattr(module, "flex_attention", masked_attention)
    theirs = build_their_model(module, CausalWan(settings))
    wrapper = nn.Module()
    wrapper.model = theirs
    wrapper.load_state_dict(stored["generator"], strict=True)
    noisy, clean = (torch.randn(1, settings.channels, 9, 4, 4) for _ in range(2))
    t, text = torch.rand(1, 9), torch.randn(1, settings.text_len, settings.text_dim)
    with torch.no_grad():
        one = ours(noisy=noisy, t=t, history=clean[:, :, :6], text=text, attention=Dense())
        other = theirs(noisy, t=1000 * t.double(), context=text, seq_len=36, clean_x=clean)
    assert one.abs().max() > 1e-3 and relative(one, other) < 1e-5


@needs_self_forcing
def test_self_forcings_step_is_timed(tmp_path):
    out = bench_on_this_rank(
        ["gpu", "--self-forcing", os.environ["RF_SELF_FORCING"], "--part", "Self-Forcing", "--out", str(tmp_path)]
    )
    figures = json.loads(out.splitlines()[-1])["Self-Forcing's step"]
    assert figures["seconds"] > 0 and figures["relative_difference"] < 1e-5
