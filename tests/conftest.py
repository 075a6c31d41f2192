"""Shared pieces: a tiny model whose every weight matters, and clips to feed it."""

import pytest
import torch

from rf_train import config
from rf_train.model import CausalWan

torch.set_num_threads(2)


def tiny_settings(**changes) -> config.Model:
    settings = dict(dim=48, ffn_dim=96, heads=2, layers=2, channels=4, text_dim=12, text_len=6, freq_dim=32, chunk=3, first_chunk=3, checkpointing="none")
    return config.Model(**{**settings, **changes})


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter, the zero ones too, a random value: a test can then see each of them."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=stream) * scale * 0.7)


def tiny_wan(seed: int = 3):
    """diffusers' own Wan in the tiny model's shapes, with the random weights of `seed`."""
    settings = tiny_settings()
    model = pytest.importorskip("diffusers").WanTransformer3DModel(
        num_attention_heads=settings.heads, attention_head_dim=settings.dim // settings.heads, in_channels=settings.channels, out_channels=settings.channels,
        text_dim=settings.text_dim, freq_dim=settings.freq_dim, ffn_dim=settings.ffn_dim, num_layers=settings.layers,
    )  # fmt: skip
    randomise(model, seed)
    return model


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


def write_dataset(folder, count: int = 12, frames: int = 9, settings: config.Model | None = None, height: int = 4, width: int = 6, seed: int = 0):
    """A dataset folder of random latents, written with the real writer."""
    import numpy as np

    from data_prep.shards import ShardWriter, write_card

    settings = settings or tiny_settings()
    stream = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with ShardWriter(folder, 5) as writer:
        for index in range(count):
            latent = stream.standard_normal((settings.channels, frames, height, width)).astype(np.float32)
            latent = np.cumsum(latent, axis=1) / np.sqrt(np.arange(1, frames + 1))[:, None, None]  # frames that have to do with one another
            text = stream.standard_normal((1 + index % settings.text_len, settings.text_dim))
            writer.add(f"{index:06d}_0000", latent, text, {"caption": f"clip {index}"})
    channels = settings.channels
    write_card(folder, {
        "schema": 1,
        "codec": {"name": "default", "hash": "c", "settings": {}},
        "latent": {"channels": channels, "frames": frames, "height": height, "width": width, "dtype": "float16", "strides": [4, 8, 8], "mean": [0.0] * channels, "std": [1.0] * channels},
        "video": {"fps": 16, "frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width},
        "text": {"name": "default", "dim": settings.text_dim, "max_tokens": settings.text_len, "hash": "t"},
        "empty_caption": [[0.1] * settings.text_dim],
        "counts": {"videos": count, "samples": count, "shards": len(writer.shards), "skipped": {}},
        "skipped": [],
        "shards": writer.shards,
        "source": {"path": "", "settings": {}},
    })  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """A tiny random VAE of Wan's architecture, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     latents_mean=[0.1 * n for n in range(16)], latents_std=[0.5 + n for n in range(16)])
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def umt5_folder(tmp_path_factory):
    """A tiny random umT5 with a tokenizer of six words, as a published checkpoint lays them out."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("umt5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder
