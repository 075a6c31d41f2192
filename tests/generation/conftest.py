"""A generator with a tiny random model, a real dataset card, the built-in codec and the built-in text encoder."""

import numpy as np
import pytest

from data_prep import default_codec
from data_prep.default_codec import CODEC_FILE, DefaultCodec
from data_prep.text import HashText
from rf_train.config import from_dict
from rf_train.generation.generator import Generator, make_generator
from rf_train.model.transformer import CausalWan
from tests.conftest import CPU, change_card, plain_settings, randomise, tiny_settings, write_dataset

MODEL = {"channels": 16, "text_dim": 64, "text_len": 32}


@pytest.fixture(scope="session")
def decodable_dataset(tmp_path_factory):
    """A dataset of random latents, 9 latent frames of 4 x 6 latent pixels, whose codec is there."""
    folder = write_dataset(tmp_path_factory.mktemp("data") / "train", settings=tiny_settings(**MODEL))
    steps, default_codec.STEPS = default_codec.STEPS, 5
    rng = np.random.default_rng(0)
    codec = DefaultCodec.fit([rng.integers(0, 256, (9, 32, 48, 3), dtype=np.uint8) for _ in range(3)])
    default_codec.STEPS = steps
    codec.save(folder / CODEC_FILE)

    def change(card: dict) -> None:
        card["codec"].update(hash=codec.hash, settings=codec.settings)
        card["text"].update(dim=HashText.dim, max_tokens=HashText.max_tokens, hash=HashText.hash)
        card["empty_caption"] = HashText().encode([""])[0].tolist()

    change_card(folder, change)
    return folder


@pytest.fixture
def tiny_generator(decodable_dataset):
    """Builds a `Generator` of a tiny random model, with the attention and flow of a run."""

    def build(attention="dense", flow: dict | None = None, **model) -> Generator:
        recipe = from_dict(
            {
                "model": plain_settings(**MODEL, **model),
                "data": {"train": str(decodable_dataset)},
                "flow": {"sampling_steps": 2, **(flow or {})},
                "stages": [{"attention": attention}],
            }
        )
        net = CausalWan(recipe.model)
        randomise(net)
        return make_generator(recipe, net, 1, CPU)

    return build
