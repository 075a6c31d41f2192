"""What an exported model carries besides its weights, so that whoever gets the folder can use it, and knows what it is.

    OUT/README.md         the card: how to sample, licence, training, data, versions
        sample.py         a causal sampling example with diffusers' own parts (causal_sample.py)
        causal.json       chunks, attention and sampling, which sample.py reads
        scheduler/        diffusers' scheduler, with the run's shift
        codec/            the built-in codec, if the run's data was made with it

Paths, addresses and names of the machine that trained are left out: an address may hold a key.
"""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from data_prep.card import card_geometry, read_card
from data_prep.codecs import dataset_codec
from data_prep.command import one_line
from data_prep.default_codec import CODEC_FILE, DefaultCodec
from data_prep.files import write_atomic, write_json
from data_prep.places import place_of
from rf_train import config
from rf_train.config import Recipe
from rf_train.generation import causal_sample
from rf_train.model.chunks import RoutedWithin, Window, attention_at_any_length

PRIVATE = ("data", "start", "run")  # sections of a recipe with paths and addresses
PACKAGES = ("rf_train", "torch", "diffusers")


def describe(out: Path, recipe: Recipe, step: int, weights: str, licence: str) -> None:
    """Writes everything but the weights into `out`. `weights`: "ema" or "master". `licence`: "" if not stated.

    When a dataset of the run can't be read any more, the card says so, and there is neither codec nor example. The
    reason, which names the place, is printed.
    """
    cards = dataset_cards(recipe)
    card = [_front_matter(licence), f"# A causal video model, after {step} steps of Resampling Forcing\n"]
    if cards:
        first = next(iter(cards))
        write_json(out / "causal.json", causal_settings(recipe, cards))
        shutil.copyfile(causal_sample.__file__, out / "sample.py")
        _write_scheduler(out / "scheduler", recipe.flow.sampling_shift)
        if cards[first]["codec"]["name"] == "default":
            (out / "codec").mkdir()
            codec = dataset_codec(place_of(first, recipe.data.patience))
            assert isinstance(codec, DefaultCodec)
            codec.save(out / "codec" / CODEC_FILE)
        card.append(_sampling(cards[first]["codec"]["name"], recipe))
    card += [_licence(licence), _training(recipe, step, weights), _data(list(cards.values()))]
    write_atomic(out / "README.md", "\n".join(card))


def dataset_cards(recipe: Recipe) -> dict[str, dict]:
    """{folder: card} of the datasets that the run trained on, stage by stage; {} when one of them can't be read."""
    stages = [recipe.folders_of(recipe.dataset_of(stage)) for stage in recipe.stages]
    try:
        return {folder: read_card(place_of(folder, recipe.data.patience)) for folders in stages for folder in folders}
    except (ValueError, OSError) as error:
        print(f"no codec, no sample.py, and no data in the card: {one_line(error)}", file=sys.stderr)
        return {}


def causal_settings(recipe: Recipe, cards: dict[str, dict]) -> dict[str, Any]:
    """What causal.json holds, see `causal_sample.sample`."""
    model, flow, card = recipe.model, recipe.flow, next(iter(cards.values()))
    folders = [recipe.folders_of(recipe.dataset_of(stage))[0] for stage in recipe.stages]
    frames = [stage.frames or cards[folder]["latent"]["frames"] for stage, folder in zip(recipe.stages, folders)]
    chunks = len(model.chunking.sizes(max(frames)))
    attention = attention_at_any_length(recipe.stages[-1].attention, chunks)
    assert isinstance(attention, (Window, RoutedWithin))
    return {
        "chunk": model.chunk,
        "first_chunk": model.first_chunk,
        "attention": {
            "window": attention.window,
            "sink": attention.sink,
            "top_k": getattr(attention, "top_k", 0),
            "reach": getattr(attention, "reach", 0),
            "farthest_sink": getattr(attention, "farthest_sink", None),
        },
        "steps": flow.sampling_steps,
        "guidance": flow.guidance,
        "channels": model.channels,
        "height": card["latent"]["height"],
        "width": card["latent"]["width"],
        "text_len": model.text_len,
        "fps": card["video"]["fps"],
        "frames_per_latent": card_geometry(card).strides[0],
        "codec": card["codec"]["name"],
    }


