"""Self-Forcing's training step, with the model of its public repository, to compare ours with.

The user names the folder of that repository; its file `wan/modules/causal_model.py` runs as it is. Two of its functions
are replaced when it runs. `flash_attention`, for the caption, becomes PyTorch's own attention: its package need not be
installed. On a CPU `flex_attention` becomes PyTorch's attention under the same mask: it has no backward there.

Their step is teacher forcing: all clean frames beside the noisy ones, under a block mask, with every block recomputed
in backward. We leave out the clean frames of the last chunk, which nobody reads; their model computes them.
"""

import importlib
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rf_train.engine.devices import clock
from rf_train.model.chunks import Dense
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan
from rf_train.planning.costs import GIB, Clip
from rf_train.weights import to_wan_name

MODEL_FILE = "wan/modules/causal_model.py"


def caption_attention(q: Tensor, k: Tensor, v: Tensor, **lengths: None) -> Tensor:
    """In the place of `flash_attention`: [B, L, heads, head_dim] each. No caption has a length: all are padded."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    """In the place of `flex_attention` on a CPU: [B, heads, L, head_dim] each."""
    index = torch.arange(query.shape[2], device=query.device)
    mask = block_mask.mask_mod(0, 0, index[:, None], index[None])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def import_their_model(folder: Path) -> ModuleType:
    """Their module `wan.modules.causal_model`, without what their packages import besides: codecs, text encoders.

    It stays in `sys.modules`, because the compiler looks it up there.
    """
    for name in ("wan", "wan.modules"):
        package = ModuleType(name)
        package.__path__ = [str(folder.resolve() / name.replace(".", "/"))]
        sys.modules[name] = package
    module = importlib.import_module("wan.modules.causal_model")
    vars(sys.modules["wan.modules.model"])["flash_attention"] = caption_attention
    return module


def build_their_model(module: ModuleType, ours: CausalWan) -> nn.Module:
    """Their model with the size, the weights, the dtype and the device of ours, recomputing blocks in backward."""
    settings, weight = ours.settings, ours.proj_out.weight
    with torch.device(weight.device):
        model = module.CausalWanModel(
            patch_size=(1, settings.patch, settings.patch), text_len=settings.text_len, in_dim=settings.channels,
            dim=settings.dim, ffn_dim=settings.ffn_dim, freq_dim=settings.freq_dim, text_dim=settings.text_dim,
            out_dim=settings.channels, num_heads=settings.heads, num_layers=settings.layers, eps=settings.eps,
        )  # fmt: skip
    model = model.to(weight.dtype).train()
    model.load_state_dict({to_wan_name(name): value for name, value in ours.state_dict().items()})
    model.num_frame_per_block, model.gradient_checkpointing = settings.chunk, True
    return model


def self_forcing_step(
    folder: Path, settings: ModelSettings, clip: Clip, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of their training step of one clip (no optimizer), after one to warm up, and peak memory.

    `relative_difference` compares their velocities with ours: same weights, same clip.
    """
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    module = import_their_model(folder)
    if not on_gpu:
        vars(module)["flex_attention"] = masked_attention
    with torch.device(device):
        ours = CausalWan(settings).to(dtype)
        nn.init.normal_(ours.proj_out.weight, std=0.02)  # zero in a new model
        shape = (1, settings.channels, clip.frames, clip.height, clip.width)
        noisy, clean = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        text = torch.randn(1, settings.text_len, settings.text_dim, dtype=dtype)
        t = torch.rand(1, clip.frames)
    history = clean[:, :, : clip.frames - settings.chunk]
    with torch.no_grad():
        expected = ours(noisy=noisy, t=t, history=history, text=text, attention=Dense())
    model = build_their_model(module, ours)
    del ours
    tokens = clip.frames * settings.tokens_per_frame(clip.height, clip.width)
    forward = partial(model, noisy, t=1000 * t.double(), context=text, seq_len=tokens, clean_x=clean)

    def step() -> tuple[Tensor, float, float]:
        """Velocities, and seconds of forward and of backward."""
        model.zero_grad(set_to_none=True)
        begin = clock(device)
        velocity = forward()
        loss = (velocity.float() - noisy.float()).square().mean()
        between = clock(device)
        loss.backward()
        return velocity.detach(), between - begin, clock(device) - between

    velocity, *first = step()  # compiles, and builds the mask
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _, forward_s, backward_s = step()
    figures = {
        "seconds": forward_s + backward_s,
        "forward_s": forward_s,
        "backward_s": backward_s,
        "first_step_seconds": sum(first),
        "relative_difference": ((velocity.float() - expected.float()).norm() / expected.float().norm()).item(),
    }
    if on_gpu:
        # Their weights, gradients and activations; the mask, once built, is small.
        figures["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    return figures
