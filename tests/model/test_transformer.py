"""The causal DiT: equal to diffusers' Wan on one chunk, causal by gradient, and the same in parallel and cached."""

import math

import pytest
import torch

from rf_train.model import attention as attention_module
from rf_train.model.chunks import Dense, Routed, Window
from rf_train.model.settings import CHECKPOINTINGS, ModelSettings
from rf_train.model.transformer import CausalWan, pad_text, parameter_shapes
from tests.conftest import assert_close, kernel_dtype, random_clip, tiny_settings, tiny_wan, tolerance
from tests.model.passes import ATTENTIONS, cached_pass, kind_and_sink, parallel_pass


@pytest.mark.parametrize("attention", ATTENTIONS, ids=kind_and_sink)
@pytest.mark.parametrize(
    "frames, first_chunk, batch", [(3, 3, 1), (6, 3, 1), (21, 3, 1), (20, 3, 3), (10, 1, 3), (1, 1, 1), (63, 3, 1)]
)
@torch.no_grad()
def test_the_parallel_pass_equals_the_cached_pass(tiny_model, device, attention, frames, first_chunk, batch):
    model = tiny_model(device, first_chunk=first_chunk)
    x, t, text = random_clip(frames, batch, model.settings, device=device)
    history = random_clip(frames, batch, model.settings, seed=2, device=device)[0]
    parallel = parallel_pass(model, x, history, t, text, attention)
    cached = cached_pass(model, x, history, t, text, attention)
    assert parallel.std() > 0.1
    assert (parallel - cached).abs().max() <= tolerance(device, 1e-5)


@pytest.mark.parametrize("attention", [Dense(), Routed(top_k=2)], ids=kind_and_sink)
def test_a_noisy_chunk_reads_earlier_history_and_itself_and_nothing_else(tiny_model, device, attention):
    model = tiny_model(device)
    frames, count = 12, 4
    x, t, text = random_clip(frames, 1, model.settings, device=device)
    history = random_clip(frames - 3, 1, model.settings, seed=2, device=device)[0]
    for chunk in range(count):
        noisy, past = x.clone().requires_grad_(), history.clone().requires_grad_()
        v = model(noisy=noisy, t=t, history=past, text=text, attention=attention)
        v[:, :, 3 * chunk : 3 * chunk + 3].square().sum().backward()
        for other in range(count):
            span = slice(3 * other, 3 * other + 3)
            assert bool(noisy.grad[:, :, span].any()) == (other == chunk), f"noisy {chunk} and noisy {other}"
            if other < count - 1:
                assert bool(past.grad[:, :, span].any()) == (other < chunk), f"noisy {chunk} and history {other}"


def test_a_window_hides_older_chunks(tiny_model, device):
    model = tiny_model(device, layers=1)
    x, t, text = random_clip(15, 1, model.settings, device=device)
    history = random_clip(12, 1, model.settings, seed=2, device=device)[0].requires_grad_()
    v = model(noisy=x, t=t, history=history, text=text, attention=Window(window=2, sink=1))
    v[:, :, 12:].sum().backward()
    seen = [bool(history.grad[:, :, 3 * j : 3 * j + 3].any()) for j in range(4)]
    assert seen == [True, False, True, True]


def test_routing_with_enough_chunks_is_dense(tiny_model, device):
    model = tiny_model(device)
    x, t, text = random_clip(15, 2, model.settings, device=device)
    attentions = (Dense(), Routed(top_k=4), Routed(top_k=1))
    dense, wide, narrow = (parallel_pass(model, x, x, t, text, attention) for attention in attentions)
    assert_close(dense, wide, rtol=0, atol=1e-5)
    assert (dense - narrow).abs().max() > 1e-3


