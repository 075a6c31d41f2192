"""Captions to embeddings."""

import hashlib
import html
import json
import re
import unicodedata
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.card import read_card
from data_prep.files import sha256_of_files
from data_prep.places import Place


class TextEncoder(Protocol):
    """Captions to embeddings. The attributes are what a dataset's card records."""

    name: str
    dim: int  # width of a token's vector
    max_tokens: int
    hash: str
    folder: str | None  # where the weights are; None: there are none

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """For each caption float32 [L, dim], not padded; L is its number of tokens, 1 <= L <= max_tokens."""


class HashText:
    """The built-in encoder, without weights: every word has one fixed vector of mean 0 and variance 1.

    The vector depends only on the lower-cased word, on every machine. A caption is its words' vectors in order.
    The empty caption is one vector of its own.
    """

    name = "default"
    dim = 64
    max_tokens = 32
    folder: str | None = None
    hash = hashlib.sha256(f"words 1 shake_256 {dim} {max_tokens}".encode()).hexdigest()

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """For each caption float32 [L, dim], 1 <= L <= max_tokens; further words are cut off."""
        return [np.stack([self._vector(word) for word in self._words(caption)]) for caption in captions]

    def _words(self, caption: str) -> list[str]:
        return re.findall(r"\w+", unicodedata.normalize("NFKC", caption).lower())[: self.max_tokens] or [""]

    def _vector(self, word: str) -> np.ndarray:
        uniform = np.frombuffer(hashlib.shake_256(word.encode()).digest(4 * self.dim), "<u4") / 2.0**32
        return ((uniform - uniform.mean()) / uniform.std()).astype(np.float32)


class UMT5Text:
    """Wan's text encoder: transformers' UMT5EncoderModel and its tokenizer from a local folder.

    The folder holds both, or the subfolders `text_encoder` and `tokenizer` of a published Wan checkpoint. Captions are
    cut at 512 tokens. Only the tokens of the caption are returned; Wan itself pads them with zeros to 512.

    Raises a one-line ValueError when the folder holds no umT5.
    """

    name = "umt5"
    max_tokens = 512

    def __init__(self, folder: str | Path, device: str = "cpu"):
        import torch
        from transformers import AutoTokenizer, UMT5EncoderModel  # here, since it takes seconds to import

        folder = Path(folder).absolute()
        parts = ("text_encoder", "tokenizer")
        model, tokenizer = (folder / part if (folder / part).is_dir() else folder for part in parts)
        weights, config_file = list(model.glob("*.safetensors")), model / "config.json"
        words = [path for name in ("tokenizer.json", "spiece.model") if (path := tokenizer / name).is_file()]
        if not weights or not config_file.is_file() or not words:
            raise ValueError(f"{folder}: no umT5 here, expected config.json, *.safetensors and tokenizer.json")
        self.folder: str | None = str(folder)
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            self.model = UMT5EncoderModel.from_pretrained(model, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: umT5 does not load ({str(error).splitlines()[0]})") from None
        self.model.eval().requires_grad_(False).to(self.device)
        self.dim: int = self.model.config.d_model
        sizes = {key: config.get(key) for key in ("d_model", "num_layers", "vocab_size")}
        self.hash = sha256_of_files(weights + words, sizes)

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """For each caption float32 [L, dim], 1 <= L <= 512."""
        import torch

        embeddings = []
        options = {"max_length": self.max_tokens, "truncation": True, "return_attention_mask": True}
        for caption in captions:
            caption = " ".join(html.unescape(html.unescape(caption)).split())
            tokens = self.tokenizer(caption, return_tensors="pt", **options).to(self.device)
            with torch.no_grad():
                states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
            embeddings.append(states[tokens.attention_mask[0].bool()].float().cpu().numpy())
        return embeddings


def open_text(spec: str, device: str = "cpu") -> TextEncoder:
    """Opens the text encoder "default" or "umt5:FOLDER"."""
    name, _, folder = spec.partition(":")
    if spec == "default":
        return HashText()
    if name == "umt5" and folder:
        return UMT5Text(folder, device)
    raise ValueError(f"unknown text encoder {spec!r}, expected default or umt5:FOLDER")


def dataset_text(dataset: str | Place, device: str = "cpu") -> TextEncoder:
    """Opens the text encoder that made a dataset, as its card says. Raises ValueError if it finds another one there."""
    recorded = read_card(dataset)["text"]
    spec = "default" if recorded["name"] == "default" else f"{recorded['name']}:{recorded['folder']}"
    text = open_text(spec, device)
    if text.hash != recorded["hash"]:
        hashes = f"hash {text.hash[:12]}, the dataset says {recorded['hash'][:12]}"
        raise ValueError(f"{text.folder or 'default'}: not the text encoder that made {dataset} ({hashes})")
    return text
