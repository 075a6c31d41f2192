"""Shared pieces: the devices, a tiny model whose every weight matters, clips to feed it, and datasets to read."""

import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.card import CARD, SCHEMA, write_card
from data_prep.index import write_index
from data_prep.shards import ShardWriter
from rf_train.config import from_dict
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import spread_over_frames
from rf_train.diffusion.histories import History
from rf_train.diffusion.randomness import LOSS_DRAWS, make_draws
from rf_train.model.elementwise import compiled
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan
from rf_train.settings import to_plain

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else commands refuse a machine whose GPUs PyTorch can't use

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(autouse=True)
def not_compiled():
    """Every test begins without compiled functions: a command that ran in this process may have turned them on."""
    with compiled(False):
        yield


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that there is. On a GPU fp32 is fp32, not TF32, and convolutions give the same bits each time."""
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    wanted = [(cublas, "allow_tf32", False), (cudnn, "allow_tf32", False), (cudnn, "deterministic", True)]
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    for place, name, value in wanted:
        setattr(place, name, value)
    yield torch.device(request.param)
    for place, name, value in before:
        setattr(place, name, value)


def kernel_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which attention runs in the device's own kernels: those of a GPU take no fp32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def tolerance(device: torch.device, on_cpu: float) -> float:
    """How far two fp32 results may differ. A GPU adds in another order for another shape."""
    return on_cpu if device.type == "cpu" else max(10 * on_cpu, 1e-4)


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1.3e-6, atol: float = 1e-5) -> None:
    """PyTorch's own, for fp32, with `tolerance` on a GPU."""
    rtol, atol = (tolerance(found.device, allowed) for allowed in (rtol, atol))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def tiny_settings(**changes) -> ModelSettings:
    tiny = ModelSettings(
        dim=48, ffn_dim=96, heads=2, layers=2, channels=4, text_dim=12, text_len=6, freq_dim=32, chunk=3,
        first_chunk=3, checkpointing="none",
    )  # fmt: skip
    return replace(tiny, **changes)


def plain_settings(**changes) -> dict:
    """`tiny_settings` as a recipe's section `model`."""
    return to_plain(tiny_settings(**changes))


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
        num_attention_heads=settings.heads, attention_head_dim=settings.head_dim, in_channels=settings.channels,
        out_channels=settings.channels, text_dim=settings.text_dim, freq_dim=settings.freq_dim,
        ffn_dim=settings.ffn_dim, num_layers=settings.layers,
    )  # fmt: skip
    randomise(model, seed)
    return model


@pytest.fixture
def tiny_model():
    def build(device: torch.device = CPU, **changes) -> CausalWan:
        model = CausalWan(tiny_settings(**changes))
        randomise(model)
        return model.eval().to(device)

    return build


