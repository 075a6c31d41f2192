"""How well frames agree with their prompt: the cosine of a CLIP's embeddings of both."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_prep.files import sha256_of_files

FRAMES_PER_SECOND = 2  # frames that are looked at
GROUP = 16  # frames in a pass; always the same, so that nothing depends on what else is measured


class TextAgreement:
    """transformers' CLIPModel and its processor, from a local folder as `save_pretrained` writes it.

    Nothing is downloaded or unpickled. Prompts are cut where the model's positions end (77 tokens for OpenAI's), frames
    are resized and cropped as the folder's processor says. Raises a one-line ValueError for anything else.
    """

    def __init__(self, folder: str | Path, device: torch.device):
        from transformers import AutoProcessor, CLIPModel  # here, since it takes seconds to import

        folder = Path(folder)
        words = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()  # else it would know none
        if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file() or not words:
            wanted = "config.json, *.safetensors, tokenizer.json and its processor's files"
            raise ValueError(f"{folder}: no CLIP here, expected {wanted}")
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = AutoProcessor.from_pretrained(folder, **local)
            options = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
            self.model, loaded = CLIPModel.from_pretrained(folder, **options, **local)
            parts = self.processor.image_processor, self.processor.tokenizer
        except Exception as error:  # transformers raises many kinds for a damaged folder
            said = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"{folder}: CLIP does not load ({said[0]})") from None
        absent = sorted(loaded["missing_keys"])
        if absent:
            raise ValueError(f"{folder}: not a whole CLIP, its weights have no {absent[0]} ({len(absent)} are absent)")
        self.images, self.tokens = parts
        self.device = device
        self.model.eval().requires_grad_(False).to(device)
        self.longest = self.model.config.text_config.max_position_embeddings
        files = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".safetensors")]
        self.hash = sha256_of_files(files, {})

    def of_frames(self, frames: np.ndarray, prompts: Sequence[str], fps: float) -> np.ndarray:
        """Cosines, fp64 [T], of frames uint8 [T, H, W, 3] and the prompt of each; NaN for those not looked at."""
        found = np.full(len(frames), np.nan)
        looked_at = range(0, len(frames), max(1, round(fps / FRAMES_PER_SECOND)))
        texts = list(dict.fromkeys(prompts[n] for n in looked_at))
        for begin in range(0, len(looked_at), GROUP):
            group = looked_at[begin : begin + GROUP]
            cosines = self._cosines(frames[list(group)], texts)
            for row, n in zip(cosines, group):
                found[n] = row[texts.index(prompts[n])]
        return found

    @torch.no_grad()
    def _cosines(self, frames: np.ndarray, texts: list[str]) -> np.ndarray:
        """fp64 [frames, texts]."""
        pictures = self.images(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        options = {"padding": "max_length", "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        words = self.tokens([" ".join(html.unescape(text).split()) for text in texts], **options)
        found = self.model(
            pixel_values=pictures["pixel_values"].to(self.device),
            input_ids=words["input_ids"].to(self.device),
            attention_mask=words["attention_mask"].to(self.device),
        )
        return (found.image_embeds.double() @ found.text_embeds.double().T).cpu().numpy()