def test_checkpointing_changes_no_gradient_and_the_selective_one_runs_no_attention_twice(
    tiny_model, device, monkeypatch
):
    """With "auto" the last block, which is kept here, runs its feed-forward once, as without checkpointing."""
    gradients, calls, last_ffn = {}, dict.fromkeys(CHECKPOINTINGS, 0), {}
    merged_attention = attention_module.merged_attention

    def counted(*arguments):
        calls[checkpointing] += 1
        return merged_attention(*arguments)

    monkeypatch.setattr(attention_module, "merged_attention", counted)
    for checkpointing in CHECKPOINTINGS:
        model = tiny_model(device, checkpointing=checkpointing).to(kernel_dtype(device))
        model.kept_blocks = 1
        x, t, text = random_clip(9, 1, model.settings, device=device)
        runs: list[int] = []
        model.blocks[-1].ffn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        parallel_pass(model, x, x, t, text, Dense()).square().mean().backward()
        last_ffn[checkpointing] = len(runs)
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert calls == {"none": 2, "block": 4, "selective": 2, "auto": 2}
    assert last_ffn == {"none": 1, "block": 2, "selective": 2, "auto": 1}
    assert gradients["none"]["blocks.0.attn1.to_k.weight"].abs().max() > 0
    for checkpointing in ("block", "selective", "auto"):
        torch.testing.assert_close(gradients[checkpointing], gradients["none"])


@pytest.mark.parametrize("batch, frames, height, width", [(1, 3, 4, 6), (2, 5, 8, 4), (3, 1, 6, 6)])
@torch.no_grad()
def test_one_chunk_equals_diffusers_wan(device, batch, frames, height, width):
    """Same weights by the same names, one chunk spanning the clip, no history: Wan's own velocity."""
    settings = tiny_settings(chunk=frames, first_chunk=frames)
    reference = tiny_wan().to(device)
    model = CausalWan(settings).to(device)
    model.load_state_dict(reference.state_dict(), strict=True)
    x, _, text = random_clip(frames, batch, settings, height, width, device=device)
    t = torch.rand(batch).to(device)
    ours = model(noisy=x, t=t[:, None].expand(-1, frames), history=None, text=text, attention=Dense())
    theirs = reference(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= tolerance(device, 1e-5)


@torch.no_grad()
def test_in_bf16_one_chunk_equals_diffusers_wan_within_the_rounding_of_bf16(device):
    """Both in bf16, diffusers with the parts that it keeps in fp32: as far from one another as bf16 is from fp32."""
    settings = tiny_settings(chunk=5, first_chunk=5)
    reference = tiny_wan().to(device)
    model = CausalWan(settings).to(device)
    model.load_state_dict(reference.state_dict())
    x, _, text = random_clip(5, 2, settings, 8, 4, device=device)
    t = torch.rand(2).to(device)
    exact = reference(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    for name, module in reference.named_modules():
        keep = any(part in name for part in reference._keep_in_fp32_modules)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data if keep else parameter.data.bfloat16()
    x, text, t_frames = x.bfloat16(), text.bfloat16(), t[:, None].expand(-1, 5)
    ours = model.bfloat16()(noisy=x, t=t_frames, history=None, text=text, attention=Dense()).float()
    theirs = reference(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0].float()
    rounding = (theirs - exact).square().mean().sqrt()
    assert 1e-4 < rounding < 0.1 * exact.std()
    assert (ours - exact).square().mean().sqrt() < 2 * rounding


def test_captions_are_padded_with_zeros_and_cut_at_the_text_length():
    settings = tiny_settings(text_len=4)
    short, long = torch.ones(2, settings.text_dim), torch.ones(6, settings.text_dim)
    padded = pad_text([short, long], settings)
    assert padded.shape == (2, 4, settings.text_dim)
    assert padded[0, :2].all() and not padded[0, 2:].any() and padded[1].all()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (ModelSettings(), 1_418_996_800),
        (ModelSettings(dim=5120, ffn_dim=13824, heads=40, layers=40), 14_288_491_584),
    ],
    ids=["1.3B", "14B"],
)
def test_the_number_of_parameters_is_that_of_wan(settings, expected):
    assert sum(math.prod(shape) for shape in parameter_shapes(settings).values()) == expected
