"""Shared pieces: a tiny model whose every weight matters, and clips to feed it."""

import pytest
import torch

from rf_train import config
from rf_train.model import CausalWan

torch.set_num_threads(2)


def tiny_settings(**changes) -> config.Model:
    settings = dict(dim=48, ffn_dim=96, heads=2, layers=2, channels=4, text_dim=12, text_len=6, freq_dim=32, chunk=3, first_chunk=3, checkpointing=False)
    return config.Model(**{**settings, **changes})


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter, the zero ones too, a random value: a test can then see each of them."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=stream) * scale * 0.7)


@pytest.fixture
def tiny_model():
    def build(**changes) -> CausalWan:
        model = CausalWan(tiny_settings(**changes))
        randomise(model)
        return model.eval()

    return build


def random_clip(frames: int, batch: int = 1, settings: config.Model | None = None, height: int = 4, width: int = 6, seed: int = 1):
    """(x, t per frame, text): random latents, a level for every chunk, and captions of different length."""
    settings = settings or tiny_settings()
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, settings.channels, frames, height, width, generator=stream)
    from rf_train.chunks import Chunking
    from rf_train.resampling import by_frame

    sizes = Chunking(settings.chunk, settings.first_chunk).sizes(frames)
    t = by_frame(torch.rand(batch, len(sizes), generator=stream), sizes)
    text = torch.zeros(batch, settings.text_len, settings.text_dim)
    for row in range(batch):
        length = 1 + row % settings.text_len
        text[row, :length] = torch.randn(length, settings.text_dim, generator=stream)
    return x, t, text