def _write_scheduler(folder: Path, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler  # here, since it takes seconds to import

    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder)


# ---- the card's parts


def _front_matter(licence: str) -> str:
    known = {"license": licence or "other", "library_name": "diffusers", "pipeline_tag": "text-to-video"}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def _sampling(codec: str, recipe: Recipe) -> str:
    needs = (
        ("pip install torch diffusers transformers av", " --wan WAN_FOLDER")
        if codec == "wan"
        else (
            "pip install torch diffusers av, and the package rf_train for its codec and text encoder, which are in it",
            "",
        )
    )
    heun = "\nThe run samples with Heun's method; the example uses Euler's.\n" if recipe.flow.solver == "heun" else ""
    return f"""## Sampling

    # {needs[0]}
    python sample.py --prompt "..." --seconds 15 --out video.mp4{needs[1]}

It is a causal model: it makes a video chunk by chunk, {recipe.model.chunk} latent frames each, and reads its own
earlier chunks. diffusers' `WanTransformer3DModel` opens this folder. But by itself it lets all frames read all others,
and so does `WanPipeline`: do not sample with these alone. `sample.py` adds what is missing, an attention processor with
a K/V cache, and goes chunk by chunk, with diffusers' transformer and scheduler. `causal.json` has the sizes of chunks,
the attention, the number of steps and the guidance.
{heun}
To go on training from these weights: `start.weights=THIS_FOLDER` in a recipe of rf_train. To distil from them with
Self-Forcing's code: export a `.pt` file from the run in their place.
"""


def _licence(licence: str) -> str:
    text = licence or "Not stated. Say here under which licence the weights may be used."
    return f"## Licence of the weights\n\n{text}\n\nThe weights that training started from have a licence, too.\n"


def _training(recipe: Recipe, step: int, weights: str) -> str:
    settings = config.to_dict(recipe)
    shown = {key: value for key, value in settings.items() if key not in PRIVATE}
    for stage in shown["stages"]:
        stage.pop("data", None)
    shown["run"] = {key: settings["run"][key] for key in ("seed", "precision")}
    started = "weights of another model; name it here" if recipe.start.weights else ""
    started = started or ("another run; name it here" if recipe.start.run else "random weights")
    kind = "the moving average (EMA)" if weights == "ema" and recipe.optimizer.ema > 0 else "the last weights"
    return f"""## Training

Resampling Forcing ([arXiv 2512.15702](https://arxiv.org/abs/2512.15702)). Step {step}; {kind}. Started from {started}.
Exported with {", ".join(_versions())}. The recipe, without its paths:

```yaml
{yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=110).rstrip()}
```
"""


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _data(cards: list[dict]) -> str:
    if not cards:
        gone = "The training data could not be read any more when this was written. So there is no more about it here,"
        return f"## Data\n\n{gone}\nno sampling example, and no codec.\n"
    heads = ("dataset", "clips", "videos", "a clip", "latents", "codec", "text")
    lines = ["## Data\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for card in {card["hash"]: card for card in cards}.values():
        video, latent, count = card["video"], card["latent"], card["counts"]
        clip = f"{video['frames']} frames of {video['height']}x{video['width']} at {video['fps']:g} fps"
        sizes = " x ".join(str(latent[key]) for key in ("channels", "frames", "height", "width"))
        made = [f"{card[part]['name']} {card[part]['hash'][:12]}" for part in ("codec", "text")]
        row = (card["hash"][:12], str(count["samples"]), str(count["videos"]), clip, sizes, *made)
        lines.append(f"| {' | '.join(row)} |")
    wan = any(card["codec"]["name"] == "wan" for card in cards)
    codec = "Wan's VAE, as published: its hash is in the table" if wan else "the built-in one, in `codec/`"
    return "\n".join(lines) + f"\n\nHashes are SHA-256, their first 12 digits. The codec is {codec}.\n"