def random_clip(
    frames: int, batch: int = 1, settings: ModelSettings | None = None, height: int = 4, width: int = 6, seed: int = 1,
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x, t per frame, text): random latents, a level for every chunk, and captions of different length."""
    settings = settings or tiny_settings()
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, settings.channels, frames, height, width, generator=stream)
    sizes = settings.chunking.sizes(frames)
    t = spread_over_frames(torch.rand(batch, len(sizes), generator=stream), sizes)
    text = torch.zeros(batch, settings.text_len, settings.text_dim)
    for row in range(batch):
        length = 1 + row % settings.text_len
        text[row, :length] = torch.randn(length, settings.text_dim, generator=stream)
    return x.to(device), t.to(device), text.to(device)


def every_draw() -> dict:
    """All random numbers that the loss or any history reads."""
    wanted = dict(LOSS_DRAWS)
    for kind in History.kinds.values():
        wanted.update(kind.draws)
    return wanted


def random_batch(
    settings: ModelSettings, frames: int, clips: int = 2, height: int = 4, width: int = 6, step: int = 3,
    device: torch.device = CPU,
) -> Batch:  # fmt: skip
    """A micro-batch of random clips with the random numbers of every history."""
    x, _, text = random_clip(frames, clips, settings, height, width)
    ids, sizes = [f"s{i}" for i in range(clips)], settings.chunking.sizes(frames)
    draws = make_draws(every_draw(), 0, step, ids, tuple(x.shape[1:]), len(sizes))
    return Batch(ids, x, text, draws, sizes).to(device)


def write_dataset(
    folder: Path, count: int = 12, frames: int = 9, settings: ModelSettings | None = None, height: int = 4,
    width: int = 6, seed: int = 0,
) -> Path:  # fmt: skip
    """A dataset folder of random latents, written with the real writer. Neighbouring frames are correlated."""
    settings = settings or tiny_settings()
    stream = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = []
    for part, begin in enumerate(range(0, count, 5)):
        writer = ShardWriter(folder / f"shard-{part:06d}-0000.tar")
        for index in range(begin, min(begin + 5, count)):
            latent = stream.standard_normal((settings.channels, frames, height, width)).astype(np.float32)
            latent = np.cumsum(latent, axis=1) / np.sqrt(np.arange(1, frames + 1))[:, None, None]
            text = stream.standard_normal((1 + index % settings.text_len, settings.text_dim))
            writer.add(index, 0, latent, text, {"caption": f"clip {index}"})
        records.append(writer.finish())
    channels = settings.channels
    card = {
        "schema": SCHEMA,
        "codec": {"name": "default", "hash": "c", "settings": {}},
        "latent": {
            "channels": channels, "frames": frames, "height": height, "width": width, "dtype": "float16",
            "strides": [4, 8, 8], "mean": [0.0] * channels, "std": [1.0] * channels,
        },
        "video": {"fps": 16, "frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width},
        "text": {"name": "default", "dim": settings.text_dim, "max_tokens": settings.text_len, "hash": "t"},
        "empty_caption": [[0.1] * settings.text_dim],
        "counts": {"videos": count, "samples": count, "shards": len(records), "skipped": {}},
        "shards": [{key: record[key] for key in ("file", "samples", "bytes", "sha256")} for record in records],
        "index": write_index(folder, records),
        "source": {"path": "", "settings": {}},
    }  # fmt: skip
    write_card(folder, card)
    return folder


def change_card(folder: Path, change) -> None:
    """Changes a dataset's card as its maker would: with a fitting hash."""
    card = json.loads((folder / CARD).read_text())
    change(card)
    write_card(folder, card)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """An empty folder for copies of indexes, and no proxy to this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


WAN_VAES = {  # what sets the VAEs of Wan apart, as diffusers' config says it
    "wan 2.1": {"z_dim": 16},
    "wan 2.2": {
        "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
        "decoder_base_dim": 12, "scale_factor_spatial": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="session", params=WAN_VAES)
def wan_folder(request, tmp_path_factory):
    """A tiny random VAE of Wan's architecture, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    settings = WAN_VAES[request.param]
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1 * n for n in range(settings["z_dim"])],
        latents_std=[0.5 + n for n in range(settings["z_dim"])],
        **settings,
    )
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
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


# ---- runs that several tests read. None of them may change what a fixture gives.


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory):
    """A recipe's run in one process without DeepSpeed, with one micro-batch of four clips: a `PlainRun`."""
    from tests.engine.runs import recipe_dict, train_plainly

    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "short")
    write_dataset(folder / "long", count=7, frames=14, seed=1)
    return train_plainly(from_dict(recipe_dict(folder, folder, micro_batch=4)), folder)


@pytest.fixture(scope="session")
def two_rank_run(plain_run, tmp_path_factory):
    """The same on two ZeRO-3 ranks, saved every ten steps: the run's folder, and what each rank was given."""
    from tests.engine.runs import recipe_dict, train_on_ranks

    out = tmp_path_factory.mktemp("two") / "run"
    return out, train_on_ranks(2, recipe_dict(plain_run.data, out, save_every=10, keep=10))
